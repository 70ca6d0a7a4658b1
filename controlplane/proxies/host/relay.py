"""The bytes of a CONNECT, both ways."""

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from controlplane.proxies.host.credentials import Session
from controlplane.proxies.host.incoming import Incoming

# One for all connections: the loop fills it and hands it to buffer_updated() without doing anything else in between.
_BUFFER = memoryview(bytearray(65536))
_FULL, _SPENT = 1, 2  # why a side does not read: the other one is slow, or the bandwidth is used up
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time


async def relay(client: Incoming, target: socket.socket, session: Session) -> None:
    """Carry bytes between a client and a target until both have ended, one is lost, or the session is cut."""
    up, down = _Side(session, session.count_up), _Side(session, session.count_down)
    up.other, down.other = down, up
    up.transport = client.transport
    await asyncio.get_running_loop().create_connection(lambda: down, sock=target)
    try:
        session.cut = up.reset
        client.transport.set_protocol(up)
        up.pass_on(client.take_rest())
        if client.has_ended:
            up.eof_received()
        await up.lost.wait()
        await down.lost.wait()
    finally:
        up.reset()


class _Side(asyncio.BufferedProtocol):
    """What comes from one of the two, on its way to the other."""

    transport: asyncio.Transport
    other: "_Side"

    def __init__(self, session: Session, count: Callable[[int], None]) -> None:
        self.lost = asyncio.Event()
        self._bandwidth = session.bandwidth
        self._count = count
        self._loop = asyncio.get_running_loop()
        self._has_ended = False
        self._held = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; the target's side alone is told, the client's was connected before."""
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        del sizehint
        return _BUFFER[: self._bandwidth.chunk]

    def buffer_updated(self, nbytes: int) -> None:
        """Pass on what has come."""
        self.pass_on(bytes(_BUFFER[:nbytes]))  # a copy, for the transport may keep it

    def pass_on(self, data: bytes) -> None:
        """Count bytes, send them to the other one, and pause as long as they cost."""
        if not data or self.other.transport.is_closing():
            return
        self._count(len(data))
        self.other.transport.write(data)
        if wait := self._bandwidth.take(len(data), self._loop.time()):
            self._hold(_SPENT)
            self._loop.call_later(wait, self._release, _SPENT)

    def pause_writing(self) -> None:
        """Let the other one send nothing while ours does not take it."""
        self.other._hold(_FULL)  # noqa: SLF001

    def resume_writing(self) -> None:
        """Let the other one go on."""
        self.other._release(_FULL)  # noqa: SLF001

    def eof_received(self) -> bool:
        """Pass on that nothing more comes from here; what comes from there goes on."""
        self._has_ended = True
        if self.other._has_ended:  # noqa: SLF001
            self.transport.close()
            self.other.transport.close()
        elif not self.other.transport.is_closing():
            with suppress(OSError):  # it has just gone: connection_lost() will say so
                self.other.transport.write_eof()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Break the other connection too, unless both had come to their end."""
        del exc
        self.lost.set()
        if not (self._has_ended and self.other._has_ended):  # noqa: SLF001
            self.reset()

    def reset(self) -> None:
        """Break both connections, by an RST: an end in the middle must not look like the end."""
        for transport in (self.transport, self.other.transport):
            if not transport.is_closing():
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            transport.abort()

    def _hold(self, reason: int) -> None:
        """Do not read, for this reason too."""
        self._held |= reason
        if not self._has_ended and not self.transport.is_closing():
            self.transport.pause_reading()

    def _release(self, reason: int) -> None:
        """Read again unless there is another reason not to."""
        self._held &= ~reason
        if not self._held and not self._has_ended and not self.transport.is_closing():
            self.transport.resume_reading()
