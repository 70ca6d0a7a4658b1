"""A port that leads to a cluster, by a way that can be disturbed as networks are."""

import asyncio
import itertools
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Literal

from tests.stack import free_port

Connect = Callable[[], Awaitable[tuple[StreamReader, StreamWriter]]]
# refuses: nobody listens, and whoever was connected is so no longer; swallows: nothing comes through, and nobody is
# told; slow: each piece takes `DELAY` longer, either way; cuts: a connection breaks once it has carried a few pieces.
Disturbance = Literal["refuses", "swallows", "slow", "cuts"]

DELAY = 0.2  # seconds
_PIECES = 12  # the first connection that is cut carries one piece, the next one two, and so on up to this


class Proxy:
    """The port, `port`, on 127.0.0.1; `connect` opens a connection to the cluster."""

    def __init__(self, connect: Connect) -> None:
        self.port = free_port()
        self._connect = connect
        self._server: asyncio.Server | None = None
        self._passes = asyncio.Event()
        self._disturbance: Disturbance | None = None
        self._numbers = itertools.count()
        self._writers: set[StreamWriter] = set()

    async def disturb(self, disturbance: Disturbance) -> None:
        """Disturb whoever is connected and whoever comes, until it is mended."""
        self._disturbance = disturbance
        if disturbance == "refuses":
            self.close()
        elif disturbance == "swallows":
            self._passes.clear()

    async def mend(self) -> None:
        """Let all be well again; what was swallowed comes through after all, as TCP sends it once more."""
        self._disturbance = None
        self._passes.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)

    def close(self) -> None:
        """Listen no longer, and break all connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()

    async def _carry(self, reader: StreamReader, writer: StreamWriter) -> None:
        writers = {writer}
        self._writers.add(writer)
        try:
            await self._passes.wait()
            there, back = await self._connect()
            writers.add(back)
            self._writers.add(back)
            pieces = itertools.repeat(None, next(self._numbers) % _PIECES + 1)
            ways = [self._copy(reader, back, pieces), self._copy(there, writer, pieces)]
            tasks = [asyncio.create_task(way) for way in ways]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        except OSError:  # the cluster is not there
            writer.transport.abort()
        finally:
            for each in writers:
                each.close()
            self._writers -= writers

    async def _copy(self, reader: StreamReader, writer: StreamWriter, pieces: Iterator[None]) -> None:
        with suppress(OSError):
            while piece := await reader.read(65536):
                await self._passes.wait()
                if self._disturbance == "slow":
                    await asyncio.sleep(DELAY)
                writer.write(piece)
                await writer.drain()
                if self._disturbance == "cuts" and next(pieces, self) is self:
                    return


@asynccontextmanager
async def proxy(connect: Connect) -> AsyncIterator[Proxy]:
    """Run a proxy; nothing is disturbed yet."""
    running = Proxy(connect)
    await running.mend()
    try:
        yield running
    finally:
        running.close()
