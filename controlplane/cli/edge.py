"""`controlplane edge`: what Envoy starts with."""

import click

from controlplane.cli.settings import read_settings
from controlplane.edge import write


@click.command()
def edge() -> None:
    """Write Envoy's configuration for these settings into the run folder, and print its path."""
    click.echo(write(read_settings()))
