"""The datagrams of a UDP ASSOCIATE (RFC 1928, 7)."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, cast

from controlplane.access.caller import Address
from controlplane.proxies.host.credentials import Session
from controlplane.proxies.host.destinations import Destinations, Refused, Unknown
from controlplane.proxies.host.incoming import Incoming
from controlplane.proxies.host.wire import NAME, SIZES, packed_address

_PEERS = 1024  # that may answer; whoever was first sent to the longest ago is forgotten first
_NAMES = 256
_SECONDS_KNOWN = 60.0  # that a name's address is used; the time to live in its own answer is not shown to us
_LOOKUPS = 8  # at a time; datagrams that would need one more are dropped
_ANYWHERE = {4: "0.0.0.0", 6: "::"}  # noqa: S104 - by IP version; answers come from anywhere
_NO_FRAGMENT = b"\0\0\0"  # two reserved bytes, and the number of a fragment


class Association:
    """Carries datagrams between one client and whoever it sends to, until it is closed.

    Answers come only from addresses that were sent to, from any port of theirs (RFC 4787, 5: address-dependent), for
    some protocols answer from another port. What cannot be carried is dropped, as on any network. `refused` is called
    with the reason when a destination is forbidden.
    """

    def __init__(
        self, session: Session, destinations: Destinations, client_host: str, refused: Callable[[str], object]
    ) -> None:
        self._session = session
        self._destinations = destinations
        self._client: tuple[str, int] | None = None  # once it has sent something
        self._client_host = client_host
        self._refused = refused
        self._loop = asyncio.get_running_loop()
        self._inside = _Socket(self._from_client)
        self._outside: dict[int, _Socket] = {}
        self._peers: OrderedDict[Address, None] = OrderedDict()
        self._names: OrderedDict[bytes, tuple[Address, float]] = OrderedDict()
        self._lookups: set[asyncio.Task[None]] = set()

    async def open(self, host: str) -> tuple[str, int]:
        """Listen for the client on this address of ours; return it and the port.

        Raises OSError.
        """
        name = await self._inside.open(host)
        for version, anywhere in _ANYWHERE.items():
            outside = _Socket(self._from_peer)
            try:
                await outside.open(anywhere)
            except OSError:
                continue  # a machine without that family; what goes there is dropped
            self._outside[version] = outside
        return name

    async def serve(self, client: Incoming) -> None:
        """Wait for the end of the TCP connection that the client has asked on; what comes on it means nothing."""
        ignored = _Ignored()
        client.transport.set_protocol(ignored)

        def cut() -> None:
            self.close()
            client.transport.abort()

        self._session.cut = cut  # at once: on uvloop, datagrams would still pass before the task was cancelled
        client.take_rest()  # or reading stays paused, and the end unseen
        if not client.has_ended:
            await ignored.has_ended.wait()

    def close(self) -> None:
        """Stop. Safe to repeat."""
        for each in (self._inside, *self._outside.values()):
            each.close()
        for lookup in self._lookups:
            lookup.cancel()

    def _from_client(self, datagram: bytes, sender: tuple[str, int]) -> None:
        if sender[0] != self._client_host or sender != (self._client or sender):
            return
        parsed = _parse(datagram)
        if parsed is None:
            return
        self._client = sender
        host, port, payload = parsed
        if isinstance(host, bytes):
            self._send_to_name(host, port, payload)
        else:
            self._send(host, port, payload)

    def _send_to_name(self, name: bytes, port: int, payload: bytes) -> None:
        address, until = self._names.get(name, (None, 0.0))
        if address is not None and self._loop.time() < until:
            self._send(address, port, payload)
        elif len(self._lookups) < _LOOKUPS:
            lookup = self._loop.create_task(self._look_up(name, port, payload))
            self._lookups.add(lookup)
            lookup.add_done_callback(self._lookups.discard)

    async def _look_up(self, name: bytes, port: int, payload: bytes) -> None:
        try:
            address, *_ = await self._destinations.resolve(name, port, self._session.lookups)
        except Refused as error:
            self._refused(error.reason)
        except Unknown:
            self._refused("name")
        else:
            _remember(self._names, name, (address, self._loop.time() + _SECONDS_KNOWN), _NAMES)
            self._send(address, port, payload)

    def _send(self, address: Address, port: int, payload: bytes) -> None:
        try:
            self._destinations.check_port(port)
            # Whoever was sent to before was checked then.
            address = address if address in self._peers else self._destinations.check(address)
        except Refused as error:
            self._refused(error.reason)
            return
        outside = self._outside.get(address.version)
        if outside is not None and self._may_pass(outside, len(payload)):
            self._session.count_up(len(payload))
            _remember(self._peers, address, None, _PEERS)
            outside.transport.sendto(payload, (str(address), port))

    def _from_peer(self, payload: bytes, sender: tuple[str, int]) -> None:
        address = ip_address(sender[0].partition("%")[0])
        if self._client is not None and address in self._peers and self._may_pass(self._inside, len(payload)):
            self._session.count_down(len(payload))
            header = _NO_FRAGMENT + packed_address(address, sender[1])
            self._inside.transport.sendto(header + payload, self._client)

    def _may_pass(self, way: "_Socket", size: int) -> bool:
        """Tell whether there is room and bandwidth for a datagram, and take the bandwidth."""
        now = self._loop.time()
        if way.is_full or way.transport.is_closing() or self._session.bandwidth.is_spent(now):
            return False
        self._session.bandwidth.take(size, now)
        return True


class _Socket(asyncio.DatagramProtocol):
    """A UDP socket; `received` gets each datagram, and the address and port that it came from."""

    transport: asyncio.DatagramTransport

    def __init__(self, received: Callable[[bytes, tuple[str, int]], None]) -> None:
        self.is_full = False
        self._received = received

    async def open(self, host: str) -> tuple[str, int]:
        """Bind it to a free port of this address; return both.

        Raises OSError.
        """
        loop = asyncio.get_running_loop()
        self.transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=(host, 0))
        return cast("tuple[str, int]", self.transport.get_extra_info("sockname")[:2])

    def close(self) -> None:
        if hasattr(self, "transport"):
            self.transport.abort()

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self._received(data, (addr[0], addr[1]))  # of IPv6 there is more, which means nothing here

    def pause_writing(self) -> None:
        self.is_full = True

    def resume_writing(self) -> None:
        self.is_full = False


class _Ignored(asyncio.Protocol):
    """The end of a connection."""

    def __init__(self) -> None:
        self.has_ended = asyncio.Event()

    def eof_received(self) -> None:
        self.has_ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.has_ended.set()


def _parse(datagram: bytes) -> tuple[Address | bytes, int, bytes] | None:
    """Return where a client's datagram goes and what goes there; None for what is malformed or a fragment.

    Who does not put fragments together must drop them (RFC 1928, 7).
    """
    kind, start = datagram[3:4], len(_NO_FRAGMENT) + 1
    if kind == bytes([NAME]):
        size, start = int.from_bytes(datagram[4:5]), start + 1
    else:
        size = SIZES.get(int.from_bytes(kind), 0)
    end = start + size
    if datagram[2:3] != b"\0" or not size or len(datagram) < end + 2:
        return None
    host, port = datagram[start:end], int.from_bytes(datagram[end : end + 2])
    return host if kind == bytes([NAME]) else ip_address(host), port, datagram[end + 2 :]


def _remember(table: OrderedDict[Any, Any], key: object, value: object, most: int) -> None:
    table[key] = value
    if len(table) > most:
        table.popitem(last=False)
