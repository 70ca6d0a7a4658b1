"""Orders whose step is taken by the process that took the order: their transaction has the lease."""

import asyncio

from controlplane.databases.model import PROVISIONING, UPDATING
from controlplane.reconcile.lease import LEASE
from tests.reconcile.conftest import Works


async def test_the_lease_comes_with_the_order(works: Works) -> None:
    """What is ordered is leased as soon as it can be seen, so nobody else takes its step; and it is taken at once."""
    mine, other = works.reconciler(), works.reconciler()
    other.start()
    works.engine.hold()
    await works.order(taken_by=mine)
    assert await works.leased() == ["db_1"]
    await works.entered()
    other.wake()
    works.engine.release()
    row = await works.until(lambda row: row.state == "ready")
    assert (row.lease_token, row.observed_generation, row.attempts) == (None, 1, 0)
    assert works.engine.calls == [("apply", "db_1")]


async def test_an_order_that_is_not_committed_is_none(works: Works) -> None:
    """When an order comes to nothing no step is taken, and the room for one is free again."""
    reconciler = works.reconciler(concurrency=2)
    await works.order("db_1", taken_by=reconciler, is_committed=False)
    assert await works.find("db_1") is None
    await works.order("db_2", taken_by=reconciler)
    await works.until(lambda row: row.state == "ready", "db_2")
    assert works.engine.calls == [("apply", "db_2")]


async def test_half_of_the_room_is_for_what_waits(works: Works) -> None:
    """Orders take half of the room at once; the next of them is found by looking, after what has waited for longer."""
    reconciler = works.reconciler(concurrency=4)
    works.engine.hold()
    await works.order("db_1")
    for name in ("db_2", "db_3", "db_4"):
        await works.order(name, taken_by=reconciler)
    assert await works.leased() == ["db_2", "db_3"]
    reconciler.start()
    for _ in range(4):
        await works.entered()
    assert works.engine.calls[2:] == [("apply", "db_1"), ("apply", "db_4")]
    works.engine.release()
    for name in ("db_1", "db_2", "db_3", "db_4"):
        await works.until(lambda row: row.state == "ready", name)


async def test_what_is_held_is_not_taken(works: Works) -> None:
    """An order on a row whose step is under way leaves the lease to that, and is done by whoever looks next."""
    mine, other = works.reconciler(), works.reconciler()
    gate = works.engine.hold()
    await works.order(taken_by=other)
    await works.entered()
    before = await works.find()
    await works.order_again(UPDATING, sku="db-s-1vcpu-2gb", taken_by=mine)
    after = await works.find()
    assert before is not None
    assert after is not None
    assert (after.lease_token, after.state) == (before.lease_token, UPDATING)
    works.engine.release()
    gate.set()
    mine.start()
    row = await works.until(lambda row: row.state == "ready")
    assert (row.generation, row.observed_generation) == (2, 2)


async def test_a_process_that_stops_takes_nothing_more(works: Works) -> None:
    """What it has taken it ends before it stops, or hands back; what is ordered meanwhile has no lease."""
    reconciler = works.reconciler()
    reconciler.start()
    works.engine.hold()
    await works.order("db_1", taken_by=reconciler)
    await works.entered()
    stopping = asyncio.create_task(reconciler.stop())
    await asyncio.sleep(0)
    await works.order("db_2", taken_by=reconciler)
    works.engine.release()
    await stopping
    assert await works.leased() == []
    first, second = await works.find("db_1"), await works.find("db_2")
    assert first is not None
    assert second is not None
    assert (first.state, second.state) == ("ready", PROVISIONING)


async def test_a_process_that_dies_with_an_order_holds_it_for_a_lease(works: Works) -> None:
    """An order whose process died right after the commit is done by another one, once the lease has run out."""
    await works.order(taken_by=works.reconciler(), is_committed=True)
    await works.until(lambda row: row.state == "ready")
    works.engine.calls.clear()
    dead = works.reconciler()
    async with works.store.session() as session:
        row = await works.find()
        assert row is not None
        row.order(UPDATING, now=works.clock.now(), within=LEASE, waiting_on="cluster local-postgresql")
        dead.take(row, asyncio.get_running_loop().create_future())  # nobody will ever say that it is committed
        await session.merge(row)
        await session.commit()
    other = works.reconciler()
    other.start()
    assert await works.leased() == ["db_1"]
    works.clock.advance(LEASE.total_seconds() + 1)
    other.wake()
    await works.until(lambda row: row.state == "ready")
    assert works.engine.calls == [("apply", "db_1")]
