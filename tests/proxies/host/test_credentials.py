"""Who may come in and stay."""

import asyncio
from datetime import timedelta
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from controlplane.access.caller import Address
from controlplane.proxies.host.credentials import Credentials, Ended, OverLimit, Session, Usage
from controlplane.proxies.host.socks import Limits
from tests.clock import ManualClock
from tests.proxies.host.proxy import (
    CONNECT,
    NOT_ALLOWED,
    SUCCEEDED,
    Client,
    Proxy,
    Target,
    echo,
    new_credential,
    running,
)
from tests.stack import eventually

HOME = ip_address("198.51.100.7")


class Held:
    """A session that stays open, and whether it was cut."""

    def __init__(self, credentials: Credentials, name: str = "px_1", address: Address = HOME) -> None:
        self.is_cut = False
        credential = credentials.find(name)
        assert credential is not None
        self._context = credentials.session(credential, address, self._cut)
        self.session: Session = self._context.__enter__()

    def close(self) -> None:
        """End it."""
        self._context.__exit__(None, None, None)

    def _cut(self) -> None:
        self.is_cut = True


@pytest.fixture
def clock() -> ManualClock:
    """A clock of the test's own."""
    return ManualClock()


@pytest.fixture
def credentials(clock: ManualClock) -> Credentials:
    """Credentials with one in it."""
    made = Credentials(clock)
    made.put(new_credential())
    return made


@pytest.mark.parametrize(
    ("changes", "is_cut"),
    [
        ({}, False),
        ({"password": b"another"}, True),
        ({"salt": b"other"}, True),
        ({"username": "px_other"}, True),
        ({"networks": (ip_network("203.0.113.0/24"),)}, True),
        ({"networks": (ip_network("203.0.113.0/24"), ip_network("198.51.100.0/24"))}, False),
        ({"expires_at": ManualClock().now()}, True),
        ({"expires_at": ManualClock().now() + timedelta(seconds=1)}, False),
        ({"max_connections": 0}, False),
        ({"bytes_per_second": 1}, False),
    ],
)
def test_a_change_cuts_what_would_not_be_let_in(
    credentials: Credentials, changes: dict[str, Any], is_cut: bool
) -> None:
    """A change cuts exactly the connections that could not be made by it: limits hold for what comes."""
    held = Held(credentials)
    credentials.put(new_credential(**changes))
    assert held.is_cut == is_cut


def test_a_removal_cuts_and_keeps_the_counters(credentials: Credentials) -> None:
    """What a removed credential has carried can be read until it is forgotten; the total keeps it for good."""
    held = Held(credentials)
    held.session.count_connection()
    held.session.count_up(5)
    held.session.count_down(7)
    credentials.remove("px_1")
    credentials.remove("px_1")
    assert held.is_cut
    assert credentials.find("px_1") is None
    assert credentials.usage() == {"px_1": Usage(1, 5, 7)}
    credentials.forget("px_1")
    credentials.forget("px_1")
    assert credentials.usage() == {}
    assert credentials.total() == Usage(1, 5, 7)


def test_what_is_removed_may_come_back(credentials: Credentials) -> None:
    """A credential put again goes on with its counters, and its name was free for others in between."""
    Held(credentials).session.count_up(5)
    credentials.remove("px_1")
    credentials.put(new_credential("px_2", username="px_1"))
    with pytest.raises(ValueError, match="px_2"):
        credentials.put(new_credential())
    credentials.put(new_credential(username="px_9"))
    held = Held(credentials, "px_9")
    held.session.count_up(1)
    assert credentials.usage()["px_1"] == Usage(0, 6, 0)
    found = credentials.find("px_1")
    assert found is not None
    assert found.id == "px_2"


def test_what_is_in_use_is_not_forgotten(credentials: Credentials) -> None:
    """Only a removed credential can be forgotten."""
    with pytest.raises(ValueError, match="not removed"):
        credentials.forget("px_1")


def test_whoever_logged_in_before_a_change_does_not_get_in_after_it(credentials: Credentials) -> None:
    """Between login and request the credential may change or go, and then nothing is opened."""
    proven = credentials.find("px_1")
    assert proven is not None
    credentials.put(new_credential(password=b"another"))
    with pytest.raises(Ended), credentials.session(proven, HOME, lambda: None):
        pass
    credentials.remove("px_1")
    credentials.forget("px_1")
    with pytest.raises(Ended), credentials.session(proven, HOME, lambda: None):
        pass


def test_the_limit_is_the_limit(credentials: Credentials) -> None:
    """One more than the limit is refused; what ends makes room; a lower limit only keeps further ones out."""
    credentials.put(new_credential(max_connections=2))
    held = [Held(credentials), Held(credentials)]
    with pytest.raises(OverLimit):
        Held(credentials)
    credentials.put(new_credential(max_connections=1))
    held.pop().close()
    with pytest.raises(OverLimit):
        Held(credentials)
    held.pop().close()
    Held(credentials)


def test_expiry_cuts_at_its_time(credentials: Credentials, clock: ManualClock) -> None:
    """A connection is cut when its credential expires, and not before."""
    credentials.put(new_credential(expires_at=clock.now() + timedelta(seconds=60)))
    held = Held(credentials)
    clock.advance(59.9)
    credentials.cut_due(3600)
    assert not held.is_cut
    clock.advance(0.1)
    credentials.cut_due(3600)
    assert held.is_cut


def test_what_carries_nothing_is_cut(credentials: Credentials, clock: ManualClock) -> None:
    """A connection is cut after so long without a byte; a byte in either direction begins it anew."""
    idle, busy = Held(credentials), Held(credentials)
    for count in (busy.session.count_up, busy.session.count_down):
        clock.advance(59)
        count(1)
        credentials.cut_due(100)
    assert (idle.is_cut, busy.is_cut) == (True, False)
    clock.advance(100)
    credentials.cut_due(100)
    assert busy.is_cut


async def test_a_removal_cuts_open_connections_at_once() -> None:
    """A removal breaks the credential's connections at both ends, in the middle of a transfer, and no others."""
    broken = asyncio.Event()

    async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(bytes(65536))
                await writer.drain()
        except ConnectionError:
            broken.set()

    async with running() as proxy, Target(pour) as target, Target(echo) as other:
        proxy.credentials.put(new_credential("px_2"))
        async with proxy.connected(target.port) as client, proxy.connected(other.port, name="px_2") as bystander:
            await client.reader.readexactly(1_000_000)
            proxy.credentials.remove("px_1")
            carried = proxy.usage()
            assert await client.is_cut()
            await asyncio.wait_for(broken.wait(), 20)
            assert await bystander.says(b"ping") == b"ping"
            assert proxy.usage() == carried
            assert carried.bytes_down >= 1_000_000


async def test_a_removal_ends_what_is_not_connected_yet() -> None:
    """A client that had logged in before the removal is refused its request."""
    async with running() as proxy, Target(echo) as target, proxy.dial() as client:
        await client.log_in()
        proxy.credentials.remove("px_1")
        assert (await client.ask(CONNECT, "127.0.0.1", target.port))[0] == NOT_ALLOWED
        assert proxy.refused("ended") == 1


async def test_expiry_and_silence_end_real_connections() -> None:
    """The running server cuts what has expired and what was silent for too long."""
    async with running(limits=Limits(idle_seconds=1800)) as proxy, Target(echo) as target:
        async with proxy.connected(target.port) as client:
            proxy.clock.let_pass(minutes=31)
            assert await client.is_cut()
        proxy.credentials.put(new_credential(expires_at=proxy.clock.now() + timedelta(minutes=1)))
        async with proxy.connected(target.port) as client:
            proxy.clock.jump(minutes=1)
            assert await client.is_cut()


async def test_the_limit_is_exact_among_many_at_once() -> None:
    """Of sixty that ask at the same moment exactly seven get in; sixty more do once those have gone."""
    async with running() as proxy, Target(echo) as target:
        proxy.credentials.put(new_credential(max_connections=7))
        for _ in range(2):
            results = await asyncio.gather(*(_try(proxy, target.port) for _ in range(60)))
            replies = [reply for reply, _ in results]
            assert (replies.count(SUCCEEDED), replies.count(NOT_ALLOWED)) == (7, 53)
            for _, client in results:
                await client.close()
            await proxy.quiet()
        assert proxy.refused("limit") == 106
        assert proxy.usage().connections == 14


async def _try(proxy: Proxy, port: int) -> tuple[int, Client]:
    client = Client(*await asyncio.open_connection("127.0.0.1", proxy.port))
    await client.log_in()
    reply, *_ = await client.ask(CONNECT, "127.0.0.1", port)
    return reply, client


async def test_a_full_host_says_so() -> None:
    """Beyond what the host carries for all of its customers together the answer is a general failure."""
    async with running(limits=Limits(connections=1)) as proxy, Target(echo) as target:
        async with proxy.connected(target.port), proxy.dial() as client:
            await client.log_in()
            assert (await client.ask(CONNECT, "127.0.0.1", target.port))[0] == 1
            assert proxy.refused("full") == 1

        async def has_room() -> bool:
            return proxy.credentials.open_sessions == 0

        await eventually(has_room)
        async with proxy.connected(target.port):
            pass
