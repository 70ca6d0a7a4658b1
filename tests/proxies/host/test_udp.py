"""The datagrams of an association."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from controlplane.proxies.host.credentials import Usage
from controlplane.proxies.host.udp import _parse
from tests.proxies.host.conftest import Names
from tests.proxies.host.proxy import (
    ASSOCIATE,
    PASSWORD,
    SUCCEEDED,
    Client,
    Proxy,
    destination,
    login,
    new_credential,
    request,
    running,
)
from tests.stack import eventually


class Socket(asyncio.DatagramProtocol):
    """A UDP socket that keeps what comes, or sends it back."""

    def __init__(self, *, echoes: bool = False) -> None:
        self.got: asyncio.Queue[tuple[bytes, Any]] = asyncio.Queue()
        self._echoes = echoes

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        self.transport: asyncio.DatagramTransport = transport
        self.host, self.port = transport.get_extra_info("sockname")[:2]

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """Keep a datagram, or send it back."""
        if self._echoes:
            self.transport.sendto(data, addr)
        else:
            self.got.put_nowait((data, addr))


class Customer(Socket):
    """A client of an association: speaks SOCKS by datagrams."""

    relay: tuple[str, int]

    def send(self, host: str | bytes, port: int, data: bytes, *, header: bytes = b"\0\0\0") -> None:
        """Send a datagram by the association."""
        self.transport.sendto(header + destination(host, port) + data, self.relay)

    async def answer(self) -> bytes:
        """Return the next datagram that comes, header included."""
        data, _ = await asyncio.wait_for(self.got.get(), 20)
        return data


@asynccontextmanager
async def udp(made: Socket, host: str = "127.0.0.1") -> AsyncIterator[Any]:
    """Open a UDP socket."""
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: made, local_addr=(host, 0))
    try:
        yield made
    finally:
        transport.close()


@asynccontextmanager
async def associated(proxy: Proxy, host: str = "127.0.0.1") -> AsyncIterator[tuple[Client, Customer]]:
    """Ask for an association; yield its TCP connection and the socket to use."""
    async with proxy.dial(host) as client, udp(Customer(), host) as customer:
        await client.log_in()
        reply, address, port = await client.ask(ASSOCIATE, "0.0.0.0", 0)  # noqa: S104 - the customer does not know
        assert reply == SUCCEEDED
        customer.relay = (str(address), port)
        yield client, customer


@pytest.mark.parametrize("proxy_host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize(("bound", "host"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("127.0.0.1", b"127.0.0.1")])
async def test_datagrams_go_there_and_back(proxy_host: str, bound: str, host: str | bytes) -> None:
    """Datagrams reach IPv4, IPv6 and names, answers say where they come from, and payload alone is counted."""
    async with (
        running() as proxy,
        udp(Socket(echoes=True), bound) as peer,
        associated(proxy, proxy_host) as (_, customer),
    ):
        for data in (b"ping", b"p" * 60_000):
            customer.send(host, peer.port, data)
            assert await customer.answer() == b"\0\0\0" + destination(bound, peer.port) + data
        assert proxy.usage() == Usage(1, 60_004, 60_004)


async def test_a_name_is_looked_up_once(names: Names) -> None:
    """A host name is looked up by the proxy; what is sent to it soon after goes to the same address."""
    names["changing.test"] = [["127.0.0.1"], ["127.0.0.2"]]
    async with running() as proxy, udp(Socket(echoes=True)) as peer, associated(proxy) as (_, customer):
        for _ in range(2):
            customer.send(b"changing.test", peer.port, b"ping")
            assert await customer.answer() == b"\0\0\0" + destination("127.0.0.1", peer.port) + b"ping"


async def test_strangers_do_not_get_in() -> None:
    """What comes from an address that was not sent to is dropped, as is what comes before anything was sent."""
    async with (
        running() as proxy,
        udp(Socket()) as friend,
        udp(Socket(), "127.0.0.9") as stranger,
        associated(proxy) as (_, customer),
    ):
        customer.send("127.0.0.1", friend.port, b"hello")
        _, outside = await asyncio.wait_for(friend.got.get(), 20)
        stranger.transport.sendto(b"from a stranger", outside)
        friend.transport.sendto(b"from a friend", outside)
        assert await customer.answer() == b"\0\0\0" + destination("127.0.0.1", friend.port) + b"from a friend"
        customer.send("127.0.0.9", stranger.port, b"hello")
        await stranger.got.get()
        stranger.transport.sendto(b"not a stranger any more", outside)
        assert (await customer.answer()).endswith(b"not a stranger any more")
        assert proxy.usage().bytes_down == len(b"from a friend" + b"not a stranger any more")


async def test_the_friends_other_ports_may_answer() -> None:
    """An answer may come from another port of an address that was sent to, as TFTP's does."""
    async with (
        running() as proxy,
        udp(Socket()) as friend,
        udp(Socket()) as other_port,
        associated(proxy) as (_, customer),
    ):
        customer.send("127.0.0.1", friend.port, b"hello")
        _, outside = await asyncio.wait_for(friend.got.get(), 20)
        other_port.transport.sendto(b"here", outside)
        assert await customer.answer() == b"\0\0\0" + destination("127.0.0.1", other_port.port) + b"here"


async def test_nobody_else_may_send() -> None:
    """Datagrams from another address than the customer's, or from another port than its first, are dropped."""
    async with (
        running() as proxy,
        udp(Socket()) as peer,
        associated(proxy) as (_, customer),
        udp(Customer(), "127.0.0.8") as other_address,
        udp(Customer()) as other_port,
    ):
        other_address.relay = other_port.relay = customer.relay
        other_address.send("127.0.0.1", peer.port, b"other address")
        customer.send("127.0.0.1", peer.port, b"first")
        assert (await asyncio.wait_for(peer.got.get(), 20))[0] == b"first"
        other_port.send("127.0.0.1", peer.port, b"other port")
        customer.send("127.0.0.1", peer.port, b"second")
        assert (await asyncio.wait_for(peer.got.get(), 20))[0] == b"second"
        assert proxy.usage().bytes_up == len(b"first" + b"second")


async def test_what_is_no_whole_datagram_is_dropped() -> None:
    """Fragments, other kinds of addresses and what is cut short go nowhere and cost nothing."""
    async with running() as proxy, udp(Socket()) as peer, associated(proxy) as (_, customer):
        customer.send("127.0.0.1", peer.port, b"fragment", header=b"\0\0\1")
        customer.send("127.0.0.1", peer.port, b"last fragment", header=b"\0\0\x81")
        whole = b"\0\0\0" + destination("127.0.0.1", peer.port)
        for end in range(len(whole)):
            customer.transport.sendto(whole[:end] or b"\0", customer.relay)
        customer.transport.sendto(b"\0\0\0\2" + bytes(20), customer.relay)
        customer.transport.sendto(b"\0\0\0\3\0" + bytes(20), customer.relay)
        customer.send("127.0.0.1", peer.port, b"whole")
        assert (await asyncio.wait_for(peer.got.get(), 20))[0] == b"whole"
        assert proxy.usage() == Usage(1, 5, 0)


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("10.0.0.1", 53, "destination"),
        ("::ffff:169.254.169.254", 53, "destination"),
        ("127.0.0.77", 53, "destination"),
        (b"10.0.0.1", 53, "destination"),
        ("127.0.0.1", 25, "port"),
        (b"127.0.0.1", 25, "port"),
        (b"nowhere.invalid", 53, "name"),
    ],
)
async def test_destinations_are_checked(host: str | bytes, port: int, reason: str) -> None:
    """The same destinations are refused as for connections, by address and by name, and counted by the reason."""
    own = [ip_network("127.0.0.77/32")]
    async with running(refused_networks=own) as proxy, associated(proxy) as (_, customer):
        customer.send(host, port, b"in?")

        async def is_counted() -> bool:
            return proxy.refused(reason) == 1

        await eventually(is_counted)
        assert proxy.usage() == Usage(1, 0, 0)


async def test_it_ends_with_its_connection() -> None:
    """When the TCP connection ends, so does the association, and its place is free; what it says means nothing."""
    async with running() as proxy, udp(Socket(echoes=True)) as peer:
        proxy.credentials.put(new_credential(max_connections=1))
        async with associated(proxy) as (client, customer):
            client.writer.write(b"whatever" * 10_000)
            await client.writer.drain()
            customer.send("127.0.0.1", peer.port, b"ping")
            await customer.answer()
        await proxy.quiet()
        async with udp(Socket()) as successor:  # the port is free: who binds it gets what comes
            assert successor.port
        async with associated(proxy):
            pass


async def test_what_is_said_after_the_request_does_not_keep_it_open() -> None:
    """A client that goes on talking, without waiting for the reply, and then goes away, leaves no association."""
    async with running() as proxy:
        async with proxy.dial() as client:
            said = b"\5\1\2" + login("px_1", PASSWORD) + request(ASSOCIATE, "::", 0)
            client.writer.write(said + b"whatever" * 1000)
            await client.reader.readexactly(4)
        await proxy.quiet()
        assert proxy.usage().connections == 1


async def test_a_removal_ends_it_at_once() -> None:
    """After a removal nothing is carried in either direction."""
    async with running() as proxy, udp(Socket()) as peer, associated(proxy) as (client, customer):
        customer.send("127.0.0.1", peer.port, b"before")
        _, outside = await asyncio.wait_for(peer.got.get(), 20)
        proxy.credentials.remove("px_1")
        customer.send("127.0.0.1", peer.port, b"after")
        peer.transport.sendto(b"after", outside)
        assert not await client.is_cut()
        await proxy.quiet()
        assert proxy.usage() == Usage(1, 6, 0)
        assert peer.got.empty()
        assert customer.got.empty()


async def test_what_the_bandwidth_does_not_carry_is_dropped() -> None:
    """Beyond the bytes a second datagrams are dropped, and neither sent nor counted."""
    async with running() as proxy, udp(Socket()) as peer, associated(proxy) as (_, customer):
        proxy.credentials.put(new_credential(bytes_per_second=1000))
        for number in range(100):
            customer.send("127.0.0.1", peer.port, bytes([number]) * 500)
        customer.send("10.0.0.1", peer.port, b"refused")

        async def all_are_through() -> bool:
            return proxy.refused("destination") == 1

        await eventually(all_are_through)
        carried = proxy.usage().bytes_up
        assert 500 <= carried < 100 * 500 / 4
        arrived = [(await asyncio.wait_for(peer.got.get(), 20))[0] for _ in range(carried // 500)]
        assert sum(map(len, arrived)) == carried
        assert arrived[0] == bytes(500)


@given(datagram=some.binary(max_size=40))
def test_no_datagram_is_too_strange_to_be_read(datagram: bytes) -> None:
    """Whatever comes is a datagram with a destination, or is dropped."""
    parsed = _parse(datagram)
    if parsed is not None:
        host, port, data = parsed
        wanted = destination(host if isinstance(host, bytes) else str(host), port)
        assert datagram[2:3] + wanted + data == datagram[2:]
