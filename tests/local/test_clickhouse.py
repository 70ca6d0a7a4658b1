"""The embedded ClickHouse as `controlplane up` has it: started, killed, stopped, and in bad places."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from controlplane.local.clickhouse import EmbeddedClickHouse, EmbeddedClickHouseError
from tests.stack import eventually, free_port


@pytest.fixture
def data_dir(folder: Path) -> Path:
    """A data folder with a short path."""
    return folder / "ch"


@pytest.fixture
async def server(data_dir: Path) -> AsyncIterator[EmbeddedClickHouse]:
    """A server that runs."""
    server = EmbeddedClickHouse(data_dir=data_dir, port=free_port())
    await server.start()
    yield server
    await server.stop()


async def ask(server: EmbeddedClickHouse, sql: str) -> str | None:
    """Return what the admin is answered; None while nobody answers."""
    try:
        async with httpx2.AsyncClient(timeout=30) as client:
            answer = await client.post(server.admin_url, content=sql)
    except httpx2.TransportError:
        return None
    assert answer.status_code == 200, answer.text
    return answer.text.strip()


def processes(data_dir: Path) -> dict[int, str]:
    """Return the processes that work on this folder, by their number."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(data_dir) in line:
            found[int(process.name)] = line
    return found


async def test_it_is_back_after_a_kill_and_gone_after_a_stop(server: EmbeddedClickHouse, data_dir: Path) -> None:
    """The admin gets in; killed, it takes its engines along and is started again; stopped, nothing of it is left."""
    assert await ask(server, "SELECT 6 * 7") == "42"
    first = processes(data_dir)
    assert len(first) == 2, "the gateway and an engine"
    os.kill(next(pid for pid, line in first.items() if "chdb.engine" not in line), signal.SIGKILL)

    async def is_back() -> bool:
        return await ask(server, "SELECT 6 * 7") == "42"

    async def are_gone() -> bool:
        return not first.keys() & processes(data_dir).keys()

    await eventually(is_back)
    await eventually(are_gone)  # the kernel ends the engine with the gateway, and takes its time
    await server.stop()
    assert processes(data_dir) == {}


async def test_a_busy_port_is_named(data_dir: Path) -> None:
    """A port that is taken is named, with the setting that changes it."""
    port = free_port()
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", port):
        with pytest.raises(EmbeddedClickHouseError, match=rf"Port {port} cannot be used \(.*set HTX_CLICKHOUSE_PORT"):
            await EmbeddedClickHouse(data_dir=data_dir, port=port).start()


async def test_a_long_path_is_no_hindrance(folder: Path) -> None:
    """Engines serve in a data folder whose path is longer than that of a Unix socket may be."""
    long = folder / ("a" * 100)
    server = EmbeddedClickHouse(data_dir=long, port=free_port())
    await server.start()
    assert await ask(server, "SELECT 6 * 7") == "42"
    await server.stop()


async def test_a_start_that_fails_says_so(folder: Path) -> None:
    """A gateway that cannot use its folder is told as one that ended at its start."""
    (folder / "file").write_text("no folder")
    with pytest.raises(EmbeddedClickHouseError, match="has ended at its start; the lines above say why"):
        await EmbeddedClickHouse(data_dir=folder / "file", port=free_port()).start()


async def test_a_start_that_is_given_up_leaves_nothing(data_dir: Path) -> None:
    """A start that is cancelled, as when another server did not start, takes its gateway along."""
    start = asyncio.create_task(EmbeddedClickHouse(data_dir=data_dir, port=free_port()).start())

    async def has_begun() -> bool:
        return bool(processes(data_dir))

    await eventually(has_begun)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert processes(data_dir) == {}
