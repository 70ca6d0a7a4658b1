"""Tries: when a step is taken again, when it is given up, and what the metrics tell of it."""

import asyncio
import time
from datetime import timedelta
from functools import partial
from itertools import pairwise

import pytest

from controlplane.databases.engines.engine import Busy, ClusterUnavailable, EngineError
from controlplane.databases.model import PROVISIONING
from controlplane.observe.metrics import new_metrics
from controlplane.reconcile import loop
from controlplane.reconcile.model import DELETING
from tests.reconcile.conftest import Works
from tests.stack import eventually


async def test_the_waits_grow_up_to_a_limit(works: Works) -> None:
    """Each failed try doubles the wait, with a random part, up to half a minute; a new order starts afresh."""
    works.engine.failure = ClusterUnavailable("The cluster does not answer.")
    await works.order()
    reconciler = works.reconciler()
    reconciler.start()
    shares = []
    for attempt in range(1, 12):
        row = await works.until(lambda row, attempt=attempt: row.attempts == attempt)  # type: ignore[misc]
        assert (row.waiting_on, row.last_error) == ("cluster local-postgresql", "The cluster does not answer.")
        assert row.next_attempt_at is not None
        wait = (row.next_attempt_at - works.clock.now()).total_seconds()
        longest = min(30, 0.5 * 2 ** (attempt - 1))
        assert longest / 2 <= wait <= longest
        shares.append(wait / longest)
        works.clock.advance(wait / 2)
        reconciler.wake()
        await asyncio.sleep(0.01)
        assert len(works.engine.calls) == attempt  # not before its time
        works.clock.advance(wait)
        reconciler.wake()
    assert any(abs(one - other) > 0.01 for one, other in pairwise(shares))
    works.engine.failure = None
    await works.order_again(PROVISIONING)
    reconciler.wake()
    await works.until(lambda row: row.state == "ready" and row.attempts == 0)


@pytest.mark.parametrize(
    ("failure", "waiting_on", "shown"),
    [
        (ClusterUnavailable("It does not answer."), "cluster local-postgresql", "It does not answer."),
        (Busy("Somebody else is at it."), "another change of db-1", "Somebody else is at it."),
        (EngineError("It refused."), "the provider", "It refused."),
        (RuntimeError("password=hunter2"), "the provider", "Something went wrong on our side; it is tried again."),
    ],
)
async def test_a_failure_is_told_in_words(works: Works, failure: Exception, waiting_on: str, shown: str) -> None:
    """The row says what it waits for and why in words for the customer; what nobody foresaw stays in the log."""
    works.engine.failure = failure
    await works.order()
    works.reconciler().start()
    row = await works.until(lambda row: row.attempts == 1)
    assert (row.waiting_on, row.last_error, row.state) == (waiting_on, shown, PROVISIONING)


async def test_past_its_deadline_it_has_failed(works: Works) -> None:
    """What was not made in time has failed with the last reason, rests, and can still be deleted."""
    works.engine.failure = ClusterUnavailable("The cluster does not answer.")
    await works.order(within=timedelta(minutes=10))
    reconciler = works.reconciler()
    reconciler.start()
    await works.until(lambda row: row.attempts == 1)
    works.clock.advance(601)
    reconciler.wake()
    row = await works.until(lambda row: row.state == "failed")
    assert (row.last_error, row.next_attempt_at, row.waiting_on) == ("The cluster does not answer.", None, None)
    works.clock.advance(3600)
    reconciler.wake()
    await asyncio.sleep(0.1)
    assert len(works.engine.calls) == 2
    works.engine.failure = None
    await works.order_again(DELETING)
    reconciler.wake()
    await works.until_gone()


async def test_a_step_that_hangs_is_cut_off(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step gets as long as the order may take, and one last chance after that; then the row has failed."""
    monkeypatch.setattr(loop, "_LEAST_SECONDS", 0.05)
    works.engine.hold()
    await works.order(within=timedelta(seconds=0.5))
    reconciler = works.reconciler()
    began = time.monotonic()
    reconciler.start()
    row = await works.until(lambda row: row.attempts == 1)
    assert time.monotonic() - began >= 0.5
    assert (row.state, row.waiting_on, row.last_error) == (PROVISIONING, "the provider", "It was not done in time.")
    works.clock.advance(1)
    reconciler.wake()
    row = await works.until(lambda row: row.state == "failed")
    assert (row.last_error, row.next_attempt_at, row.lease_token) == ("It was not done in time.", None, None)
    assert works.engine.calls == [("apply", "db_1")] * 2
    assert works.engine.databases == {}


async def test_a_deletion_that_hangs_is_not_cut_off(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion past its deadline goes on, for the metrics to show, until it is done."""
    monkeypatch.setattr(loop, "_LEAST_SECONDS", 0.05)
    metrics = new_metrics()
    works.engine.hold()
    await works.order()
    await works.order_again(DELETING)
    works.clock.advance(3599.8)
    reconciler = works.reconciler(metrics=metrics)
    reconciler.start()
    await works.entered()

    async def overdue(number: int) -> bool:
        reconciler.wake()
        return metrics.registry.get_sample_value("htx_reconciler_overdue", {"kind": "database"}) == number

    assert await overdue(0)
    works.clock.advance(1)
    await eventually(partial(overdue, 1))
    await asyncio.sleep(0.4)
    row = await works.find()
    assert row is not None
    assert (row.state, row.attempts) == (DELETING, 0)
    assert works.engine.calls == [("drop", "db_1")]
    works.engine.release()
    await works.until_gone()
    await eventually(partial(overdue, 0))


async def test_a_deletion_is_never_given_up(works: Works) -> None:
    """A deletion that fails is tried for as long as it takes."""
    works.engine.failure = ClusterUnavailable("The cluster does not answer.")
    await works.order()
    await works.order_again(DELETING)
    reconciler = works.reconciler()
    reconciler.start()
    for attempt in range(1, 4):
        row = await works.until(lambda row, attempt=attempt: row.attempts == attempt)  # type: ignore[misc]
        assert row.state == DELETING
        works.clock.advance(100 * 86400)
        reconciler.wake()


async def test_the_metrics_tell_the_queue_and_its_age(works: Works) -> None:
    """The metrics say how many rows are due, how long the oldest has waited, which are late, and how steps ended."""
    metrics = new_metrics()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"kind": "database", **labels})

    await works.order("db_1", within=timedelta(seconds=30))
    works.clock.advance(40)
    await works.order("db_2")
    await works.order("db_3")
    works.clock.advance(5)
    works.engine.hold()
    reconciler = works.reconciler(metrics=metrics, concurrency=1)
    reconciler.start()
    await works.entered()
    assert value("htx_reconciler_due") == 3
    assert value("htx_reconciler_lag_seconds") == 45
    assert value("htx_reconciler_overdue") == 1
    works.engine.release()
    await works.until(lambda row: row.state == "ready")

    async def none_due() -> bool:
        return value("htx_reconciler_due") == 0

    await eventually(none_due)
    assert value("htx_reconciler_lag_seconds") == 0
    assert value("htx_reconciler_steps_total", end="Settled") == 3
    assert value("htx_reconciler_step_seconds_count") == 3
