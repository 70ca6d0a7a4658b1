"""Orders that get in each other's way, sent dozens of times at once to two servers: the end is one of those allowed."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from controlplane.api.v1 import backups_pb2, databases_pb2
from controlplane.local.postgres import EmbeddedPostgres
from tests.clusters import Cluster
from tests.conftest import new_storage
from tests.faults.check import check
from tests.faults.installation import Installation, Refusal, new_installation
from tests.faults.orders import KINDS
from tests.faults.other import Stubs, other_server
from tests.faults.process import Launcher
from tests.faults.table import Table
from tests.faults.transitions import Life, begin, new_key

_TIMES = 24
# Too early, too late, and not for both of two: no other answer is right, least of all a 500.
_REFUSALS = {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED, grpc.StatusCode.ALREADY_EXISTS}


@dataclass
class Race:
    """A database, and the doors of two servers. `answered` counts what was not refused."""

    life: Life
    doors: tuple[Stubs, Stubs]
    answered: int = 0

    async def at_once(self, *requests: Any) -> list[Any]:
        """Send requests dozens of times, all at once and to both servers; return the answers to what was done."""
        calls = [self._ask(self.doors[turn % 2], request) for turn in range(_TIMES) for request in requests]
        answers = [answer for answer in await asyncio.gather(*calls) if answer is not None]
        self.answered += len(answers)
        return answers

    async def _ask(self, door: Stubs, request: Any) -> Any:
        name = type(request).__name__.removesuffix("Request")
        stub = next(getattr(stub, name) for stub in door if hasattr(stub, name))
        try:
            return await self.life.installation.ask(stub, request)
        except Refusal as refusal:
            if refusal.status not in _REFUSALS:
                raise
            return None

    async def order(self, kind: str) -> None:
        """Order something once."""
        self.life.key = new_key()
        await KINDS[kind].order(self.life)

    def copy(self, name: str = "copy") -> Life:
        """Return the life of a database that the backup is restored into."""
        return replace(self.life, name=f"{self.life.name}-{name}", backups=[])

    def deletion(self) -> databases_pb2.DeleteDatabaseRequest:
        """Return the request that deletes the database."""
        return databases_pb2.DeleteDatabaseRequest(name=self.life.name)

    def deletion_of_backup(self) -> backups_pb2.DeleteBackupRequest:
        """Return the request that deletes its backup."""
        return backups_pb2.DeleteBackupRequest(name=self.life.name, id=self.life.backups[0])

    def restore(self, name: str) -> backups_pb2.RestoreBackupRequest:
        """Return the request that restores its backup."""
        wanted = backups_pb2.RestoreDatabase(name=self.copy(name).name)
        return backups_pb2.RestoreBackupRequest(name=self.life.name, id=self.life.backups[0], database=wanted)

    async def rest(self) -> None:
        """Wait until all is done."""
        await self.life.installation.rest()


async def _create_delete(race: Race) -> None:
    await race.order("create")
    await race.at_once(race.deletion())
    await race.rest()
    await _is_gone(race.life)


async def _back_up_delete(race: Race) -> None:
    await begin(race.life)
    await race.order("back up")
    await race.at_once(race.deletion())
    await race.rest()
    await _is_gone(race.life)


async def _back_up_resize(race: Race) -> None:
    await begin(race.life)
    await race.order("back up")
    sizes = [databases_pb2.UpdateDatabase(sku=race.life.sku(size)) for size in ("large", "small")]
    await race.at_once(*(databases_pb2.UpdateDatabaseRequest(name=race.life.name, database=size) for size in sizes))
    await race.rest()
    await race.life.check()
    await race.life.check_backups(2)


async def _restore_delete_source(race: Race) -> None:
    await begin(race.life)
    await race.order("restore a backup")
    await race.at_once(race.deletion())
    await race.rest()
    await _is_gone(race.life)
    await race.copy().check()


async def _restore_delete_copy(race: Race) -> None:
    await begin(race.life)
    await race.order("restore a backup")
    await race.at_once(databases_pb2.DeleteDatabaseRequest(name=race.copy().name))
    await race.rest()
    await _is_gone(race.copy())
    await race.life.check()


async def _restore_stop_copy(race: Race) -> None:
    await begin(race.life)
    await race.order("restore a backup")
    stopped = await race.at_once(databases_pb2.StopDatabaseRequest(name=race.copy().name))
    await race.rest()
    await race.copy().check(status="stopped" if stopped else "ready")


async def _restore_twice(race: Race) -> None:
    await begin(race.life)
    answers = await race.at_once(race.restore("one"), race.restore("two"))
    assert sorted(answer.name for answer in answers) == [race.copy("one").name, race.copy("two").name]
    await race.rest()
    await race.copy("one").check()
    await race.copy("two").check()


async def _restore_delete_backup(race: Race) -> None:
    await begin(race.life)
    await race.order("restore a backup")
    await race.at_once(race.deletion_of_backup())
    await race.rest()
    await race.life.check_backups(0)
    copy = race.copy()
    found = await copy.ask("GetDatabase", databases_pb2.GetDatabaseRequest(name=copy.name))
    if found.status == "failed":
        assert "backup" in found.progress.last_error
        await copy.undisturbed(KINDS["delete"].order, _is_gone)
    else:
        await copy.check()


async def _verify_delete_backup(race: Race) -> None:
    await begin(race.life)
    await race.order("verify a backup")
    await race.at_once(race.deletion_of_backup())
    await race.rest()
    await race.life.check()
    await race.life.check_backups(0)


async def _delete_undelete(race: Race) -> None:
    await begin(race.life)
    await race.at_once(race.deletion(), databases_pb2.UndeleteDatabaseRequest(name=race.life.name))
    await race.rest()
    before = race.life.id
    await race.at_once(databases_pb2.UndeleteDatabaseRequest(name=race.life.name))
    await race.rest()
    await race.life.check()
    assert race.life.id == before


async def _passwords(race: Race) -> None:
    await begin(race.life)
    old = race.life.connection
    answers = await race.at_once(databases_pb2.RotateDatabasePasswordRequest(name=race.life.name))
    assert len(answers) == _TIMES
    await race.rest()
    await race.life.check()
    assert race.life.connection.password in {answer.password for answer in answers}
    for other in (old, *answers[:3], *answers[-3:]):
        if other.password != race.life.connection.password:
            await race.life.check_refused(other)


RACES: dict[str, Callable[[Race], Awaitable[None]]] = {
    "create, delete": _create_delete,
    "back up, delete": _back_up_delete,
    "back up, resize": _back_up_resize,
    "restore, delete the source": _restore_delete_source,
    "restore, delete the copy": _restore_delete_copy,
    "restore, stop the copy": _restore_stop_copy,
    "restore twice": _restore_twice,
    "restore, delete the backup": _restore_delete_backup,
    "verify, delete the backup": _verify_delete_backup,
    "delete, undelete": _delete_undelete,
    "new passwords": _passwords,
}


@pytest.fixture(scope="module")
async def doors(
    folder: Path, all_clusters: list[Cluster], servers: Launcher, postgres: EmbeddedPostgres
) -> AsyncIterator[tuple[Installation, tuple[Stubs, Stubs]]]:
    """An installation with a PostgreSQL and a MariaDB, and the doors of its server and of another beside it."""
    url = await new_storage(postgres, "faults_races")
    async with (
        new_installation(
            folder / "races", launcher=servers, clusters=all_clusters[:2], database_url=url, scope="cluster"
        ) as there,
        other_server(there, servers) as other,
    ):
        yield there, ((there.databases, there.backups), other)


@pytest.mark.parametrize("name", RACES)
async def test_a_race_ends_as_one_of_its_orders(
    doors: tuple[Installation, tuple[Stubs, Stubs]], name: str, table: Table
) -> None:
    """Whatever comes first, each request is done or refused, all comes to rest, and nothing is left over."""
    there, both = doors
    number = list(RACES).index(name)
    with table.losing("races", name) as row:
        races = [Race(Life(there, cluster, f"{engine}-{number}"), both) for engine, cluster in there.clusters.items()]
        await asyncio.gather(*(RACES[name](race) for race in races))
        row.moments += ["race"] * len(races)
        row.answered += sum(race.answered for race in races)
        await check(there)


async def _is_gone(life: Life) -> None:
    assert life.name not in {row["name"] for row in await life.installation.rows("databases")}
