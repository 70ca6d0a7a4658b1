"""`controlplane up`: everything, on this machine."""

import click
import uvloop

from controlplane.cli.settings import read_settings
from controlplane.local.supervisor import supervise
from controlplane.observe import logs


@click.command()
def up() -> None:
    """Start everything in the foreground: the database engines, the server and Envoy. Ctrl-C stops all of it."""
    settings = read_settings()
    logs.configure(settings)
    uvloop.run(supervise(settings))
