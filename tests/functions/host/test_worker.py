"""A worker answers one call after the other, hands over what the function prints, and ends when told to."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controlplane.functions.host.worker import InvocationFailed
from tests.functions.host.workshop import Workshop, open_workshop
from tests.stack import eventually

_ECHO = "def handler(event, context): return event"
_SLEEP = "import time\ndef handler(event, context):\n    time.sleep(event)\n    return event"


@pytest.fixture(scope="module")
async def workshop(folder: Path) -> AsyncIterator[Workshop]:
    """A sandbox for this module."""
    async with open_workshop(folder) as workshop:
        yield workshop


async def test_state_is_kept(workshop: Workshop) -> None:
    """What a function keeps in a variable or in /tmp is there for the next call, and not for another worker."""
    source = """
import pathlib
count = 0
def handler(event, context):
    global count
    count += 1
    file = pathlib.Path("/tmp/count")
    file.write_text((file.read_text() if file.exists() else "") + "x")
    return [count, file.read_text()]
"""
    async with workshop.running(source) as function, workshop.running(source) as other:
        assert await function.call() == [1, "x"]
        assert await function.call() == [2, "xx"]
        assert await other.call() == [1, "x"]


async def test_lines_come_before_the_answer(workshop: Workshop) -> None:
    """What a function has printed, also without an end of line, is handed over before its answer."""
    source = """
import sys
print("loading")
def handler(event, context):
    print("one"); print("two\\0three", file=sys.stderr)
    print("\\nunfinished", end="", flush=True)
    sys.stdout.buffer.write(b" \\xff")
"""
    async with workshop.running(source) as function:
        assert function.lines == [("stdout", "loading")]
        await function.call()
        assert function.printed()[1:] == ["one", "", "unfinished \N{REPLACEMENT CHARACTER}"]
        assert function.printed("stderr") == ["two\N{REPLACEMENT CHARACTER}three"]
        await function.call()
        assert function.printed().count("one") == 2


async def test_last_words(workshop: Workshop) -> None:
    """What a dying function prints is handed over."""
    source = (
        "import os, sys\ndef handler(event, context):\n    print('bye', file=sys.stderr, flush=True)\n    os._exit(1)"
    )
    async with workshop.running(source) as function:
        with pytest.raises(InvocationFailed):
            await function.call()
        assert function.printed("stderr") == ["bye"]


async def test_one_call_at_a_time(workshop: Workshop) -> None:
    """A second call at the same time is a bug of the caller's, and does not disturb the first."""
    async with workshop.running(_SLEEP) as function:
        first = asyncio.create_task(function.call(0.2))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another call"):
            await function.call(0)
        assert await first == 0.2
        assert await function.call(0) == 0


async def test_cancelled_call(workshop: Workshop) -> None:
    """A call that is given up ends the worker, which is still at it."""
    async with workshop.running(_SLEEP) as function:
        call = asyncio.create_task(function.call(100))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not function.worker.alive
        with pytest.raises(InvocationFailed) as failed:
            await function.call(0)
        assert failed.value.kind == "crashed"


async def test_dies_while_idle(workshop: Workshop) -> None:
    """A worker that ends by itself between two calls is seen to be dead, and says so when it is called."""
    source = "import os, threading\ndef handler(event, _): threading.Timer(0.05, os._exit, [event]).start()"
    async with workshop.running(source) as function:
        await function.call(5)

        async def dead() -> bool:
            return not function.worker.alive

        await eventually(dead)
        with pytest.raises(InvocationFailed, match="exit status 5") as failed:
            await function.call(5)
        assert failed.value.kind == "crashed"


async def test_memory_peak(workshop: Workshop) -> None:
    """The memory peak is of the worker's life, and is still known after its end."""
    async with workshop.running("def handler(event, context): return len(bytearray(event << 20))") as function:
        before = function.worker.memory_peak()
        await function.call(50)
        await function.call(1)
        assert function.worker.memory_peak() - before > 49 << 20
        assert function.worker.memory_peak() <= 128 << 20
    assert function.worker.memory_peak() > 50 << 20


async def test_stop_twice(workshop: Workshop) -> None:
    """Stopping what is stopped does nothing, also at the same time."""
    async with workshop.running(_ECHO) as function:
        await asyncio.gather(function.worker.stop(), function.worker.stop())
        await function.worker.stop()
        assert not function.worker.alive


async def test_descriptors(workshop: Workshop) -> None:
    """Workers leave no descriptor open in the host, however they end."""
    async with workshop.running(_ECHO) as function:  # what is opened once and for all
        await function.call()
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - plain names
    for source, seconds in ((_ECHO, 5), (_SLEEP, 0.05), ("import os\ndef handler(event, _): os._exit(0)", 5)):
        async with workshop.running(source) as function:
            try:
                await function.call(10, seconds=seconds)
            except InvocationFailed as failed:
                assert failed.kind in {"timeout", "crashed"}  # noqa: PT017 - two of the three
    await asyncio.sleep(0)  # transports close in the loop's next round
    assert set(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208 - likewise


async def test_many(workshop: Workshop) -> None:
    """Many workers start and answer at the same time, each with its own."""

    async def one(number: int) -> None:
        async with workshop.running(_ECHO, tenant=f"ac_{number % 5}") as function:
            for event in itertools.islice(itertools.count(number, 100), 20):
                assert await function.call(event) == event

    await asyncio.gather(*(one(number) for number in range(20)))
