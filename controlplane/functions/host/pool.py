"""The workers of one function: from none to as many as may run at the same time, and back to none."""

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import structlog
from prometheus_client import Gauge

from controlplane.functions.host.sandbox import SandboxUnavailable
from controlplane.functions.host.worker import InvocationFailed, Program, StartFailed, Worker

# How a call ended; `bad_answer` where what the handler returned should be an HTTP answer and is none.
Outcome = Literal["ok", "error", "timeout", "crashed", "out_of_memory", "too_large", "start_failed", "bad_answer"]

_STARTS_AT_ONCE = 4  # of one version

_log = structlog.get_logger("functions")


class NotReady(Exception):
    """There is nothing that could answer yet, or for now; `retry_after` is in seconds."""

    def __init__(self, retry_after: float = 1.0) -> None:
        super().__init__("The function is not ready yet: try again in a moment.")
        self.retry_after = retry_after


class TooManyCalls(Exception):
    """As many calls are running as may, of this function or of all together; the message says which."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a call ended: what the handler returned as JSON, or what went wrong, for the customer."""

    outcome: Outcome
    version: int
    cold_start: bool
    seconds: float = 0.0
    memory_mb: float = 0.0
    payload: bytes = b""
    message: str = ""
    trace: str | None = None


def plain(text: str) -> str:
    """Return what a function says, which may be anything, as text that protobuf and databases take."""
    return text.encode(errors="replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _most_of_the_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4 // 1024**2


@dataclass(frozen=True, slots=True)
class Limits:
    """How many workers a host has at the most, with how much memory, and how long they wait for calls (seconds)."""

    workers: int = 200
    memory_mb: int = field(default_factory=_most_of_the_memory)
    idle: float = 60.0
    last_idle: float = 600.0  # the only worker of a version
    # How long nothing is started after a start that failed; doubled from failure to failure.
    first_backoff: float = 1.0
    longest_backoff: float = 30.0


class Pool:
    """What answers the calls of one function; `max_concurrency` may be changed at any time."""

    def __init__(self, *, max_concurrency: int) -> None:
        self.max_concurrency = max_concurrency
        self._active: Version | None = None
        self._running = 0

    @property
    def active(self) -> "Version | None":
        """The version that answers."""
        return self._active

    def switch(self, version: "Version | None") -> None:
        """Let this version answer every call that begins from now on; those that run finish where they are."""
        before, self._active = self._active, version
        if before is not None and before is not version:
            before.retire()

    async def call(self, event: bytes, request_id: str) -> Ended:
        """Call the function with an event (JSON).

        Raises NotReady, or TooManyCalls if the function's own limit or the host's is reached: nothing was run then.
        """
        if self._active is None:
            raise NotReady
        if self._running >= self.max_concurrency:
            raise TooManyCalls(f"At most {self.max_concurrency} calls of this function run at the same time.")
        self._running += 1
        try:
            return await self._active.call(event, request_id)
        finally:
            self._running -= 1


class Version:
    """A version's workers, each call of which may take so many seconds.

    `load` makes the code be there, `on_line` gets a stream, a line and the call's id, and `workers` counts them.
    """

    def __init__(
        self,
        *,
        number: int,
        memory_mb: int,
        seconds: float,
        room: "Room",
        load: Callable[[], Awaitable[Program]],
        start: Callable[[Program, Callable[[str, str], None]], Awaitable[Worker]],
        on_line: Callable[[str, str, str], None],
        workers: Gauge,
    ) -> None:
        self.memory_mb = memory_mb
        self.workers = workers
        self._number = number
        self._seconds = seconds
        self._room = room
        self._load = load
        self._start = start
        self._on_line = on_line
        self._idle: list[_Held] = []
        self._used = 0  # by calls and workers
        self._staying = 0  # workers
        self._retired = False
        self._unused = asyncio.Event()
        self._starting = 0  # workers
        self._waiting: deque[asyncio.Future[_Held | None]] = deque()
        self._failures = 0
        self._not_before = 0.0

    async def warm(self) -> None:
        """Start a worker, unless one waits already, and keep it for the first call.

        Raises StartFailed if the code cannot be loaded, TooManyCalls if the host has no room, NotReady if it must wait.
        """
        with self._in_use():
            self._rest(self._find_idle() or await self._new_worker())

    async def call(self, event: bytes, request_id: str) -> Ended:
        """Call it with an event (JSON); raises NotReady or TooManyCalls, and nothing was run then."""
        with self._in_use():
            held = self._find_idle()
            # Were all calls of a burst to start a worker at once, none would be ready in time.
            if held is None and self._starting >= _STARTS_AT_ONCE:
                held = await self._next_free()
            cold_start = held is None
            if held is None:
                try:
                    held = await self._new_worker()
                except StartFailed as failed:
                    return Ended("start_failed", self._number, cold_start, message=plain(str(failed)))
            held.request_id = request_id
            return await self._invoke(held, event, cold_start=cold_start)

    def retire(self) -> None:
        """Keep no worker any more; calls that run are finished."""
        self._retired = True
        for held in tuple(self._idle):
            self._room.dismiss(held)
        self.note_use(0)

    async def until_unused(self) -> None:
        """Wait until no call and no worker of a retired version is left."""
        await self._unused.wait()

    @property
    def has_one_worker(self) -> bool:
        """Whether there is a single worker, besides those that are being stopped."""
        return self._staying == 1

    def forget(self, held: "_Held") -> None:
        """Give this worker no more calls: it is being stopped."""
        self._staying -= 1
        with suppress(ValueError):
            self._idle.remove(held)

    def note_use(self, change: int) -> None:
        """Count one more who uses the version's code, or one less."""
        self._used += change
        if self._retired and not self._used:
            self._unused.set()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keep the version's code there while the body runs."""
        self.note_use(+1)
        try:
            yield
        finally:
            self.note_use(-1)

    def _find_idle(self) -> "_Held | None":
        """Return the worker that was used last, so that the others can grow old."""
        while self._idle:
            held = self._idle.pop()
            self._room.wake(held)
            if held.worker.alive:
                return held
            self._room.dismiss(held)
        return None

    async def _next_free(self) -> "_Held | None":
        """Wait for a worker that has answered another call; return None when one may be started before that."""
        turn: asyncio.Future[_Held | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # what was just given to us is another's
                held = turn.result()
                self._hand_over(None) if held is None else self._rest(held)
            raise

    def _hand_over(self, held: "_Held | None") -> bool:
        """Give a worker, or the turn to start one, to the call that waits longest; return whether there is any."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(held)
                return True
        return False

    async def _new_worker(self) -> "_Held":
        self._starting += 1
        try:
            return await self._start_worker()
        finally:
            self._starting -= 1
            self._hand_over(None)

    async def _start_worker(self) -> "_Held":
        wait = self._not_before - time.monotonic()
        if wait > 0:
            raise NotReady(wait)
        program = await self._load()
        held = _Held(self)
        await self._room.take(held)
        try:
            held.worker = await self._start(program, partial(self._say, held))
        except StartFailed:
            self._back_off()
            raise
        except SandboxUnavailable as error:
            _log.error("a worker could not be started", error=str(error))
            raise TooManyCalls("The host has no room for another call right now.") from error
        finally:
            if not held.is_started:
                self._room.give_back(held)
        self._failures = 0
        self._staying += 1
        return held

    def _back_off(self) -> None:
        """Start nothing for a while; of several starts that fail together, the first counts."""
        now = time.monotonic()
        if now >= self._not_before:
            limits = self._room.limits
            self._not_before = now + min(limits.first_backoff * 2**self._failures, limits.longest_backoff)
            self._failures = min(self._failures + 1, 16)

    def _say(self, held: "_Held", stream: str, line: str) -> None:
        # What a worker prints after its answer, or between two calls, goes with the call before.
        self._on_line(stream, line, held.request_id)

    async def _invoke(self, held: "_Held", event: bytes, *, cold_start: bool) -> Ended:
        """Let a worker answer. One that is left before it has is not alive any more."""
        worker = held.worker
        began = time.monotonic()
        outcome: Outcome = "ok"
        payload, message = b"", ""
        trace: str | None = None
        try:
            payload = (await worker.invoke(event, {"request_id": held.request_id}, seconds=self._seconds)).payload
        except InvocationFailed as failed:
            outcome, message, trace = failed.kind, plain(failed.message), failed.trace and plain(failed.trace)
        finally:
            seconds, memory_mb = time.monotonic() - began, worker.memory_peak() / 1024**2
            if worker.alive:
                self._rest(held)
            else:
                self._room.dismiss(held)
        return Ended(outcome, self._number, cold_start, seconds, memory_mb, payload, message, trace)

    def _rest(self, held: "_Held") -> None:
        if self._hand_over(held):
            return
        if self._retired:
            self._room.dismiss(held)
        else:
            self._idle.append(held)
            self._room.rest(held)


class _Held:
    """A worker and its place in the room; it has no `worker` yet while that starts."""

    worker: Worker

    def __init__(self, version: Version) -> None:
        self.version = version
        self.request_id = ""

    @property
    def is_started(self) -> bool:
        """Whether there is a worker."""
        return hasattr(self, "worker")


class Room:
    """The workers of all functions together, as many as the host's limits allow. Who waits longest makes room."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._held: set[_Held] = set()
        self._idle: dict[_Held, float] = {}  # since when, in this order
        self._leaving: dict[_Held, asyncio.Task[None]] = {}

    async def take(self, held: _Held) -> None:
        """Take a place; idle workers of any function are stopped for it. Raises TooManyCalls if that is not enough."""
        while not self._fits(held, self._held):
            staying = self._held - self._leaving.keys()
            if self._fits(held, staying):
                await asyncio.wait(self._leaving.values(), return_when=asyncio.FIRST_COMPLETED)
            elif self._fits(held, staying - self._idle.keys()):
                self.dismiss(next(iter(self._idle)))
            else:
                raise TooManyCalls("The host has no room for another call right now.")
        self._held.add(held)
        held.version.note_use(+1)
        held.version.workers.inc()

    def give_back(self, held: _Held) -> None:
        """Give a place back; its worker is gone."""
        self._held.remove(held)
        held.version.note_use(-1)
        held.version.workers.dec()

    def rest(self, held: _Held) -> None:
        """Note that a worker has nothing to do."""
        self._idle[held] = time.monotonic()

    def wake(self, held: _Held) -> None:
        """Note that a worker has something to do."""
        self._idle.pop(held, None)

    def dismiss(self, held: _Held) -> None:
        """Stop a worker, in the background; its place is taken until it is gone."""
        if held in self._leaving or held not in self._held:
            return  # the host is closing, and was faster
        held.version.forget(held)
        self.wake(held)
        self._leaving[held] = asyncio.create_task(self._stop(held))

    def dismiss_unused(self) -> None:
        """Stop the workers that had nothing to do for too long, and those that have died by themselves."""
        now = time.monotonic()
        for held, since in tuple(self._idle.items()):
            longest = self.limits.last_idle if held.version.has_one_worker else self.limits.idle
            if now - since >= longest or not held.worker.alive:
                self.dismiss(held)

    async def close(self) -> None:
        """Stop every worker, also those that are answering."""
        for held in self._held - self._leaving.keys():
            if held.is_started:
                self.dismiss(held)
        if self._leaving:
            await asyncio.wait(self._leaving.values())

    def _fits(self, held: _Held, others: Collection[_Held]) -> bool:
        memory = held.version.memory_mb + sum(other.version.memory_mb for other in others)
        return len(others) < self.limits.workers and memory <= self.limits.memory_mb

    async def _stop(self, held: _Held) -> None:
        try:
            await held.worker.stop()
        except Exception:  # noqa: BLE001 - its place must not stay taken
            _log.exception("a worker could not be stopped")
        finally:
            del self._leaving[held]
            self.give_back(held)
