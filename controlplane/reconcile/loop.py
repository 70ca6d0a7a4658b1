"""Makes what was ordered real: claim a row by a lease, take one step, apply its outcome only under that lease.

An order's own transaction takes the lease where there is room for its step; other rows are found by looking.

It knows no resource. A row carries what is wanted and what was seen; a provisioner looks at both and takes the next
step, each of which may be repeated at any time. So a process that is killed anywhere loses nothing: the lease runs out,
and whoever claims the row next goes on from what is really there.
"""

import asyncio
import random
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy import CursorResult, Update, case, inspect, literal, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.clock import Clock
from controlplane.events.feed import Feed
from controlplane.observe.metrics import Metrics
from controlplane.reconcile.due import Look
from controlplane.reconcile.lease import LEASE, is_mine, new_lease
from controlplane.reconcile.model import DELETING, FAILED, Reconciled
from controlplane.reconcile.step import Failed, Gone, News, NotYet, Outcome, Provisioner, RowT, Settled
from controlplane.sql import Store, UtcDateTime, is_outage

_RENEW_EVERY = LEASE.total_seconds() / 3
_LOOK_EVERY = 1.0  # seconds; for rows that another process ordered, and for the next try of those that failed
_BACKOFF_FIRST = 0.5
_BACKOFF_LONGEST = 30.0
_SECONDS_TO_STOP = 10.0
_LEAST_SECONDS = 60.0  # what is past its deadline when the server comes back gets this one chance

_log = structlog.get_logger("reconciler")


class Reconciler:
    """Runs the steps of all kinds, several rows at a time, each row at most once anywhere."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        provisioners: Sequence[Provisioner[Any]],
        feed: Feed,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._clock = clock
        self._feed = feed
        self._provisioners = provisioners
        self._metrics = metrics
        self._looks = {each.kind: Look(each.model) for each in provisioners}
        self._woken = asyncio.Event()
        self._running: dict[asyncio.Task[None], Provisioner[Any]] = {}
        self._loop: asyncio.Task[None] | None = None
        self._stopping = False

    def wake(self) -> None:
        """Look for due rows at once: something was committed."""
        self._woken.set()

    def take(self, row: Reconciled, committed: asyncio.Future[bool]) -> None:
        """Take the step of what was just ordered as soon as it is committed: the order's transaction takes the lease.

        So that a step costs no commit before it. What somebody still works at, or what there is no room for, is found
        like every row. Half of the room is left for those, or they would wait for as long as orders come.
        """
        provisioner = next(each for each in self._provisioners if isinstance(row, each.model))
        now = self._clock.now()
        is_due = row.next_attempt_at is not None and row.next_attempt_at <= now
        is_free = row.lease_until is None or row.lease_until <= now
        if is_due and is_free and not self._stopping and self._count_running(provisioner) < provisioner.at_once // 2:
            row.lease_token, row.lease_until = new_lease(now)
            self._begin(provisioner, self._work_when(committed, provisioner, row))
        else:
            committed.add_done_callback(lambda _: self.wake())

    def start(self) -> None:
        """Begin, in a task of its own."""
        self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Take no new row, let the running steps end for a while, then hand their leases back."""
        if self._loop is None:
            return
        # Not cancelled while it works: in the midst of claiming a row it would leave a lease that nobody holds.
        self._stopping = True
        self._woken.set()
        await asyncio.wait({self._loop}, timeout=_SECONDS_TO_STOP)
        if self._running:
            await asyncio.wait(self._running, timeout=_SECONDS_TO_STOP)
        for task in (self._loop, *self._running):
            task.cancel()
        await asyncio.gather(self._loop, *self._running, return_exceptions=True)

    async def _run(self) -> None:
        while not self._stopping:
            self._woken.clear()
            try:
                for provisioner in self._provisioners:
                    await self._start_due(provisioner)
            except Exception as error:  # noqa: BLE001 - whatever it is, the loop goes on
                _tell("looking for due rows failed; it is tried again", error)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY):
                    await self._woken.wait()

    async def _start_due(self, provisioner: Provisioner[Any]) -> None:
        """Start a step for each due row, as far as there is room: what was ordered before what is looked at again."""
        for is_ordered, due in await self._count_due(provisioner):
            for _ in range(due):
                if self._stopping or self._count_running(provisioner) >= provisioner.at_once:
                    return
                row = await self._claim(provisioner, is_ordered=is_ordered)
                if row is None:
                    break
                self._begin(provisioner, self._work(provisioner, row))

    def _count_running(self, provisioner: Provisioner[Any]) -> int:
        return list(self._running.values()).count(provisioner)

    def _begin(self, provisioner: Provisioner[Any], work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running[task] = provisioner
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        provisioner = self._running.pop(task)
        if self._count_running(provisioner) == provisioner.at_once - 1:
            self.wake()  # there was no room until now, and something may wait for it
        if not task.cancelled() and (error := task.exception()) is not None:
            _tell("a step's outcome could not be kept; its lease runs out", error)

    async def _count_due(self, provisioner: Provisioner[Any]) -> tuple[tuple[bool, int], ...]:
        """Return how many orders and how many looks are due, by a read, so that an idle server writes nothing.

        And tell the metrics.
        """
        now = self._clock.now()
        (found,) = await self._store.fetch(self._looks[provisioner.kind].count, {"now": now})
        oldest = min(found.oldest_order or now, found.oldest_look or now)
        self._metrics.due.labels(provisioner.kind).set(found.orders + found.looks)
        self._metrics.lag_seconds.labels(provisioner.kind).set((now - oldest).total_seconds())
        self._metrics.overdue.labels(provisioner.kind).set(found.late)
        return (True, found.orders), (False, found.looks)

    async def _claim(self, provisioner: Provisioner[RowT], *, is_ordered: bool) -> RowT | None:
        """Take the lease of the row that has been due longest, or None if there is none that is free."""
        now, look = self._clock.now(), self._looks[provisioner.kind]
        token, until = new_lease(now)
        async with self._store.session() as session:
            claimed = await session.execute(
                look.claim_order if is_ordered else look.claim_look, {"now": now, "token": token, "until": until}
            )
            row: RowT | None = claimed.scalar_one_or_none()
            await session.commit()
            return row

    async def _work_when(self, committed: asyncio.Future[bool], provisioner: Provisioner[RowT], row: RowT) -> None:
        if await asyncio.shield(committed):  # it is the order's, and not to be cancelled with us
            await self._work(provisioner, row)

    async def _work(self, provisioner: Provisioner[RowT], row: RowT) -> None:
        """Take one step of a claimed row and keep its outcome."""
        log = _log.bind(kind=provisioner.kind, id=row.id, state=row.state)
        renewal = asyncio.create_task(self._renew(provisioner, row, asyncio.current_task()))
        try:
            with self._metrics.step_seconds.labels(provisioner.kind).time():
                async with asyncio.timeout(self._seconds_left(row)):
                    outcome: Outcome | NotYet = await provisioner.step(row)
        except NotYet as answer:
            outcome = answer
        except TimeoutError as error:
            outcome = NotYet("the provider", "It was not done in time.")
            outcome.__cause__ = error
        except asyncio.CancelledError:
            await self._hand_back(provisioner, row)
            self.wake()
            raise
        except Exception as error:
            log.exception("a step failed in a way that nobody foresaw")
            outcome = NotYet("the provider", "Something went wrong on our side; it is tried again.")
            outcome.__cause__ = error
        finally:
            renewal.cancel()
        self._metrics.steps.labels(provisioner.kind, type(outcome).__name__).inc()
        kept = await self._keep(provisioner, row, outcome)
        log.info(
            "step",
            end=type(outcome).__name__ if kept else "Superseded",
            **({"why": str(outcome), "cause": repr(outcome.__cause__)} if isinstance(outcome, Exception) else {}),
        )

    def _seconds_left(self, row: Reconciled) -> float | None:
        """Return how long a step may take, so that a cluster that never answers does not keep a row from failing."""
        if row.deadline_at is None or row.state == DELETING:
            return None
        return max((row.deadline_at - self._clock.now()).total_seconds(), _LEAST_SECONDS)

    async def _renew(self, provisioner: Provisioner[RowT], row: RowT, work: asyncio.Task[None] | None) -> None:
        """Hold the lease for as long as the step runs; cancel one that has lost it, or does what nobody wants now."""
        wanted = col(provisioner.model.state) == row.state
        while True:
            await asyncio.sleep(_RENEW_EVERY)
            if not await self._update(provisioner.model, row, {"lease_until": self._clock.now() + LEASE}, wanted):
                if work is not None:
                    work.cancel()
                return

    async def _hand_back(self, provisioner: Provisioner[RowT], row: RowT) -> None:
        await self._update(provisioner.model, row, {"lease_token": None, "lease_until": None})

    async def _keep(self, provisioner: Provisioner[RowT], row: RowT, outcome: Outcome | NotYet) -> bool:
        """Write down what a step has come to; False if the row was ordered anew meanwhile, or the lease was lost.

        What was ordered anew is due at once, and this outcome is forgotten: it answers a question no longer asked.
        """
        model = provisioner.model
        mine = is_mine(row)
        state, detail = "deleted", None
        # What the row waits for may have come while the step was under way.
        may_be_due = isinstance(outcome, NotYet)
        async with self._store.session() as session:
            if isinstance(outcome, Gone):
                current = (
                    await session.execute(select(model).where(*mine, _same_order(model, row)).with_for_update())
                ).scalar_one_or_none()
                if current is not None:
                    may_be_due = await provisioner.follow_up(session, current, outcome)
                    await session.delete(current)
                kept = current is not None
            else:
                values = {**self._values(row, outcome), "lease_token": None, "lease_until": None}
                if isinstance(outcome, NotYet) and values["next_attempt_at"] is not None:
                    # It may have been made due meanwhile, too.
                    due = col(model.next_attempt_at)
                    later = literal(values["next_attempt_at"], UtcDateTime)
                    values["next_attempt_at"] = case((due == row.next_attempt_at, later), else_=due)
                kept = await _affects(session, _update_of(model).where(*mine, _same_order(model, row)).values(values))
                state, detail = values.get("state", row.state), values["last_error"]
                if kept and not isinstance(outcome, NotYet):
                    may_be_due = await provisioner.follow_up(session, row, outcome)
            news = [outcome.news] if isinstance(outcome, Settled) and outcome.news else []
            for each in (*news, *([News(state, detail)] if state != row.state else [])) if kept else ():
                await self._feed.append(
                    session,
                    account_id=row.account_id,
                    type_=f"{provisioner.kind}.{each.type}",
                    resource_id=row.id,
                    resource_name=getattr(row, "name", None),
                    status=state,
                    detail=each.detail,
                )
            if not kept:
                free = {"lease_token": None, "lease_until": None}
                await session.execute(_update_of(model).where(*mine).values(free))
            await session.commit()
        self._feed.announce(row.account_id)
        if may_be_due or not kept:
            self.wake()
        return kept

    def _values(self, row: Reconciled, outcome: Settled | Failed | NotYet) -> dict[str, Any]:
        now = self._clock.now()
        settled = {"waiting_on": None, "next_attempt_at": None, "deadline_at": None, "attempts": 0}
        if isinstance(outcome, Settled):
            observed = {"state": outcome.state, "observed_generation": row.generation, "last_error": None}
            return {**settled, **observed, "next_attempt_at": outcome.look_again_at, **outcome.values}
        if isinstance(outcome, Failed):
            return {**settled, "state": FAILED, "last_error": outcome.reason}
        if row.deadline_at is not None and row.deadline_at <= now and row.state != DELETING:
            return {**settled, "state": FAILED, "last_error": str(outcome)}
        delay = min(_BACKOFF_LONGEST, _BACKOFF_FIRST * 2 ** min(row.attempts, 10)) * random.uniform(0.5, 1)  # noqa: S311
        return {
            "waiting_on": outcome.waiting_on,
            "last_error": str(outcome),
            "attempts": row.attempts + 1,
            "next_attempt_at": now + timedelta(seconds=delay),
        }

    async def _update(self, model: type[RowT], row: RowT, values: Mapping[str, Any], *conditions: Any) -> bool:
        async with self._store.session() as session:
            done = await _affects(session, _update_of(model).where(*is_mine(row), *conditions).values(values))
            await session.commit()
        return done


def _tell(what: str, error: BaseException) -> None:
    """Log what went wrong: in a line while our own database does not answer, else with where."""
    if is_outage(error):
        _log.error(what, error=str(error))
    else:
        _log.error(what, exc_info=error)


def _update_of(model: type[Reconciled]) -> Update:
    """Return an UPDATE of the table alone; that of a class goes through what a session holds too, which takes time."""
    return update(inspect(model).local_table)


def _same_order(model: type[Reconciled], row: Reconciled) -> Any:
    return col(model.generation) == row.generation


async def _affects(session: AsyncSession, statement: Any) -> bool:
    result = await session.execute(statement)
    return isinstance(result, CursorResult) and bool(result.rowcount)
