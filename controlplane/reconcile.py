"""Makes what was ordered real: claim a row by a lease, take one step, apply its outcome only under that lease.

An order's own transaction takes the lease where there is room for its step; other rows are found by looking.

It knows no resource. A row carries what is wanted and what was seen; a provisioner looks at both and takes the next
step, each of which may be repeated at any time. So a process that is killed anywhere loses nothing: the lease runs out,
and whoever claims the row next goes on from what is really there.
"""

import asyncio
import random
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar

import structlog
from sqlalchemy import CursorResult, case, literal, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import Field, SQLModel, col, select

from controlplane.api.v1 import progress_pb2
from controlplane.clock import Clock
from controlplane.due import Look
from controlplane.events.feed import Feed
from controlplane.observe.metrics import Metrics
from controlplane.rpc.times import stamp
from controlplane.sql import Store, UtcDateTime, is_outage

FAILED = "failed"
DELETING = "deleting"  # may take forever: what is being deleted must never come to rest as anything else

LEASE = timedelta(seconds=30)
_RENEW_EVERY = LEASE.total_seconds() / 3
_LOOK_EVERY = 1.0  # seconds; for rows that another process ordered, and for the next try of those that failed
_BACKOFF_FIRST = 0.5
_BACKOFF_LONGEST = 30.0
_SECONDS_TO_STOP = 10.0
_LEAST_SECONDS = 60.0  # what is past its deadline when the server comes back gets this one chance

_log = structlog.get_logger("reconciler")


class Reconciled(SQLModel):
    """What the reconciler needs of a row.

    `state` is shown to the customer as the status. `generation` counts orders, `observed_generation` is the newest one
    that is real. A row is due once `next_attempt_at` has come and nobody holds its lease: for the next try of what was
    ordered, or, where nothing is waited for, for another look at whether it still is so.
    """

    id: str = Field(primary_key=True)
    account_id: str = Field(foreign_key="accounts.id")
    state: str
    generation: int = 1
    observed_generation: int = 0
    waiting_on: str | None = None
    attempts: int = 0
    last_error: str | None = None
    next_attempt_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    deadline_at: datetime | None = Field(default=None, sa_type=UtcDateTime, index=True)
    lease_token: str | None = None
    lease_until: datetime | None = Field(default=None, sa_type=UtcDateTime)

    def order(self, state: str, *, now: datetime, within: timedelta, waiting_on: str) -> None:
        """Want something new of the row: it is due at once, and has failed unless it is settled `within` this time.

        A deletion never fails: the metrics tell of one that takes longer.
        """
        self.state = state
        self.generation = (self.generation or 0) + 1
        self.waiting_on = waiting_on
        self.attempts = 0
        self.last_error = None
        self.next_attempt_at = now
        self.deadline_at = now + within


def progress_of(row: Reconciled) -> progress_pb2.Progress | None:
    """Return what a row is waiting for as the API shows it, or why it failed; None while all is as ordered."""
    if row.waiting_on is None and row.last_error is None:
        return None
    return progress_pb2.Progress(
        waiting_on=row.waiting_on or "",
        attempts=row.attempts,
        next_attempt_at=stamp(row.next_attempt_at) if row.waiting_on and row.attempts else None,
        last_error=row.last_error,
    )


@dataclass(frozen=True, slots=True)
class News:
    """What the customer is told besides a change of the state, as the event `KIND.TYPE`."""

    type: str
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """The row is as ordered, in this state; `values` are further columns that were learned.

    It is looked at again at `look_again_at`, if there is such a time.
    """

    state: str
    values: Mapping[str, Any] = field(default_factory=dict)
    look_again_at: datetime | None = None
    news: News | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """What was ordered will never be, however often it is tried; the reason is for the customer."""

    reason: str


@dataclass(frozen=True, slots=True)
class Gone:
    """Nothing of the thing is left; the row may go too."""


class NotYet(Exception):
    """The step cannot be taken now: what it waits for, and why in words for the customer."""

    def __init__(self, waiting_on: str, reason: str) -> None:
        super().__init__(reason)
        self.waiting_on = waiting_on


async def check_lease(store: Store, clock: Clock, row: Reconciled) -> None:
    """Raise NotYet unless the row is still ours: for whoever holds a lock that keeps all others from what he changes.

    A process that was paused may have been overtaken meanwhile. An order that has come since changes nothing: nobody
    else takes its step before we have ended ours.
    """
    model = type(row)
    mine = select(model.id).where(*_is_mine(model, row), col(model.lease_until) > clock.now())
    if not await store.fetch(mine):
        raise NotYet("another server", "Another server goes on with this.")


RowT = TypeVar("RowT", bound=Reconciled)
Outcome = Settled | Failed | Gone


class Provisioner(Protocol[RowT]):
    """What one kind of resource adds: its table, its next step, and what goes with the outcome of one."""

    kind: str
    model: type[RowT]
    at_once: int  # so many steps, so that what takes long of one kind keeps no other waiting

    async def step(self, row: RowT) -> Outcome:
        """Look at what is there and take the next step towards what the row wants; safe to repeat.

        Raises NotYet to be asked again later.
        """

    async def follow_up(self, session: AsyncSession, row: RowT, outcome: Outcome) -> None:
        """Do what goes with an outcome, in the transaction that keeps it: give back what a row held that is gone."""


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
        self._running: dict[asyncio.Task[None], str] = {}  # each with its kind
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
            row.lease_token, row.lease_until = _new_lease(now)
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
        return list(self._running.values()).count(provisioner.kind)

    def _begin(self, provisioner: Provisioner[Any], work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running[task] = provisioner.kind
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._woken.set()  # there is room again
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
        token, until = _new_lease(now)
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
        mine = _is_mine(model, row)
        state, detail = "deleted", None
        async with self._store.session() as session:
            if isinstance(outcome, Gone):
                current = (
                    await session.execute(select(model).where(*mine, _same_order(model, row)).with_for_update())
                ).scalar_one_or_none()
                if current is not None:
                    await provisioner.follow_up(session, current, outcome)
                    await session.delete(current)
                kept = current is not None
            else:
                values = {**self._values(row, outcome), "lease_token": None, "lease_until": None}
                if isinstance(outcome, NotYet) and values["next_attempt_at"] is not None:
                    # What the row waits for may have come while the step was under way, and have made it due.
                    due = col(model.next_attempt_at)
                    later = literal(values["next_attempt_at"], UtcDateTime)
                    values["next_attempt_at"] = case((due == row.next_attempt_at, later), else_=due)
                kept = await _affects(session, update(model).where(*mine, _same_order(model, row)).values(values))
                state, detail = values.get("state", row.state), values["last_error"]
                if kept and not isinstance(outcome, NotYet):
                    await provisioner.follow_up(session, row, outcome)
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
                await session.execute(update(model).where(*mine).values(free))
            await session.commit()
        self._feed.announce(row.account_id)
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
            done = await _affects(session, update(model).where(*_is_mine(model, row), *conditions).values(values))
            await session.commit()
        return done


def _tell(what: str, error: BaseException) -> None:
    """Log what went wrong: in a line while our own database does not answer, else with where."""
    if is_outage(error):
        _log.error(what, error=str(error))
    else:
        _log.error(what, exc_info=error)


def _new_lease(now: datetime) -> tuple[str, datetime]:
    return secrets.token_hex(16), now + LEASE


def _is_mine(model: type[Reconciled], row: Reconciled) -> tuple[Any, ...]:
    return col(model.id) == row.id, col(model.lease_token) == row.lease_token


def _same_order(model: type[Reconciled], row: Reconciled) -> Any:
    return col(model.generation) == row.generation


async def _affects(session: AsyncSession, statement: Any) -> bool:
    result = await session.execute(statement)
    return isinstance(result, CursorResult) and bool(result.rowcount)
