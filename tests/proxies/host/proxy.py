"""A running proxy for the tests, its customers and those whom they connect to: all on loopback."""

import asyncio
import hashlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any, Self

from prometheus_client import CollectorRegistry

from controlplane.access.caller import Address, Network
from controlplane.proxies.host.credentials import Credential, Credentials, Usage
from controlplane.proxies.host.destinations import Destinations
from controlplane.proxies.host.server import ProxyServer
from controlplane.proxies.host.socks import Limits
from tests.clock import MovableClock
from tests.stack import eventually

LOOPBACK: tuple[Network, ...] = (ip_network("127.0.0.0/8"), ip_network("::1"))
PASSWORD = b"correct horse battery staple"
CONNECT, BIND, ASSOCIATE = 1, 2, 3
SUCCEEDED, FAILED, NOT_ALLOWED, NO_NETWORK, NO_HOST, REFUSED, NO_COMMAND, NO_ADDRESS_TYPE = 0, 1, 2, 3, 4, 5, 7, 8

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def new_credential(name: str = "px_1", *, password: bytes = PASSWORD, **changes: Any) -> Credential:
    """Return a credential whose username is its id, and which is limited in nothing."""
    made = Credential(
        id=name,
        username=name,
        salt=b"salt",
        password_digest=hashlib.sha256(b"salt" + password).digest(),
        networks=(),
        max_connections=1000,
        bytes_per_second=0,
        expires_at=None,
    )
    return replace(made, **changes)


@asynccontextmanager
async def running(
    *, limits: Limits | None = None, allowed: Sequence[Network] = LOOPBACK, **destinations: Any
) -> "AsyncIterator[Proxy]":
    """Run a proxy that lets in `px_1`, and everybody to loopback."""
    clock, registry = MovableClock(), CollectorRegistry()
    credentials = Credentials(clock)
    credentials.put(new_credential())
    server = ProxyServer(
        credentials=credentials,
        destinations=Destinations(allowed_networks=allowed, **destinations),
        registry=registry,
        clock=clock,
        limits=limits,
    )
    port = await server.start(["127.0.0.1", "::1"], 0)
    try:
        yield Proxy(credentials, clock, registry, server, port)
    finally:
        await server.stop()


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy."""

    credentials: Credentials
    clock: MovableClock
    registry: CollectorRegistry
    server: ProxyServer
    port: int

    @asynccontextmanager
    async def dial(self, host: str = "127.0.0.1", *, source: str = "127.0.0.1") -> "AsyncIterator[Client]":
        """Open a connection to it, and say nothing yet."""
        local = (source, 0) if host == "127.0.0.1" else None
        client = Client(*await asyncio.open_connection(host, self.port, local_addr=local))
        try:
            yield client
        finally:
            await client.close()

    @asynccontextmanager
    async def connected(self, port: int, host: str = "127.0.0.1", *, name: str = "px_1") -> "AsyncIterator[Client]":
        """Connect to a target through it."""
        async with self.dial() as client:
            await client.connect(host, port, name=name)
            yield client

    def usage(self, name: str = "px_1") -> Usage:
        """Return what a credential has carried."""
        return self.credentials.usage()[name]

    def counted(self, metric: str, **labels: str) -> float:
        """Return a metric, 0 if it never moved."""
        return self.registry.get_sample_value(metric, labels) or 0

    def refused(self, reason: str) -> float:
        """Return how often something was refused for this reason."""
        return self.counted("htx_proxy_refused_total", reason=reason)

    async def quiet(self) -> None:
        """Wait until no connection is open."""

        async def is_quiet() -> bool:
            return self.credentials.open_sessions == 0

        await eventually(is_quiet)


@dataclass(frozen=True, slots=True)
class Client:
    """A customer's end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def log_in(self, name: str = "px_1", password: bytes = PASSWORD) -> int:
        """Log in; return the status, 0 for welcome."""
        self.writer.write(b"\5\1\2")
        assert await self.reader.readexactly(2) == b"\5\2"
        self.writer.write(login(name, password))
        version, status = await self.reader.readexactly(2)
        assert version == 1
        return status

    async def ask(self, command: int, host: str | bytes, port: int) -> tuple[int, Address, int]:
        """Send a request; return the reply, and the address and the port in it."""
        self.writer.write(request(command, host, port))
        version, reply, _, kind = await self.reader.readexactly(4)
        assert version == 5
        address = ip_address(await self.reader.readexactly(4 if kind == 1 else 16))
        return reply, address, int.from_bytes(await self.reader.readexactly(2))

    async def connect(self, host: str | bytes, port: int, *, name: str = "px_1") -> None:
        """Log in and connect to a target."""
        assert await self.log_in(name) == 0
        reply, *_ = await self.ask(CONNECT, host, port)
        assert reply == SUCCEEDED

    async def says(self, data: bytes) -> bytes:
        """Send something, end, and return all that comes."""
        self.writer.write(data)
        self.writer.write_eof()
        return await asyncio.wait_for(self.reader.read(), 20)

    async def is_cut(self) -> bool:
        """Wait until the connection is broken or ends; tell whether it is broken."""
        try:
            async with asyncio.timeout(20):
                while await self.reader.read(65536):
                    pass
        except ConnectionResetError:
            return True
        return False

    def break_off(self) -> None:
        """Break the connection, by an RST."""
        break_off(self.writer)

    async def close(self) -> None:
        """Hang up."""
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


class Target:
    """A server that customers connect to; `port` is the same on each of its addresses."""

    def __init__(self, handler: Handler, host: str = "127.0.0.1") -> None:
        self._handler = handler
        self._host = host

    async def __aenter__(self) -> Self:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, self._host, 0, backlog=1024)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Stop listening."""
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            await self._handler(reader, writer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes, and end when it ends."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


def break_off(writer: asyncio.StreamWriter) -> None:
    """Break a connection, by an RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def login(name: str, password: bytes) -> bytes:
    """Return the message of a login (RFC 1929)."""
    return bytes([1, len(name)]) + name.encode() + bytes([len(password)]) + password


def request(command: int, host: str | bytes, port: int) -> bytes:
    """Return a request; `host` is an address, or a name as bytes."""
    return bytes([5, command, 0]) + destination(host, port)


def destination(host: str | bytes, port: int) -> bytes:
    """Return where something goes, as SOCKS writes it."""
    if isinstance(host, bytes):
        return bytes([3, len(host)]) + host + struct.pack("!H", port)
    address = ip_address(host)
    return bytes([1 if isinstance(address, IPv4Address) else 4]) + address.packed + struct.pack("!H", port)
