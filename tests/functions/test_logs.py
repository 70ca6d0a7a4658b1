"""Logs of functions: kept once, shown in their order, awaited, and trimmed; a played host reports them."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import func
from sqlmodel import col, select

from controlplane.functions.logs import FunctionLogLine
from tests.doors import Door
from tests.functions.orders import FUNCTIONS, create, ready
from tests.functions.played import PlayedHost, line, played_host
from tests.stack import Customer, Stack, eventually

LOGS = f"{FUNCTIONS}/thumbnails/logs"
SOON = 10  # seconds; much less than is waited for, much more than it takes


async def ask(customer: Customer, **query: Any) -> httpx.Response:
    """Ask for lines of the function's log."""
    answer = await customer.call("GET", LOGS, params=query, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


async def texts(customer: Customer, **query: Any) -> list[str]:
    """Return the texts of the lines that are asked for."""
    return [each["text"] for each in (await ask(customer, **query)).json()]


async def test_lines_are_shown_as_they_were_reported(host: PlayedHost, customer: Customer, door: Door) -> None:
    """A printed line has its text, time and call; the line of a call has how it ended besides, and nothing else has."""
    made = await create(customer)
    printed = line(made["id"], 1, "hello \0", request_id="r-1")
    ended = line(made["id"], 1, "", stream="request", request_id="r-1", outcome="ok", duration_ms=1.5, memory_mb=20)
    await host.log(host.next_batch(), printed, ended)
    first, second = (
        await door.call("ListFunctionLogs", {"name": "thumbnails"}, authorization=f"Bearer {customer.token}")
    ).result
    assert first.pop("time")
    assert first == {
        "sequence": 1,
        "version": 1,
        "stream": "stdout",
        "text": "hello \N{REPLACEMENT CHARACTER}",
        "request_id": "r-1",
    }
    assert (second["sequence"], second["stream"], second["outcome"]) == (2, "request", "ok")
    assert (second["duration_ms"], second["memory_mb"]) == (1.5, 20)


async def test_a_log_can_be_followed(host: PlayedHost, customer: Customer) -> None:
    """Each answer's Link leads on to what comes after it, asked in the same way; -1 begins with the newest lines."""
    made = await create(customer)
    await host.log(host.next_batch(), *(line(made["id"], 1, str(number)) for number in range(5)))
    first = await ask(customer, page_size=2, version=1)
    assert [each["text"] for each in first.json()] == ["0", "1"]
    assert first.headers["link"] == f'<{LOGS}?after=2&page_size=2&version=1>; rel="next"'
    address = first.headers["link"].partition(">")[0].removeprefix("<")
    assert [each["text"] for each in (await customer.call("GET", address)).json()] == ["2", "3"]
    assert await texts(customer, after=-1, page_size=2) == ["3", "4"]
    assert await texts(customer, after=5) == []
    assert (await ask(customer, after=5)).headers["link"] == f'<{LOGS}?after=5>; rel="next"'


async def test_lines_of_one_version(host: PlayedHost, customer: Customer) -> None:
    """The lines of one version can be asked for alone, and keep their places in the whole log."""
    made = await create(customer)
    await host.log(host.next_batch(), *(line(made["id"], 1 + number % 2, str(number)) for number in range(4)))
    assert await texts(customer, version=2) == ["1", "3"]
    assert await texts(customer, version=2, after=2) == ["3"]
    assert await texts(customer, version=1, after=-1, page_size=1) == ["2"]


async def test_a_line_wakes_whoever_waits(stack: Stack, host: PlayedHost, customer: Customer) -> None:
    """Who waits for a line gets it as soon as it is reported, and who waits for none an empty list in time."""
    made = await create(customer)
    assert await texts(customer, wait=1) == []
    waiting = stack.server.house.function_logs._waiting  # noqa: SLF001 - nothing shows from outside that somebody waits
    async with asyncio.timeout(SOON):
        asked = asyncio.create_task(texts(customer, after=-1, wait=30))

        async def somebody_waits() -> bool:
            return made["id"] in waiting._waiters  # noqa: SLF001

        await eventually(somebody_waits)
        assert waiting._watch is not None  # noqa: SLF001
        waiting._watch.cancel()  # noqa: SLF001 - only what is announced wakes now
        await host.log(host.next_batch(), line(made["id"], 1, "awaited"))
        assert await asked == ["awaited"]


async def test_a_batch_is_kept_once(host: PlayedHost, customer: Customer) -> None:
    """A batch that comes again, or late, adds nothing; another start of the host counts its batches anew."""
    made = await create(customer)
    batch = host.next_batch()
    for text in ("once", "again"):
        await host.log(batch, line(made["id"], 1, text))
    await host.log(batch - 1, line(made["id"], 1, "late"))
    assert await texts(customer) == ["once"]
    await host.restart()
    await host.log(host.next_batch(), line(made["id"], 1, "anew"))
    assert await texts(customer) == ["once", "anew"]


async def test_the_newest_lines_of_each_version_are_kept(stack: Stack, host: PlayedHost, customer: Customer) -> None:
    """What is beyond 10,000 lines of a version goes, a thousand at a time, and no line of another version."""
    made = await create(customer)
    await host.log(host.next_batch(), line(made["id"], 2, "of another"))
    for thousand in range(12):
        lines = (line(made["id"], 1, f"{thousand}") for _ in range(1000))
        await host.log(host.next_batch(), *lines)
    statement = (
        select(FunctionLogLine.version, func.count(), func.max(col(FunctionLogLine.sequence)))
        .where(col(FunctionLogLine.function_id) == made["id"])
        .group_by(col(FunctionLogLine.version))
        .order_by(col(FunctionLogLine.version))
    )
    assert [tuple(row) for row in await stack.server.store.fetch(statement)] == [(1, 10_000, 12_001), (2, 1, 1)]
    assert await texts(customer, version=1, page_size=1) == ["2"]


async def test_lines_of_what_is_gone_are_dropped(host: PlayedHost, customer: Customer) -> None:
    """Lines of a function that is gone or never was are dropped, and those beside them in the batch are kept."""
    made = await ready(customer)
    gone = await ready(customer, "gone")
    await customer.call("DELETE", f"{FUNCTIONS}/gone")
    await customer.until("gone", f"{FUNCTIONS}/gone")
    lines = [line(each, 1, "hello") for each in (gone["id"], made["id"], "fn_none")]
    await host.log(host.next_batch(), *lines)
    assert await texts(customer) == ["hello"]


async def test_another_region_writes_nothing(stack: Stack, folder: Path, host: PlayedHost, customer: Customer) -> None:
    """A host of another region adds no line to a function's log."""
    made = await create(customer)
    async with played_host(stack, folder, region="local", follows=False) as abroad:
        await abroad.log(1, line(made["id"], 1, "from afar"))
    await host.log(host.next_batch(), line(made["id"], 1, "from here"))
    assert await texts(customer) == ["from here"]
