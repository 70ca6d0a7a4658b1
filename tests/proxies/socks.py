"""A client of SOCKS5 and a target to reach through it."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from typing import Any


class Refused(Exception):
    """The proxy said no: by this reply, or, below zero, to the login."""


async def connect(
    proxy: dict[str, Any], port: int, *, password: str | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection to a port of 127.0.0.1 through a proxy, as the API shows it.

    Raises Refused.
    """
    reader, writer = await asyncio.open_connection(proxy["host"], proxy["port"])
    try:
        await _shake_hands(reader, writer, proxy["username"].encode(), (password or proxy["password"]).encode())
        writer.write(b"\x05\x01\x00\x01\x7f\x00\x00\x01" + port.to_bytes(2, "big"))
        _check((await reader.readexactly(10))[1])
    except BaseException:
        writer.close()
        raise
    return reader, writer


async def _shake_hands(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, username: bytes, password: bytes
) -> None:
    writer.write(b"\x05\x01\x02")
    await reader.readexactly(2)
    writer.write(bytes([1, len(username)]) + username + bytes([len(password)]) + password)
    _check(-(await reader.readexactly(2))[1])


def _check(reply: int) -> None:
    if reply:
        raise Refused(reply)


async def lets_in(proxy: dict[str, Any], port: int, *, password: str | None = None) -> bool:
    """Tell whether a proxy carries a connection."""
    try:
        _, writer = await connect(proxy, port, password=password)
    except (Refused, OSError, asyncio.IncompleteReadError):
        return False
    writer.close()
    return True


async def wait_until_cut(reader: asyncio.StreamReader) -> None:
    """Wait until a connection has ended, by whatever it is cut; no more bytes may come."""
    with suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 10) == b""


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    """A server that sends back what it gets; its port."""
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        with closing(writer), suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writers.discard(writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


async def carry(proxy: dict[str, Any], port: int, size: int) -> None:
    """Send so many bytes to an echo through a proxy, and check that they come back."""
    reader, writer = await connect(proxy, port)
    sent = hashlib.sha256(b"").digest() * (size // 32 + 1)
    writer.write(sent[:size])
    assert await reader.readexactly(size) == sent[:size]
    writer.close()
    await writer.wait_closed()
