"""How many workers a function has, and which of them answers."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Gauge

from controlplane.functions.host.pool import Ended, Limits, NotReady, Pool, Room, TooManyCalls, Version
from controlplane.functions.host.sandbox import Sandbox
from controlplane.functions.host.worker import Program, StartFailed, Worker
from tests.functions.host.control import processes_of
from tests.stack import eventually

_UIDS = range(729_000, 729_020)
# Sleeps for so many seconds, or does something else.
CODE = """
import os, threading, time
def handler(event, context):
    if event == "exit":
        os._exit(1)
    if event == "exit later":
        threading.Timer(0.05, lambda: os._exit(1)).start()
        return os.getpid()
    time.sleep(event)
    return VERSION
"""


class Yard:
    """Makes versions whose workers run in the real sandbox, and counts how many were started."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self._sandbox = sandbox
        self._folder = folder
        self.started = 0
        self.gauge = Gauge("workers", "Workers.", registry=None)

    def version(self, room: Room, number: int = 1, code: str = CODE, *, memory_mb: int = 64) -> Version:
        """Return a version of a function."""
        place = self._folder / f"{number}-{hash((number, code)) & 0xFFFFFF:x}"
        place.mkdir(mode=0o755, exist_ok=True)
        place.chmod(0o755)
        (place / "main.py").write_text(f"VERSION = {number}\n{code}")

        async def load() -> Program:
            return Program(
                runtime="python3",
                folder=place,
                entrypoint="main.handler",
                memory_mb=memory_mb,
                timeout_ms=5000,
                environment={},
                allow_network=False,
                tenant="ac_tests",
                name="tested",
                version=number,
            )

        async def start(program: Program, on_line: Callable[[str, str], None]) -> Worker:
            self.started += 1
            return await Worker.start(program, self._sandbox, on_line)

        return Version(
            number=number,
            memory_mb=memory_mb,
            seconds=5,
            room=room,
            load=load,
            start=start,
            on_line=lambda _stream, _line, _request_id: None,
            workers=self.gauge,
        )

    @property
    def workers(self) -> float:
        """How many workers there are."""
        return next(iter(self.gauge.collect())).samples[0].value

    async def until_workers(self, count: int) -> None:
        """Wait until there are so many workers."""

        async def there_are() -> bool:
            return self.workers == count

        await eventually(there_are)


@pytest.fixture(scope="module")
async def sandbox(folder: Path) -> AsyncIterator[Sandbox]:
    """The sandbox of these tests."""
    sandbox = await asyncio.to_thread(Sandbox.open, folder / "pool", _UIDS)
    yield sandbox
    await sandbox.close()


@pytest.fixture
def yard(sandbox: Sandbox, folder: Path) -> Iterator[Yard]:
    """A yard with a folder of its own."""
    place = folder / "pool" / "yard"
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    yield Yard(sandbox, place)
    shutil.rmtree(place)


@pytest.fixture
async def rooms() -> AsyncIterator[Callable[..., Room]]:
    """Makes rooms, and closes them in the end."""
    made: list[Room] = []

    def new_room(**limits: Any) -> Room:
        made.append(Room(Limits(**limits)))
        return made[-1]

    yield new_room
    for room in made:
        await room.close()


Rooms = Callable[..., Room]


def pool_of(version: Version, *, max_concurrency: int = 10) -> Pool:
    """Return a pool in which a version answers."""
    pool = Pool(max_concurrency=max_concurrency)
    pool.switch(version)
    return pool


async def call(pool: Pool, event: Any = 0) -> Ended:
    """Call with an event."""
    return await pool.call(json.dumps(event).encode(), "an-id")


async def test_a_worker_is_started_when_there_is_none(yard: Yard, rooms: Rooms) -> None:
    """The first call starts a worker, the next one finds it."""
    pool = pool_of(yard.version(rooms()))
    first, second = await call(pool), await call(pool)
    assert (first.outcome, first.payload, first.cold_start) == ("ok", b"1", True)
    assert (second.outcome, second.payload, second.cold_start) == ("ok", b"1", False)
    assert first.memory_mb > 1
    assert yard.started == 1


async def test_a_worker_that_was_started_ahead_is_used(yard: Yard, rooms: Rooms) -> None:
    """After `warm` the first call finds a worker; to warm it twice starts no second one."""
    version = yard.version(rooms())
    await version.warm()
    await version.warm()
    assert not (await call(pool_of(version))).cold_start
    assert yard.started == 1


async def test_a_burst_starts_no_more_workers_than_it_needs(yard: Yard, rooms: Rooms) -> None:
    """Short calls that come together are all answered, most of them by workers that were started for others."""
    pool = pool_of(yard.version(rooms()), max_concurrency=50)
    ended = await asyncio.gather(*(call(pool) for _ in range(50)))
    assert {one.outcome for one in ended} == {"ok"}
    assert yard.started < 15


async def test_the_limit_of_a_function_is_exact(yard: Yard, rooms: Rooms) -> None:
    """Of calls that begin together as many run as may, with a worker each, and the others are refused."""
    pool = pool_of(yard.version(rooms()), max_concurrency=3)
    ended = await asyncio.gather(*(call(pool, 0.5) for _ in range(8)), return_exceptions=True)
    assert len([one for one in ended if isinstance(one, Ended) and one.outcome == "ok"]) == 3
    assert len([one for one in ended if isinstance(one, TooManyCalls)]) == 5
    assert yard.started == 3
    assert (await call(pool)).outcome == "ok"
    pool.max_concurrency = 4
    ended = await asyncio.gather(*(call(pool, 0.5) for _ in range(8)), return_exceptions=True)
    assert len([one for one in ended if isinstance(one, Ended)]) == 4


@pytest.mark.parametrize("limits", [{"workers": 2}, {"memory_mb": 150}])
async def test_the_limit_of_the_host_is_exact(yard: Yard, rooms: Rooms, limits: dict[str, int]) -> None:
    """All functions together have no more workers, and no more memory, than the host gives them."""
    room = rooms(**limits)
    pools = [pool_of(yard.version(room, number)) for number in (1, 2, 3)]
    ended = await asyncio.gather(*(call(pool, 0.5) for pool in pools), return_exceptions=True)
    assert len([one for one in ended if isinstance(one, Ended) and one.outcome == "ok"]) == 2
    assert len([one for one in ended if isinstance(one, TooManyCalls)]) == 1
    assert yard.workers == 2


async def test_who_waits_longest_makes_room(yard: Yard, rooms: Rooms) -> None:
    """In a host that is full, a call gets the place of the worker that was idle for the longest time."""
    room = rooms(workers=2)
    oldest, newer, newest = (pool_of(yard.version(room, number)) for number in (1, 2, 3))
    await call(oldest)
    await call(newer)
    assert (await call(newest)).outcome == "ok"
    assert yard.workers == 2
    assert not (await call(newer)).cold_start
    assert (await call(oldest)).cold_start


async def test_a_worker_that_needs_two_places_gets_both(yard: Yard, rooms: Rooms) -> None:
    """As many idle workers are stopped as a larger one needs, and none if that would not be enough."""
    room = rooms(memory_mb=200)
    small = [pool_of(yard.version(room, number)) for number in (1, 2, 3)]
    for pool in small:
        await call(pool)
    with pytest.raises(TooManyCalls):
        await call(pool_of(yard.version(room, 4, memory_mb=201)))
    assert yard.workers == 3
    assert (await call(pool_of(yard.version(room, 5, memory_mb=128)))).outcome == "ok"
    assert yard.workers == 2


async def test_idle_workers_are_stopped(yard: Yard, rooms: Rooms) -> None:
    """What nobody calls shrinks to one worker, and later to none; then it answers again."""
    room = rooms(idle=0.2, last_idle=0.8)
    pool = pool_of(yard.version(room))
    await asyncio.gather(*(call(pool, 0.3) for _ in range(3)))
    began = asyncio.get_running_loop().time()
    room.dismiss_unused()
    assert yard.workers == 3
    seen = []

    async def is_empty() -> bool:
        room.dismiss_unused()
        seen.append((yard.workers, asyncio.get_running_loop().time() - began))
        return yard.workers == 0

    await eventually(is_empty)
    assert max(when for count, when in seen if count == 1) >= 0.75
    assert (await call(pool)).cold_start


async def test_a_switch_drops_no_call(yard: Yard, rooms: Rooms) -> None:
    """While versions replace one another under load, each call is answered by the one that was active as it began."""
    room = rooms()
    versions = [yard.version(room, number) for number in range(1, 6)]
    pool = pool_of(versions[0], max_concurrency=8)
    running, answered = True, 0

    async def keep_calling() -> None:
        nonlocal answered
        while running:
            number = next(number for number, version in enumerate(versions, 1) if version is pool.active)
            ended = await call(pool, 0.02)
            assert (ended.outcome, int(ended.payload)) == ("ok", number)
            answered += 1

    async with asyncio.TaskGroup() as callers:
        for _ in range(8):
            callers.create_task(keep_calling())
        for version in versions[1:]:
            await version.warm()
            at_least = answered + 20
            pool.switch(version)

            async def are_answered(at_least: int = at_least) -> bool:
                return answered >= at_least

            await eventually(are_answered)
        running = False
    for version in versions[:-1]:
        async with asyncio.timeout(5):
            await version.until_unused()


async def test_a_call_that_runs_finishes_on_the_old_version(yard: Yard, rooms: Rooms) -> None:
    """A call outlives the switch; one that begins meanwhile is the new version's; then the old worker is gone."""
    room = rooms()
    old, new = yard.version(room, 1), yard.version(room, 2)
    pool = pool_of(old)
    await old.warm()
    late = asyncio.create_task(call(pool, 0.5))
    await asyncio.sleep(0)
    pool.switch(new)
    assert (await call(pool)).payload == b"2"
    assert not late.done()
    assert (await late).payload == b"1"
    await old.until_unused()
    assert yard.workers == 1


async def test_after_a_worker_that_died_there_is_another(yard: Yard, rooms: Rooms) -> None:
    """The call whose worker ends gets its error, and the next call a new worker."""
    pool = pool_of(yard.version(rooms()))
    await call(pool)
    assert (await call(pool, "exit")).outcome == "crashed"
    ended = await call(pool)
    assert (ended.outcome, ended.cold_start) == ("ok", True)
    await yard.until_workers(1)


async def test_a_worker_that_died_while_idle_is_no_calls_business(yard: Yard, rooms: Rooms) -> None:
    """A worker that ends between two calls is replaced, and no call fails for it."""
    room = rooms()
    pool = pool_of(yard.version(room))
    assert (await call(pool, "exit later")).outcome == "ok"

    async def is_empty() -> bool:
        room.dismiss_unused()
        return yard.workers == 0

    await eventually(is_empty)
    assert (await call(pool, "exit later")).outcome == "ok"
    await asyncio.sleep(0.3)  # it dies, and nobody looks
    assert (await call(pool)).outcome == "ok"


async def test_a_crash_loop_at_the_start_is_backed_off(yard: Yard, rooms: Rooms) -> None:
    """A version that cannot start is not started for every call, but is tried again later."""
    room = rooms(first_backoff=0.3, longest_backoff=0.5)
    pool = pool_of(yard.version(room, code="import os\nos._exit(1)\n"))
    assert (await call(pool)).outcome == "start_failed"
    for _ in range(5):
        with pytest.raises(NotReady) as refused:
            await call(pool)
        assert 0 < refused.value.retry_after <= 0.3
    assert yard.started == 1
    assert yard.workers == 0

    async def tried_again() -> bool:
        try:
            return (await call(pool)).outcome == "start_failed"
        except NotReady:
            return False

    await eventually(tried_again)
    assert yard.started == 2
    with pytest.raises(NotReady) as refused:
        await call(pool)
    assert refused.value.retry_after > 0.3


async def test_a_build_that_fails_says_why(yard: Yard, rooms: Rooms) -> None:
    """`warm` raises what the customer did wrong, and holds no place in the host."""
    room = rooms(workers=1)
    version = yard.version(room, code="import nothing_of_that_name\n")
    with pytest.raises(StartFailed, match="nothing_of_that_name"):
        await version.warm()
    assert (await call(pool_of(yard.version(room)))).outcome == "ok"


async def test_a_call_that_is_given_up_leaves_no_worker_behind(yard: Yard, rooms: Rooms) -> None:
    """The worker of a call that was cancelled answers no other: it would answer with the first one's result."""
    pool = pool_of(yard.version(rooms()))
    await call(pool)
    given_up = asyncio.create_task(call(pool, 3))
    await asyncio.sleep(0.1)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    ended = await call(pool)
    assert (ended.payload, ended.cold_start) == (b"1", True)
    await yard.until_workers(1)


async def test_without_a_version_nothing_answers(yard: Yard, rooms: Rooms) -> None:
    """A pool without a version is not ready; one whose version was taken away stops its workers."""
    pool = Pool(max_concurrency=1)
    with pytest.raises(NotReady):
        await call(pool)
    pool.switch(yard.version(rooms()))
    await call(pool)
    pool.switch(None)
    with pytest.raises(NotReady):
        await call(pool)
    await yard.until_workers(0)


async def test_the_room_is_emptied_at_the_end(yard: Yard) -> None:
    """To close the room ends every worker, those that answer too, and their processes."""
    room = Room(Limits())
    pool = pool_of(yard.version(room))
    await call(pool)
    late = asyncio.create_task(call(pool, 4))
    await asyncio.sleep(0.1)
    await room.close()
    assert yard.workers == 0
    assert (await late).outcome == "crashed"
    assert not processes_of(_UIDS)
