"""When it looks for what is due: at what makes something due, and not only as time goes by."""

import pytest
from sqlmodel import select

from controlplane.backups.model import COMPLETED, Backup
from controlplane.databases.model import PROVISIONING, Database
from controlplane.reconcile import loop
from controlplane.reconcile.model import DELETING
from tests.reconcile.conftest import Works
from tests.stack import eventually


@pytest.fixture(autouse=True)
def _time_makes_nothing_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_LOOK_EVERY", 3600.0)


async def test_there_is_room_again(works: Works) -> None:
    """What there was no room for is begun as soon as there is."""
    names = [f"db_{number}" for number in range(10)]
    for name in names:
        await works.order(name)
    works.reconciler(concurrency=2).start()
    for name in names:
        await works.until(lambda row: row.state == "ready", name)


async def test_a_step_was_superseded(works: Works) -> None:
    """What was ordered during a step is begun as soon as that has ended, whoever took the order."""
    works.engine.hold()
    await works.order()
    works.reconciler().start()
    await works.entered()
    await works.order_again(PROVISIONING)
    works.engine.release()
    await works.until(lambda row: row.observed_generation == 2)


async def test_a_step_was_given_up(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion for whose sake a long step was given up is begun at once."""
    monkeypatch.setattr(loop, "_RENEW_EVERY", 0.02)
    works.engine.hold()
    await works.order()
    works.reconciler().start()
    await works.entered()
    works.engine.hold()  # another gate, which opens for those who come from now on
    works.engine.release()
    await works.order_again(DELETING)
    await works.until_gone()


async def test_a_step_has_ordered_something(works: Works) -> None:
    """A scheduled backup is begun as soon as the look at its database has ordered it."""
    await works.order()
    reconciler = works.reconciler()
    reconciler.start()
    await works.until(lambda row: row.state == "ready")
    async with works.store.session() as session:
        row = await session.get_one(Database, "db_1")
        row.backup_schedule = "hourly"
        row.next_backup_at = row.next_attempt_at = works.clock.now()
        await session.commit()
    reconciler.wake()

    async def completed() -> bool:
        rows = await works.store.fetch(select(Backup.state))
        return [row.state for row in rows] == [COMPLETED]

    await eventually(completed)
