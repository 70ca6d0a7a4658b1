"""What a client says before it is connected: SOCKS 5 (RFC 1928) with a username and a password (RFC 1929), alone."""

import asyncio
import errno
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, ip_address
from typing import cast

from controlplane.access.caller import Address
from controlplane.clock import Clock
from controlplane.proxies.host.connect import connect
from controlplane.proxies.host.credentials import Credential, Credentials, Ended, OverLimit, Session
from controlplane.proxies.host.destinations import Destinations, Refused, Unknown
from controlplane.proxies.host.incoming import HungUp, Incoming
from controlplane.proxies.host.logins import FailedLogins
from controlplane.proxies.host.metrics import Metrics
from controlplane.proxies.host.relay import relay
from controlplane.proxies.host.udp import Association
from controlplane.proxies.host.wire import NAME, SIZES, packed_address

_VERSION, _LOGIN_VERSION = 5, 1
_METHOD, _NO_METHOD = 2, 0xFF
_CONNECT, _ASSOCIATE = 1, 3
_NOWHERE = packed_address(IPv4Address(0), 0)
# Whoever is not known is checked like everybody else, so that the time tells nobody which names there are.
_NOBODY = Credential("", "", bytes(16), bytes(32), (), 0, 0, None)


@dataclass(frozen=True, slots=True)
class Limits:
    """What strangers and customers may take of a host; times in seconds.

    `idle_seconds` is how long a connection may carry nothing. An answer to a wrong login waits for `first_delay`, and
    twice as long each time, up to `most_delay`. `handshakes` are unfinished ones, of one client address (of IPv6 a /64)
    only so many. `connections` are those of all credentials together: each takes up to four files.
    """

    handshake_seconds: float = 10.0
    connect_seconds: float = 10.0
    idle_seconds: float = 1800.0
    first_delay: float = 0.25
    most_delay: float = 8.0
    handshakes: int = 2048
    handshakes_per_address: int = 256
    connections: int = 4000


class Reply(IntEnum):
    """What a request is answered with (RFC 1928, 6)."""

    SUCCEEDED = 0
    FAILED = 1
    NOT_ALLOWED = 2
    NETWORK_UNREACHABLE = 3
    HOST_UNREACHABLE = 4
    CONNECTION_REFUSED = 5
    COMMAND_NOT_SUPPORTED = 7
    ADDRESS_TYPE_NOT_SUPPORTED = 8


_REPLIES = {
    errno.ENETUNREACH: Reply.NETWORK_UNREACHABLE,
    errno.EHOSTUNREACH: Reply.HOST_UNREACHABLE,
    errno.ECONNREFUSED: Reply.CONNECTION_REFUSED,
}


class Refusal(Exception):
    """The client is turned away: `reason` is for the counter, `answer` is the last that is sent to it."""

    def __init__(self, reason: str, answer: bytes = b"") -> None:
        super().__init__(reason)
        self.reason = reason
        self.answer = answer


class Socks:
    """Serves clients, one call each."""

    def __init__(
        self,
        *,
        credentials: Credentials,
        destinations: Destinations,
        logins: FailedLogins,
        metrics: Metrics,
        clock: Clock,
        limits: Limits,
    ) -> None:
        self._credentials = credentials
        self._destinations = destinations
        self._logins = logins
        self._metrics = metrics
        self._clock = clock
        self._limits = limits

    async def serve(self, client: Incoming, shaken: Callable[[], object]) -> None:
        """Serve a client; `shaken` is called once it has said who it is and what it wants. The caller then hangs up."""
        try:
            request = await self._shake_hands(client)
            shaken()
            await self._carry(client, request)
        except Refusal as refusal:
            self._metrics.refused.labels(refusal.reason).inc()
            client.transport.write(refusal.answer)

    async def _shake_hands(self, client: Incoming) -> "_Request":
        deadline = asyncio.get_running_loop().time() + self._limits.handshake_seconds
        try:
            async with asyncio.timeout_at(deadline):
                username, password = await _read_login(client)
            credential = await self._log_in(client, username, password)
            async with asyncio.timeout_at(deadline):
                return await _read_request(client, credential)
        except TimeoutError:
            raise Refusal("slow") from None
        except HungUp:
            raise Refusal("hung_up") from None

    async def _log_in(self, client: Incoming, username: str, password: bytes) -> Credential:
        found = self._credentials.find(username)
        is_right = (found or _NOBODY).has_password(password)
        if found is not None and is_right and found.admits(client.address, self._clock.now()):
            client.transport.write(bytes([_LOGIN_VERSION, 0]))
            return found
        self._metrics.failed_logins.inc()
        await asyncio.sleep(self._logins.count(str(client.address), username))
        raise Refusal("login", bytes([_LOGIN_VERSION, 1]))

    async def _carry(self, client: Incoming, request: "_Request") -> None:
        if self._credentials.open_sessions >= self._limits.connections:
            raise _refusal("full", Reply.FAILED)
        cut = cast("asyncio.Task[None]", asyncio.current_task()).cancel
        try:
            with self._credentials.session(request.credential, client.address, cut) as session:
                if request.command == _CONNECT:
                    await self._connect(client, request, session)
                else:
                    await self._associate(client, session)
        except OverLimit:
            raise _refusal("limit", Reply.NOT_ALLOWED) from None
        except Ended:
            raise _refusal("ended", Reply.NOT_ALLOWED) from None

    async def _connect(self, client: Incoming, request: "_Request", session: Session) -> None:
        deadline = asyncio.get_running_loop().time() + self._limits.connect_seconds
        try:
            async with asyncio.timeout_at(deadline):
                addresses = await self._destinations.resolve(request.host, request.port, session.lookups)
            target = await connect(addresses, request.port, deadline)
        except Refused as error:
            raise _refusal(error.reason, Reply.NOT_ALLOWED) from None
        except Unknown:
            raise _refusal("name", Reply.HOST_UNREACHABLE) from None
        except TimeoutError:
            raise _refusal("timeout", Reply.HOST_UNREACHABLE) from None
        except OSError as error:
            raise _refusal("target", _REPLIES.get(error.errno or 0, Reply.FAILED)) from None
        host, port, *_ = target.getsockname()
        client.transport.write(_answer(Reply.SUCCEEDED, packed_address(ip_address(host), port)))
        session.count_connection()
        await relay(client, target, session)

    async def _associate(self, client: Incoming, session: Session) -> None:
        """Serve an association. Where its request says that datagrams will come from is often wrong, behind a NAT."""
        ours, theirs = (client.transport.get_extra_info(name)[0] for name in ("sockname", "peername"))

        def refused(reason: str) -> None:
            self._metrics.refused.labels(reason).inc()

        with closing(Association(session, self._destinations, theirs, refused)) as association:
            try:
                host, port = await association.open(ours)
            except OSError:
                raise _refusal("full", Reply.FAILED) from None
            client.transport.write(_answer(Reply.SUCCEEDED, packed_address(ip_address(host), port)))
            session.count_connection()
            await association.serve(client)


@dataclass(frozen=True, slots=True)
class _Request:
    credential: Credential
    command: int
    host: Address | bytes
    port: int


async def _read_login(client: Incoming) -> tuple[str, bytes]:
    version, count = await client.take(2)
    if version != _VERSION:
        raise Refusal("malformed")
    if _METHOD not in await client.take(count):
        raise Refusal("method", bytes([_VERSION, _NO_METHOD]))
    client.transport.write(bytes([_VERSION, _METHOD]))
    version, size = await client.take(2)
    if version != _LOGIN_VERSION:
        raise Refusal("malformed")
    # What is not UTF-8 becomes something that no username is, and does not look like another one.
    username = (await client.take(size)).decode(errors="surrogateescape")
    (size,) = await client.take(1)
    return username, await client.take(size)


async def _read_request(client: Incoming, credential: Credential) -> _Request:
    version, command, _, kind = await client.take(4)
    if version != _VERSION:
        raise Refusal("malformed")
    if kind == NAME:
        (size,) = await client.take(1)
        host: Address | bytes = await client.take(size)
    elif kind in SIZES:
        host = ip_address(await client.take(SIZES[kind]))
    else:
        raise _refusal("address_type", Reply.ADDRESS_TYPE_NOT_SUPPORTED)
    port = int.from_bytes(await client.take(2), "big")
    if command not in (_CONNECT, _ASSOCIATE):
        raise _refusal("command", Reply.COMMAND_NOT_SUPPORTED)
    return _Request(credential, command, host, port)


def _refusal(reason: str, reply: Reply) -> Refusal:
    return Refusal(reason, _answer(reply, _NOWHERE))


def _answer(reply: Reply, bound: bytes) -> bytes:
    return bytes([_VERSION, reply, 0]) + bound
