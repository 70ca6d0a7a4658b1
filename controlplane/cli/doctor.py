"""`controlplane doctor`: what the doctor finds, in lines for the operator."""

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
from sqlalchemy import make_url

from controlplane.catalog.model import Catalog
from controlplane.cli.settings import read_settings
from controlplane.cli.store import check_schema
from controlplane.clock import SystemClock
from controlplane.databases.clusters import open_clusters
from controlplane.doctor import Difference, Doctor, Kind
from controlplane.hosts.kinds import FUNCTIONS
from controlplane.hosts.model import live_hosts
from controlplane.house import open_storage
from controlplane.observe import logs
from controlplane.operator_error import OperatorError
from controlplane.settings import Settings
from controlplane.sql import Store

_SECONDS_OF_SILENCE = 2.0


@click.command()
def doctor() -> None:
    """Say where what is there differs from what should be: databases, backups, counters. Nothing is changed.

    It ends with 1 if anything does. What is under way is not counted; the server may be running.
    """
    begun = time.monotonic()
    settings = read_settings()
    logs.configure(settings)
    url = make_url(settings.storage_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():  # it would be made now
        raise OperatorError(f"{url.database} is not there: start the server first, or set HTX_DATA_DIR to its folder.")
    found, looked_at = asyncio.run(_examine(settings))
    for kind in Kind:
        if lines := [each for each in found if each.kind == kind]:
            click.echo(click.style(kind, bold=True))
            width = max(len(each.where) for each in lines)
            for each in lines:
                click.echo(f"    {each.where:<{width}}  {each.what}")
            click.echo()
    number = f"{len(found)} difference{'s' * (len(found) != 1)}" if found else "All is as it should be"
    counted = ", ".join(
        f"{count} {kind if count != 1 else kind.removesuffix('s')}" for kind, count in looked_at.items()
    )
    for problem in asyncio.run(_sandbox_problems(settings)):
        click.echo(f"No functions can be run on this machine: {problem}", err=True)
    click.echo(f"{number}: looked at {counted}, in {time.monotonic() - begun:.1f} s.")
    if found:
        sys.exit(1)


async def _examine(settings: Settings) -> tuple[list[Difference], dict[str, int]]:
    """Return what is wrong, and how much was looked at."""
    engines = open_clusters(Catalog.load(settings.catalog), settings)
    storage = open_storage(settings)
    store = Store(settings.storage_url)
    try:
        await check_schema(store)
        told = time.monotonic()

        def progress(done: int) -> None:
            nonlocal told
            if time.monotonic() - told > _SECONDS_OF_SILENCE:
                told = time.monotonic()
                click.echo(f"{done} of {sum(looked_at.values())} looked at", err=True)

        examination = Doctor(store=store, engines=engines, storage=storage, progress=progress)
        looked_at = await examination.count()
        found = [each async for each in examination.differences(now=SystemClock().now())]
        return found, {"clusters": len(engines), **looked_at}
    finally:
        await store.close()


async def _sandbox_problems(settings: Settings) -> Sequence[str]:
    """Return why this machine cannot run functions safely; nothing if it can, or some host does."""
    from controlplane.local.hosts import look_at_sandbox  # noqa: PLC0415 - of use here alone

    store, clock = Store(settings.storage_url), SystemClock()
    try:
        regions = Catalog.load(settings.catalog).regions
        if any([await live_hosts(store, clock, kind=FUNCTIONS, region=region.name) for region in regions]):
            return ()
    finally:
        await store.close()
    return (await look_at_sandbox(settings)).lacking
