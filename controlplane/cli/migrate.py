"""`controlplane migrate`: the schema of the control plane's own database."""

import click

from controlplane import migrations
from controlplane.cli.store import with_store


@click.command()
def migrate() -> None:
    """Bring the schema of the database up to date. `up` and `serve` do it as they start."""
    with_store(migrations.migrate)
    click.echo("The schema is up to date.")
