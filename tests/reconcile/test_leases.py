"""Leases: who takes a step, and whose outcome counts."""

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import update
from sqlmodel import col, select

from controlplane.databases.model import PROVISIONING, Database
from controlplane.reconcile import loop
from controlplane.reconcile.lease import LEASE, check_lease
from controlplane.reconcile.model import DELETING
from controlplane.reconcile.step import NotYet
from tests.reconcile.conftest import LOOK_EVERY, Works
from tests.stack import eventually

PAST_LEASE = LEASE.total_seconds() + 1


async def test_what_is_ordered_is_made(works: Works) -> None:
    """A due row is stepped and settled; it is looked at again in a few seconds, then at its time, and not before."""
    await works.order()
    reconciler = works.reconciler()
    reconciler.start()
    row = await works.until(lambda row: row.state == "ready")
    assert (row.generation, row.observed_generation, row.attempts, row.lease_token) == (1, 1, 0, None)
    assert (row.deadline_at, row.waiting_on, row.last_error) == (None, None, None)
    steps = [("apply", "db_1")]
    for wait in (timedelta(seconds=5), LOOK_EVERY, LOOK_EVERY):
        again = works.clock.now() + wait
        assert row.next_attempt_at == again
        works.clock.advance((wait - timedelta(seconds=1)).total_seconds())
        reconciler.wake()
        await asyncio.sleep(0.05)
        assert works.engine.calls == steps
        works.clock.advance(1)
        reconciler.wake()
        row = await works.until(lambda row, again=again: row.observed_at == again)  # type: ignore[misc]
        steps += [("apply", "db_1"), ("observe", "db_1")]
        assert works.engine.calls == steps
        assert (row.state, row.generation, row.observed_generation) == ("ready", 1, 1)


async def test_a_leased_row_is_left_alone(works: Works) -> None:
    """While one process holds the lease, no other takes a step, however often it looks."""
    works.engine.hold()
    await works.order()
    works.reconciler().start()
    await works.entered()
    other = works.reconciler()
    other.start()
    for _ in range(5):
        other.wake()
        await asyncio.sleep(0.02)
    assert works.engine.calls == [("apply", "db_1")]


async def test_an_outcome_without_the_lease_is_not_applied(works: Works) -> None:
    """A process that was paused for longer than its lease changes nothing: whoever has the lease now decides."""
    paused = works.engine.hold()
    await works.order()
    works.reconciler().start()
    await works.entered()
    before = await works.find()
    assert before is not None
    works.engine.hold()
    works.clock.advance(PAST_LEASE)
    works.reconciler().start()
    await works.entered()
    paused.set()
    await asyncio.sleep(0.2)
    row = await works.find()
    assert row is not None
    assert (row.state, row.observed_generation) == (PROVISIONING, 0)
    assert row.lease_token not in {None, before.lease_token}
    works.engine.release()
    await works.until(lambda row: row.state == "ready")


async def test_who_was_overtaken_learns_it_before_a_change(works: Works) -> None:
    """A row is ours until its lease runs out or somebody else takes it; a new order waits until we have ended."""
    works.engine.hold()
    await works.order()
    works.reconciler().start()
    await works.entered()
    row = await works.find()
    assert row is not None
    await check_lease(works.store, works.clock, row)
    works.clock.advance(PAST_LEASE)
    with pytest.raises(NotYet, match="Another server goes on"):
        await check_lease(works.store, works.clock, row)
    works.reconciler().start()
    await works.entered()
    taken = await works.find()
    assert taken is not None
    await check_lease(works.store, works.clock, taken)
    with pytest.raises(NotYet):
        await check_lease(works.store, works.clock, row)
    await works.order_again(DELETING)
    await check_lease(works.store, works.clock, taken)


async def test_a_lease_is_renewed_while_the_step_runs(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes longer than a lease keeps it."""
    monkeypatch.setattr(loop, "_RENEW_EVERY", 0.02)
    works.engine.hold()
    await works.order()
    works.reconciler().start()
    await works.entered()
    other = works.reconciler()
    other.start()
    for _ in range(4):
        works.clock.advance(LEASE.total_seconds() / 2)
        now = works.clock.now()
        await works.until(lambda row, now=now: row.lease_until == now + LEASE)  # type: ignore[misc]
        other.wake()
        await asyncio.sleep(0.02)
    works.engine.release()
    await works.until(lambda row: row.state == "ready")
    assert works.engine.calls == [("apply", "db_1")]


async def test_a_step_that_lost_its_lease_is_ended(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the lease is somebody else's, the step is cancelled, and the other's lease stays."""
    monkeypatch.setattr(loop, "_RENEW_EVERY", 0.02)
    works.engine.hold()
    await works.order()
    works.reconciler().start()
    await works.entered()
    async with works.store.session() as session:
        await session.execute(update(Database).values(lease_token="somebody else's"))
        await session.commit()
    await asyncio.sleep(0.2)
    works.engine.release()
    await asyncio.sleep(0.1)
    row = await works.find()
    assert row is not None
    assert (row.lease_token, row.state) == ("somebody else's", PROVISIONING)
    assert works.engine.databases == {}


@pytest.mark.usefixtures("no_looks")
async def test_a_new_order_during_a_step_is_what_is_made(works: Works) -> None:
    """A step's outcome for an order that has changed meanwhile is forgotten, and the new order is done at once."""
    works.engine.hold()
    await works.order()
    works.reconciler().start()
    await works.entered()
    await works.order_again(PROVISIONING, sku="db-s-1vcpu-2gb")
    works.engine.release()
    row = await works.until(lambda row: row.state == "ready")
    assert (row.generation, row.observed_generation) == (2, 2)
    assert works.engine.databases["db_1"].connections == 5
    assert works.engine.calls == [("apply", "db_1")] * 2


@pytest.mark.usefixtures("no_looks")
async def test_a_deletion_during_a_step_wins(works: Works) -> None:
    """What is deleted while it is being made is removed, whatever the step came to."""
    works.engine.hold()
    await works.order()
    works.reconciler().start()
    await works.entered()
    await works.order_again(DELETING)
    works.engine.release()
    await works.until_gone()
    assert works.engine.databases == {}
    assert works.engine.calls == [("apply", "db_1"), ("drop", "db_1")]


@pytest.mark.usefixtures("no_looks")
async def test_a_deletion_ends_a_long_step(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is deleted during a step that would never end is removed all the same: the step is given up for it."""
    monkeypatch.setattr(loop, "_RENEW_EVERY", 0.02)
    works.engine.hold()
    await works.order()
    works.reconciler().start()
    await works.entered()
    works.engine.hold()  # another gate, which opens for those who come from now on
    works.engine.release()
    await works.order_again(PROVISIONING)
    await works.until(lambda row: row.lease_until == works.clock.now() + LEASE)
    await asyncio.sleep(0.1)
    assert works.engine.calls == [("apply", "db_1")]  # another order of the kind that it works on does not end it
    await works.order_again(DELETING)
    await works.until_gone()
    assert works.engine.calls == [("apply", "db_1"), ("drop", "db_1")]
    assert works.engine.databases == {}


async def test_stopping_hands_the_leases_back(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop ends what does not end by itself in a while, and leaves its rows to whoever comes next."""
    monkeypatch.setattr(loop, "_SECONDS_TO_STOP", 0.05)
    works.engine.hold()
    await works.order()
    first = works.reconciler()
    first.start()
    await works.entered()
    await first.stop()
    row = await works.find()
    assert row is not None
    assert (row.lease_token, row.lease_until, row.attempts) == (None, None, 0)
    works.engine.release()
    works.reconciler().start()  # the clock stands still: no lease has run out
    await works.until(lambda row: row.state == "ready")


async def test_stopping_lets_a_step_end(works: Works) -> None:
    """A step that ends soon is not cut short by a stop, and its outcome is kept."""
    works.engine.takes = 0.1
    await works.order()
    reconciler = works.reconciler()
    reconciler.start()
    await works.entered()
    await reconciler.stop()
    row = await works.find()
    assert row is not None
    assert (row.state, row.lease_token) == ("ready", None)


async def test_a_stop_in_the_midst_leaves_no_lease(works: Works) -> None:
    """However a stop falls, between two rows or in the midst of claiming one, every row can be taken at once."""
    for number in range(60):
        await works.order(f"db_{number}")
    works.engine.takes = 0.001
    for tries in range(20):
        reconciler = works.reconciler(concurrency=2)
        reconciler.start()
        await asyncio.sleep(0.002 * tries)
        reconciler.wake()
        async with asyncio.timeout(5):
            await reconciler.stop()
        assert await works.leased() == []


async def test_two_processes_never_step_one_row_at_once(works: Works) -> None:
    """Two reconcilers on one storage share a hundred rows: each is stepped once, and never by both."""
    works.engine.takes = 0.002
    names = [f"db_{number}" for number in range(100)]
    for name in names:
        await works.order(name)
    pair = [works.reconciler(), works.reconciler()]
    for reconciler in pair:
        reconciler.start()

    async def done() -> bool:
        return len(works.engine.databases) == len(names)

    await eventually(done)
    for reconciler in pair:
        await reconciler.stop()
    assert set(works.engine.at_once.values()) == {1}
    assert sorted(works.engine.calls) == sorted(("apply", name) for name in names)
    async with works.store.session() as session:
        states = (await session.scalars(select(Database.state).where(col(Database.observed_generation) == 1))).all()
    assert states == ["ready"] * 100
