"""The launcher of servers and its servers, as the tests see them."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from controlplane.local.child import Child
from tests.faults.points import Scope
from tests.stack import eventually


class Process:
    """A server process, which can be killed or paused at one of its points (`points.py`).

    `pid` is its number. `killed_at` is the moment at which it was killed, if it was. `came` has the names of those that
    came since it was told one. `seconds` learns how long each point takes; the next process is told the same.
    """

    pid: int

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: dict[str, float]) -> None:
        self.killed_at: str | None = None
        self.came: list[str] = []
        self.ended = asyncio.Event()
        self.paused = asyncio.Event()
        self._writer = writer
        self._seconds = seconds
        self._ready = asyncio.Event()
        self._armed = asyncio.Event()
        self._reading = asyncio.create_task(self._read(reader))

    async def ready(self) -> bool:
        """Wait until it serves, or has ended; return whether it serves."""
        await self._unless_ended(self._ready.wait())
        return self._ready.is_set()

    async def arm(self, moment: int | str) -> None:
        """Let it be killed at the moment of this number or name from now (`Points.arm`); it may have ended before."""
        self._armed.clear()
        self._writer.write(json.dumps({"kill_at": moment, "seconds": self._seconds}).encode() + b"\n")
        await self._unless_ended(self._armed.wait())

    async def pause_at(self, *names: str) -> None:
        """Let it be paused where it comes to these points one after the other (`Points.pause_at`)."""
        self.paused.clear()
        self._armed.clear()
        self._writer.write(json.dumps({"pause_at": names}).encode() + b"\n")
        await self._unless_ended(self._armed.wait())

    def go_on(self) -> None:
        """Let it go on that was paused."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill it, if it still runs."""
        if not self.ended.is_set():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def _unless_ended(self, wanted: Coroutine[Any, Any, Any]) -> None:
        waits = {asyncio.create_task(wanted), asyncio.create_task(self.ended.wait())}
        _, left = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in left:
            wait.cancel()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while line := await reader.readline():
                self._hear(json.loads(line))
        self._writer.close()
        self.ended.set()

    def _hear(self, line: Mapping[str, Any]) -> None:
        match line:
            case {"pid": pid}:
                self.pid = pid
            case {"ready": True}:
                self._ready.set()
            case {"armed": _}:
                self._armed.set()
            case {"came": moment}:
                self.came.append(moment)
            case {"passed": point, "seconds": seconds}:
                self._seconds[point] = seconds
            case {"paused": _}:
                self.paused.set()
            case {"killed": moment}:
                self.killed_at = moment


class Launcher:
    """The program that forks servers."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def start(self, settings: Mapping[str, str], *, scope: Scope, seconds: dict[str, float]) -> Process:
        """Start a server with these `HTX_*` variables."""
        reader, writer = await asyncio.open_unix_connection(str(self._socket))
        writer.write(json.dumps({"settings": settings, "scope": scope}).encode() + b"\n")
        return Process(reader, writer, seconds)


@asynccontextmanager
async def launcher(socket: Path) -> AsyncIterator[Launcher]:
    """Run the launcher; its servers end with it, or rather with our connections to them."""
    program = Child("the launcher of servers", [sys.executable, "-m", "tests.faults.server", str(socket)])
    await program.start()

    async def listens() -> bool:
        assert program.is_running, "the launcher has ended"
        with suppress(OSError):
            _, writer = await asyncio.open_unix_connection(str(socket))
            writer.close()
            return True
        return False

    try:
        await eventually(listens)
        yield Launcher(socket)
    finally:
        await program.stop()
