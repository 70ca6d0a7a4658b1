"""`controlplane catalog`: what is sold, and on which clusters."""

from pathlib import Path

import click

from controlplane.catalog.model import Catalog


@click.group()
def catalog() -> None:
    """Look after the catalogue of plans, SKUs, regions and clusters."""


@catalog.command("check")
@click.argument("file", type=click.Path(path_type=Path))
def check_catalog(file: Path) -> None:
    """Say what is wrong with a catalogue, if anything is."""
    checked = Catalog.load(file)
    click.echo(
        f"{file} is fine: {len(checked.plans)} plans, {len(checked.skus)} SKUs, {len(checked.regions)} regions, "
        f"{len(checked.clusters)} clusters."
    )
