"""Full disks, of the storage of backups and of a cluster: orders wait for room, and nothing is lost.

Each is a small file system in memory, which is full when it is made smaller. Only root may mount one.
"""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from controlplane.api.v1 import backups_pb2
from tests.clusters import Cluster
from tests.faults import breakable
from tests.faults.check import check
from tests.faults.installation import new_installation
from tests.faults.orders import Order, Place
from tests.faults.process import Launcher
from tests.faults.table import Table
from tests.stack import eventually

_ROOM = 512 << 20  # bytes, taken only as far as they are used
_FULL = "The storage of backups cannot be used: No space left on device."


class Disk:
    """A file system of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fill(self) -> None:
        """Let it have no more room than is used."""
        found = os.statvfs(self._folder)
        self._resize((found.f_blocks - found.f_bfree) * found.f_frsize)

    def make_room(self) -> None:
        """Let it have room again."""
        self._resize(_ROOM)

    def _resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self._folder], check=True)  # noqa: S607


@asynccontextmanager
async def _disk(folder: Path) -> AsyncIterator[Disk]:
    """Mount a file system in a new folder."""
    folder.mkdir(mode=0o711)  # noqa: ASYNC240
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_ROOM},mode=711", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:  # noqa: ASYNC221
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)  # noqa: ASYNC221, S607


async def test_backups_wait_for_room(
    folder: Path, all_clusters: list[Cluster], servers: Launcher, table: Table
) -> None:
    """While the storage of backups is full, they wait and say so, and all other orders are fulfilled."""
    well = all_clusters[2]
    with table.losing("disks", "the storage of backups is full") as row:
        async with (
            new_installation(folder / "disk", launcher=servers, clusters=all_clusters[:3], scope="cluster") as there,
            _disk(folder / "disk/backups") as disk,
        ):
            kinds = ("back up", "restore a backup", "resize", "delete")
            place = Place(there, all_clusters[:2], well, kinds=kinds)
            await place.begin()
            orders = [order for half in await place.next_turn() for order in half]
            disk.fill()
            row.moments.append("full")
            for order in orders:
                await order.give()
            row.answered += len(orders)
            for order in orders:
                await eventually(lambda order=order: _is_as_far_as_it_can_be(place, order))  # type: ignore[misc]
            disk.make_room()
            await there.rest()
            await asyncio.gather(*(order.check() for order in orders))
            await check(there)


async def test_a_cluster_that_is_full_delays_its_orders(
    folder: Path, all_clusters: list[Cluster], servers: Launcher, table: Table
) -> None:
    """While a PostgreSQL is full, what needs room there waits, and all is as ordered once it has some again."""
    with table.losing("disks", "a cluster is full") as row:
        async with (
            _disk(folder / "full") as disk,
            breakable.postgresql(folder / "full") as full,
            new_installation(
                folder / "on-full", launcher=servers, clusters=[full.cluster, all_clusters[1]], scope="cluster"
            ) as there,
        ):
            place = Place(there, [full.cluster], all_clusters[1])
            await place.begin()
            before, meanwhile = await place.next_turn()
            orders = [*before, *meanwhile]
            disk.fill()
            row.moments.append("full")
            for order in orders:
                await order.give()
            row.answered += len(orders)
            await place.is_served_elsewhere()
            wanting = {order.name for order in orders if order.kind.name in {"create", "restore a backup"}}
            await place.until(wanting, lambda database: database.progress.waiting_on == "cluster local-postgresql")
            disk.make_room()
            await full.stop()  # a PostgreSQL that cannot write its checkpoint has ended by itself, sooner or later
            await full.start()
            await there.rest()
            await asyncio.gather(*(order.check() for order in orders))
            await check(there)


async def _is_as_far_as_it_can_be(place: Place, order: Order) -> bool:
    """Return whether a backup waits for room; of other orders, whether they are fulfilled."""
    if order.kind.name == "back up":
        answer = await order.life.ask("ListBackups", backups_pb2.ListBackupsRequest(name=order.name))
        progress = answer.backups[-1].progress
        return bool(progress.waiting_on == "the storage of backups" and progress.last_error == _FULL)
    databases = await place.databases()
    if order.kind.name == "delete":
        return order.name not in databases
    return databases[order.name].observed_generation == databases[order.name].generation
