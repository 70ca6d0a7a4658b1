"""`controlplane serve`: the server."""

import click
import uvloop

from controlplane.cli.settings import read_settings
from controlplane.observe import logs
from controlplane.server import run


@click.command()
def serve() -> None:
    """Start the gRPC server alone, for an Envoy that runs elsewhere. SIGTERM stops it in order."""
    settings = read_settings()
    logs.configure(settings)
    uvloop.run(run(settings))
