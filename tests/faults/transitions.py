"""What a database can be ordered to become, and what is true once it has; killed at every moment in `test_kills.py`.

A new transition is an entry of `TRANSITIONS`.
"""

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import grpc
from sqlalchemy import bindparam, text

from controlplane.api.v1 import backups_pb2, databases_pb2
from controlplane.api.v1.databases_pb2 import DatabaseConnection
from controlplane.sql import UtcDateTime
from tests.clusters import Cluster, Refused
from tests.faults.installation import Installation, Refusal


def new_key() -> str:
    """Return an `Idempotency-Key` that was never used."""
    return secrets.token_hex(8)


@dataclass
class Life:
    """A database from its order to its end, as its customer knows it.

    `word` is what he wrote last, `connection` how he last got in, `backups` the ids of those that are completed. `key`
    is the `Idempotency-Key` of the order that he is at: sent again it does nothing twice.
    """

    installation: Installation
    cluster: Cluster
    name: str
    id: str = ""
    key: str = field(default_factory=new_key)
    word: str | None = None
    connection: DatabaseConnection = field(default_factory=DatabaseConnection)
    backups: list[str] = field(default_factory=list)

    def sku(self, size: str) -> str:
        """Return the name of a size."""
        return f"{'ch' if self.cluster.engine == 'clickhouse' else 'db'}-{size}"

    async def ask(self, method: str, request: Any) -> Any:
        """Call a method of either service by its name."""
        stub = self.installation.backups if "Backup" in method else self.installation.databases
        return await self.installation.ask(getattr(stub, method), request, key=self.key)

    async def begin_order(self) -> None:
        """Be at a new order."""
        self.key = new_key()

    async def undisturbed(self, order: "Step", check: "Step") -> None:
        """Go through a transition that is not tested now."""
        await self.begin_order()
        await order(self)
        await self.installation.rest()
        await check(self)

    async def check(self, *, status: str = "ready", size: str | None = None) -> None:
        """Check the database's state, and that the customer finds what he wrote; or is kept out, if it is stopped."""
        found = await self.ask("GetDatabase", databases_pb2.GetDatabaseRequest(name=self.name))
        assert (found.status, found.observed_generation) == (status, found.generation), found
        assert size is None or found.sku == self.sku(size), found
        self.id = found.id
        self.connection = await self.ask(
            "GetDatabaseConnection", databases_pb2.GetDatabaseConnectionRequest(name=self.name)
        )
        if status == "ready":
            assert await self.cluster.read(self.connection) == self.word
        else:
            await self.check_refused(self.connection)

    async def check_refused(self, connection: DatabaseConnection) -> None:
        """Check that nobody gets in this way."""
        try:
            await self.cluster.read(connection)
        except Refused:
            return
        raise AssertionError("the old way in still opens")

    async def check_backups(self, count: int | None = None) -> Sequence[backups_pb2.Backup]:
        """Check that all backups are completed, and that there are so many; note their ids, and return them."""
        answer = await self.ask("ListBackups", backups_pb2.ListBackupsRequest(name=self.name))
        assert {backup.status for backup in answer.backups} <= {"completed"}, answer
        assert count is None or len(answer.backups) == count, answer
        self.backups = [backup.id for backup in answer.backups]
        return list(answer.backups)

    async def let_time_pass(self, statement: str) -> None:
        """Make due what time would; `:id` is the database's id, `:now` the moment."""
        when = text(statement).bindparams(bindparam("now", datetime.now(UTC), type_=UtcDateTime()), id=self.id)
        async with self.installation.store.session() as session:
            await session.execute(when)
            await session.commit()


Step = Callable[[Life], Awaitable[None]]
LifeT = TypeVar("LifeT")


@dataclass(frozen=True, kw_only=True)
class Transition(Generic[LifeT]):
    """One order and its fulfilment; a database is ready before it, and has a word in it and a backup.

    `order` may be sent again if its answer did not come. `check` raises AssertionError unless what was ordered is true.
    What comes before and behind is not disturbed: `prepare` brings the database to where it starts, `bring_back` to
    where it was. With `is_own` it is a life of its own each time, which has not begun. Where the code is also that of
    another transition, one moment in `stride` is enough.
    """

    name: str
    order: Callable[[LifeT], Awaitable[None]]
    check: Callable[[LifeT], Awaitable[None]]
    prepare: Callable[[LifeT], Awaitable[None]] | None = None
    bring_back: Callable[[LifeT], Awaitable[None]] | None = None
    is_own: bool = False
    stride: int = 1


async def begin(life: Life) -> None:
    """Let a life begin."""
    await life.undisturbed(_create, _is_created)
    await life.undisturbed(_back_up, _is_backed_up)


async def _create(life: Life) -> None:
    wanted = databases_pb2.CreateDatabase(name=life.name, engine=life.cluster.engine, sku=life.sku("small"))
    await life.ask("CreateDatabase", databases_pb2.CreateDatabaseRequest(database=wanted))


async def _is_created(life: Life) -> None:
    await life.check(size="small")
    life.word = f"{life.name} was here"
    await life.cluster.write(life.connection, life.word)


async def _resize(life: Life) -> None:
    change = databases_pb2.UpdateDatabase(sku=life.sku("large"))
    await life.ask("UpdateDatabase", databases_pb2.UpdateDatabaseRequest(name=life.name, database=change))


async def _is_large(life: Life) -> None:
    await life.check(size="large")


async def _shrink(life: Life) -> None:
    change = databases_pb2.UpdateDatabase(sku=life.sku("small"))
    await life.ask("UpdateDatabase", databases_pb2.UpdateDatabaseRequest(name=life.name, database=change))


async def _have_small(life: Life) -> None:
    await life.undisturbed(_shrink, _is_ready)


async def _stop(life: Life) -> None:
    await life.ask("StopDatabase", databases_pb2.StopDatabaseRequest(name=life.name))


async def _is_stopped(life: Life) -> None:
    await life.check(status="stopped")


async def _have_stopped(life: Life) -> None:
    await life.undisturbed(_stop, _is_stopped)


async def _start(life: Life) -> None:
    await life.ask("StartDatabase", databases_pb2.StartDatabaseRequest(name=life.name))


async def _have_started(life: Life) -> None:
    await life.undisturbed(_start, _is_ready)


async def _rotate_password(life: Life) -> None:
    await life.ask("RotateDatabasePassword", databases_pb2.RotateDatabasePasswordRequest(name=life.name))


async def _has_new_password(life: Life) -> None:
    # Once more, and answered as before.
    answer = await life.ask("RotateDatabasePassword", databases_pb2.RotateDatabasePasswordRequest(name=life.name))
    old = life.connection
    assert answer.password != old.password
    await life.check_refused(old)
    await life.check()
    assert life.connection.password == answer.password


async def _is_ready(life: Life) -> None:
    await life.check()


async def _have_failed(life: Life) -> None:
    """Let the database have failed, as when its time ran out on a cluster that did not answer."""
    await life.let_time_pass(
        "UPDATE databases SET state = 'failed', last_error = 'too late', next_attempt_at = NULL, generation ="
        " generation + 1 WHERE id = :id AND :now IS NOT NULL"
    )


async def _retry(life: Life) -> None:
    await life.ask("RetryDatabase", databases_pb2.RetryDatabaseRequest(name=life.name))


async def _back_up(life: Life) -> None:
    await life.ask("CreateBackup", backups_pb2.CreateBackupRequest(name=life.name))


async def _is_backed_up(life: Life) -> None:
    await life.check()
    await life.check_backups(len(life.backups) + 1)


async def _have_two_backups(life: Life) -> None:
    await life.undisturbed(_back_up, _is_backed_up)


async def _have_one_backup(life: Life) -> None:
    while len(life.backups) > 1:
        await life.undisturbed(_delete_backup, _has_deleted_backup)


async def _have_schedule(life: Life) -> None:
    async def order(life: Life) -> None:
        change = databases_pb2.UpdateDatabase(
            backup_schedule="daily", backup_retention=databases_pb2.BackupRetention(count=1)
        )
        await life.ask("UpdateDatabase", databases_pb2.UpdateDatabaseRequest(name=life.name, database=change))

    await life.undisturbed(order, _is_ready)


async def _back_up_by_schedule(life: Life) -> None:
    await life.let_time_pass("UPDATE databases SET next_backup_at = :now, next_attempt_at = :now WHERE id = :id")


async def _is_backed_up_by_schedule(life: Life) -> None:
    """Check that there is another scheduled backup, and that it has taken the place of the one before."""
    await life.check()
    before = set(life.backups)
    found = await life.check_backups()
    scheduled = [backup.id for backup in found if backup.trigger == "scheduled"]
    assert len(scheduled) == 1
    assert scheduled[0] not in before


async def _have_no_schedule(life: Life) -> None:
    async def order(life: Life) -> None:
        change = databases_pb2.UpdateDatabase(backup_schedule="none")
        await life.ask("UpdateDatabase", databases_pb2.UpdateDatabaseRequest(name=life.name, database=change))

    await life.undisturbed(order, _is_ready)


async def _look_again(life: Life) -> None:
    await life.let_time_pass("UPDATE databases SET observed_at = NULL, next_attempt_at = :now WHERE id = :id")


async def _was_looked_at(life: Life) -> None:
    await life.check()
    found = await life.ask("GetDatabase", databases_pb2.GetDatabaseRequest(name=life.name))
    assert found.HasField("observed_at")


async def _verify(life: Life) -> None:
    await life.let_time_pass("UPDATE backups SET verified_at = NULL, next_attempt_at = :now WHERE database_id = :id")


async def _is_verified(life: Life) -> None:
    await life.check()
    *_, newest = await life.check_backups(len(life.backups))
    assert newest.HasField("verified_at")
    assert not newest.HasField("verification_error")


async def _restore(life: Life) -> None:
    wanted = backups_pb2.RestoreDatabase(name=f"{life.name}-copy")
    await life.ask(
        "RestoreBackup", backups_pb2.RestoreBackupRequest(name=life.name, id=life.backups[-1], database=wanted)
    )


async def _is_restored(life: Life) -> None:
    await life.check()
    copy = replace(life, name=f"{life.name}-copy", backups=[])
    await copy.check()
    assert copy.id != life.id
    await copy.undisturbed(_delete, _is_deleted)


async def _delete_backup(life: Life) -> None:
    await _unless_gone(life.ask("DeleteBackup", backups_pb2.DeleteBackupRequest(name=life.name, id=life.backups[0])))


async def _has_deleted_backup(life: Life) -> None:
    await life.check()
    kept = life.backups[1:]
    await life.check_backups(len(kept))
    assert life.backups == kept


async def _delete(life: Life) -> None:
    await _unless_gone(life.ask("DeleteDatabase", databases_pb2.DeleteDatabaseRequest(name=life.name)))


async def _is_deleted(life: Life) -> None:
    try:
        await life.ask("GetDatabase", databases_pb2.GetDatabaseRequest(name=life.name))
    except Refusal as refusal:
        if refusal.status != grpc.StatusCode.NOT_FOUND:
            raise
    else:
        raise AssertionError("the database is still there")
    await life.check_refused(life.connection)
    life.backups = life.backups[-1:]


async def _undelete(life: Life) -> None:
    await life.ask("UndeleteDatabase", databases_pb2.UndeleteDatabaseRequest(name=life.name))


async def _is_undeleted(life: Life) -> None:
    known = life.id, life.connection.password
    await life.check()
    assert (life.id, life.connection.password) == known
    await life.check_backups(1)


async def _have_undeleted(life: Life) -> None:
    await life.undisturbed(_undelete, _is_undeleted)


async def _have_deleted(life: Life) -> None:
    await life.undisturbed(_delete, _is_deleted)


async def _have_lived(life: Life) -> None:
    await begin(life)
    await life.undisturbed(_delete, _is_deleted)


async def _forget(life: Life) -> None:
    for table, row, moment in (("backups", "database_id", "expires_at"), ("databases", "id", "undelete_until")):
        await life.let_time_pass(f"UPDATE {table} SET {moment} = :now, next_attempt_at = :now WHERE {row} = :id")  # noqa: S608


async def _is_forgotten(life: Life) -> None:
    assert life.id not in {row["id"] for row in await life.installation.rows("databases")}
    assert life.id not in {row["database_id"] for row in await life.installation.rows("backups")}


async def _unless_gone(order: Awaitable[Any]) -> None:
    """Send an order to delete, which may have been fulfilled already."""
    try:
        await order
    except Refusal as refusal:
        if refusal.status != grpc.StatusCode.NOT_FOUND:
            raise


TRANSITIONS = (
    Transition(name="create", order=_create, check=_is_created, bring_back=_have_deleted, is_own=True),
    Transition(name="resize", order=_resize, check=_is_large, bring_back=_have_small),
    Transition(name="stop", order=_stop, check=_is_stopped, bring_back=_have_started),
    Transition(name="start", prepare=_have_stopped, order=_start, check=_is_ready),
    Transition(name="new password", order=_rotate_password, check=_has_new_password),
    Transition(name="retry", prepare=_have_failed, order=_retry, check=_is_ready),
    Transition(name="look again", order=_look_again, check=_was_looked_at),
    Transition(name="back up", order=_back_up, check=_is_backed_up, bring_back=_have_one_backup),
    Transition(
        name="back up by schedule",
        prepare=_have_schedule,
        order=_back_up_by_schedule,
        check=_is_backed_up_by_schedule,
        bring_back=_have_no_schedule,
        stride=3,
    ),
    Transition(name="verify a backup", order=_verify, check=_is_verified, stride=3),
    Transition(name="restore a backup", order=_restore, check=_is_restored),
    Transition(name="delete a backup", prepare=_have_two_backups, order=_delete_backup, check=_has_deleted_backup),
    Transition(name="delete", order=_delete, check=_is_deleted, bring_back=_have_undeleted),
    Transition(name="undelete", prepare=_have_deleted, order=_undelete, check=_is_undeleted, stride=3),
    Transition(name="forget", prepare=_have_lived, order=_forget, check=_is_forgotten, is_own=True, stride=3),
)
