"""The server, killed at random moments while orders come in for all engines at once."""

import asyncio
import itertools
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.local.postgres import EmbeddedPostgres
from tests.clusters import Cluster, Refused
from tests.conftest import new_storage
from tests.faults.check import check
from tests.faults.installation import SECONDS, Refusal, Uncertain, new_installation
from tests.faults.process import Launcher
from tests.faults.table import EVERYTHING, Row, Table
from tests.faults.transitions import TRANSITIONS, Life, Step, new_key

KILLS = 100 if EVERYTHING else 6
_ORDERS = [
    transition
    for transition in TRANSITIONS
    if transition.name in {"create", "resize", "new password", "back up", "delete"}
]


@pytest.mark.parametrize("storage", ["sqlite", "postgresql"])
async def test_kills_under_load_lose_nothing(  # noqa: PLR0917 - fixtures
    storage: str, folder: Path, all_clusters: list[Cluster], servers: Launcher, postgres: EmbeddedPostgres, table: Table
) -> None:
    """Each acknowledged order is fulfilled within a bounded time, and at the end no thing is without a row."""
    url = "" if storage == "sqlite" else await new_storage(postgres, "faults_random")
    row = table.row("all", f"at random, {storage}")
    async with new_installation(
        folder / f"random-{storage}", launcher=servers, clusters=all_clusters, database_url=url
    ) as installation:
        over, kept = asyncio.Event(), list[Life]()
        try:
            async with asyncio.TaskGroup() as group:
                for cluster in all_clusters:
                    for number in range(2):
                        group.create_task(_live(Life(installation, cluster, f"worker-{number}"), over, kept, row))
                for _ in range(KILLS):
                    await asyncio.sleep(random.uniform(0.1, 1.0))  # noqa: S311
                    await installation.start_again()
                    row.moments.append("at random")
                over.set()
            await installation.rest()
            await check(installation)
            for life in kept:
                await life.check(size="large")
        except BaseException as error:
            row.lost = repr(error)
            raise


async def _live(first: Life, over: asyncio.Event, kept: list[Life], row: Row) -> None:
    """Let one database after the other live, until it is over; every other is kept."""
    for number in itertools.count():
        life = replace(first, name=f"{first.name}-{first.cluster.engine}-{number}", backups=[])
        is_kept = number % 2 == 0
        for transition in _ORDERS[: len(_ORDERS) - is_kept]:
            life.key = new_key()
            await _again(transition.order, life, Uncertain)
            row.answered += 1
            await _again(transition.check, life, Uncertain, Refusal, Refused, AssertionError)
        if is_kept:
            kept.append(life)
        if over.is_set():
            return


async def _again(step: Step, life: Life, *errors: type[BaseException]) -> None:
    """Take a step once more as long as it fails in one of these ways, within the bounded time."""
    late = time.monotonic() + SECONDS
    while True:
        try:
            return await step(life)
        except errors:
            if time.monotonic() > late:
                raise
        await asyncio.sleep(0.05)
