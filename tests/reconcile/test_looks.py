"""When it looks for what is due: at what makes something due, and not only as time goes by."""

import pytest
from sqlmodel import select

from controlplane.backups.model import COMPLETED, Backup
from controlplane.databases.model import Database
from tests.reconcile.conftest import Works
from tests.stack import eventually

pytestmark = pytest.mark.usefixtures("no_looks")


async def test_there_is_room_again(works: Works) -> None:
    """What there was no room for is begun as soon as there is."""
    names = [f"db_{number}" for number in range(10)]
    for name in names:
        await works.order(name)
    works.reconciler(concurrency=2).start()
    for name in names:
        await works.until(lambda row: row.state == "ready", name)


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
