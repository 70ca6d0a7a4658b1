"""Turns: who goes first, and what takes long keeps nothing waiting that it has nothing to do with."""

from sqlmodel import col, select

from controlplane.backups.model import Backup
from controlplane.backups.provisioner import BackupProvisioner
from controlplane.databases.engines.engine import ClusterUnavailable
from controlplane.databases.model import PROVISIONING
from tests.reconcile.conftest import LOOK_EVERY, Works
from tests.stack import eventually


async def test_one_kind_does_not_hold_up_another(works: Works) -> None:
    """While all the databases that may be worked on at once take long, a backup is written all the same."""
    await works.order("db_1")
    long = [f"db_{number}" for number in range(2, BackupProvisioner.at_once + 3)]
    reconciler = works.reconciler(concurrency=BackupProvisioner.at_once)
    reconciler.start()
    await works.until(lambda row: row.state == "ready")
    gate = works.engine.hold()
    for name in long:
        await works.order(name)
    reconciler.wake()
    for _ in ("db_1", *long[:-1]):
        await works.entered()
    works.engine.hold()  # another gate, which opens for those who come from now on
    works.engine.release()
    backup_id = await works.order_backup("db_1")
    reconciler.wake()

    async def completed() -> bool:
        rows = await works.store.fetch(select(Backup.state).where(col(Backup.id) == backup_id))
        return bool(rows[0].state == "completed")

    await eventually(completed)
    held = [await works.find(name) for name in long]
    assert {row and row.state for row in held} == {PROVISIONING}
    assert [name for what, name in works.engine.calls if what == "apply"] == ["db_1", *long[:-1]]
    gate.set()


async def test_orders_go_before_looks(works: Works) -> None:
    """What was ordered last goes before what has been due for another look for long."""
    for name in ("db_1", "db_2"):
        await works.order(name)
    before = works.reconciler()
    before.start()
    for name in ("db_1", "db_2"):
        await works.until(lambda row: row.state == "ready", name)
    await before.stop()
    works.engine.calls.clear()
    works.clock.advance(LOOK_EVERY.total_seconds())
    await works.order("db_3")
    works.reconciler(concurrency=1).start()
    for name in ("db_1", "db_2"):
        await works.until(lambda row: row.observed_at == works.clock.now(), name)
    assert works.engine.calls[0] == ("apply", "db_3")


async def test_a_silent_cluster_occupies_one_slot(works: Works) -> None:
    """While one asks whether a cluster is back, the others are told so at once; another cluster's orders are done."""
    works.engine.failure = ClusterUnavailable("It does not answer.")
    silent = [f"db_{number}" for number in range(6)]
    for name in silent:
        await works.order(name)
    reconciler = works.reconciler(concurrency=2)
    reconciler.start()
    for name in silent:
        await works.until(lambda row: row.attempts == 1, name)
    asked = len(works.engine.calls)
    works.engine.hold()
    works.clock.advance(60)
    for number in range(10):
        await works.order(f"db_1{number}", cluster="other")
    reconciler.wake()
    for number in range(10):
        await works.until(lambda row: row.state == "ready", f"db_1{number}")
    told = [row for name in silent if (row := await works.find(name)) is not None and row.attempts == 2]
    assert {(row.waiting_on, row.last_error) for row in told} == {
        ("cluster local-postgresql", "The cluster does not answer.")
    }
    assert (len(told), len(works.engine.calls)) == (len(silent) - 1, asked + 1)
    works.engine.failure = None
    works.engine.release()

    async def has_ended() -> bool:
        return not await works.leased()

    await eventually(has_ended)  # or its lease would have run out
    works.clock.advance(60)
    reconciler.wake()
    for name in silent:
        await works.until(lambda row: row.state == "ready", name)
