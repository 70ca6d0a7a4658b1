"""`controlplane host`: the hosts of functions and of proxies, taken into service and out of it."""

from datetime import datetime

import click

from controlplane.catalog.model import Catalog
from controlplane.cli.settings import read_settings
from controlplane.cli.store import with_store
from controlplane.clock import SystemClock
from controlplane.hosts import admin
from controlplane.hosts.kinds import KINDS, PROXIES
from controlplane.keys import Keys


@click.group()
def host() -> None:
    """Take hosts of functions and of proxies into service, list them, and take them out."""


@host.command("add")
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), required=True, help="What it carries.")
@click.option("--region", help="A region of the catalogue; its default when not given.")
@click.option("--address", default="", help="Where customers reach a host of proxies, as HOST:PORT.")
@click.option("--capacity", default=1000, show_default=True, help="How many proxies it takes.")
def add_host(name: str, kind: str, region: str | None, address: str, capacity: int) -> None:
    """Take a host into service, and print its secret, this once."""
    settings = read_settings()
    catalog, keys = Catalog.load(settings.catalog), Keys.load(settings.keys_path)
    made, secret = with_store(
        lambda store: admin.add_host(
            store,
            catalog,
            SystemClock(),
            keys,
            kind=kind,
            name=name,
            region=region or catalog.default_region,
            address=address,
            capacity=capacity,
        )
    )
    command = "proxy-host" if kind == PROXIES else "functions-host"
    click.echo(f"{secret}")
    click.echo(
        f"The host {made.name} is in service. Write the line above to a file on it, point HTX_HOST_SECRET_FILE there, "
        f"set HTX_HOST_SERVER, and start `controlplane {command}`.",
        err=True,
    )


@host.command("list")
def list_hosts() -> None:
    """List all hosts, and when each was last heard of."""
    now = SystemClock().now()
    rows = [("NAME", "KIND", "REGION", "ADDRESS", "PROXIES", "SEEN")]
    for each in with_store(admin.list_hosts):
        used = f"{each.used} of {each.capacity}" if each.kind == PROXIES else ""
        rows.append((each.name, each.kind, each.region, each.address, used, _since(each.last_seen_at, now)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        click.echo(click.style(line, bold=number == 0))


@host.command("remove")
@click.argument("name")
@click.option("--force", is_flag=True, help="Also if it carries proxies, which have failed then.")
def remove_host(name: str, force: bool) -> None:
    """Take a host out of service at once."""
    removed = with_store(lambda store: admin.remove_host(store, SystemClock(), name=name, force=force))
    click.echo(f"The host {removed.name} is out of service.")


def _since(time: datetime | None, now: datetime) -> str:
    """Return how long ago something was, for people."""
    if time is None:
        return "never"
    seconds = int((now - time).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
