"""The bytes of a client that is not connected yet."""

import asyncio
from collections.abc import Callable
from typing import cast

from controlplane.access.allowlist import parse_address
from controlplane.access.caller import Address

_SIZE = 1024  # bytes; the longest message, a login, has 513. What a client sends beyond that waits in the kernel.


class HungUp(Exception):
    """The client has ended before it has said what it had to."""


class Incoming(asyncio.BufferedProtocol):
    """A client while it shakes hands and waits for its connection.

    `connected` is called with it, and `lost` when the client is gone.
    """

    transport: asyncio.Transport
    address: Address

    def __init__(self, connected: "Callable[[Incoming], object]", lost: "Callable[[Incoming], object]") -> None:
        self.has_ended = False
        self._connected = connected
        self._lost = lost
        self._buffer = bytearray(_SIZE)
        self._filled = 0
        self._waiter: asyncio.Future[None] | None = None

    async def take(self, size: int) -> bytes:
        """Return the next `size` bytes.

        Raises HungUp if fewer come.
        """
        while self._filled < size:
            if self.has_ended:
                raise HungUp
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._cut_off(size)

    def take_rest(self) -> bytes:
        """Return what has come and was not asked for: some clients do not wait for the answer."""
        return self._cut_off(self._filled)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast(asyncio.Transport, transport)
        self.address = parse_address(transport.get_extra_info("peername")[0].partition("%")[0])
        self._connected(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where there is room; reading pauses before there is none."""
        del sizehint
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take note of what has come."""
        self._filled += nbytes
        if self._filled == _SIZE:
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """Keep the connection open for what is on its way to the client."""
        self.has_ended = True
        self._wake()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell that the client is gone."""
        del exc
        self.has_ended = True
        self._wake()
        self._lost(self)

    def _cut_off(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        self._buffer[: self._filled - size] = self._buffer[size : self._filled]
        self._filled -= size
        if not self.has_ended:
            self.transport.resume_reading()
        return taken

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
