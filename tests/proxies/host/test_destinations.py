"""Where nobody may go."""

import asyncio
import socket
from contextlib import AsyncExitStack
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import assume, given
from hypothesis import strategies as some

from controlplane.access.caller import Address
from controlplane.proxies.host.destinations import Destinations, Refused, Unknown, _is_ours
from tests.proxies.host.conftest import Names
from tests.proxies.host.proxy import CONNECT, Target, echo, new_credential, request, running
from tests.stack import eventually

POLICY = Destinations()
REFUSED = {
    "0.0.0.0": "this host",  # noqa: S104
    "0.1.2.3": "this network",
    "10.255.0.1": "private",
    "172.16.0.1": "private",
    "172.31.255.255": "private",
    "192.168.1.1": "private",
    "127.0.0.1": "loopback",
    "127.255.255.254": "loopback",
    "169.254.0.1": "link-local",
    "169.254.169.254": "metadata of AWS, Azure, GCP and others",
    "100.64.0.1": "shared by customers of a provider",
    "100.127.255.255": "the last of these",
    "100.100.100.200": "metadata of Alibaba",
    "168.63.129.16": "Azure's host agent",
    "192.0.0.1": "protocol assignments",
    "192.0.0.192": "metadata of Oracle",
    "192.0.2.1": "documentation",
    "198.51.100.1": "documentation",
    "203.0.113.1": "documentation",
    "192.88.99.1": "6to4 relays",
    "198.18.0.1": "benchmarks",
    "198.19.255.255": "benchmarks",
    "224.0.0.1": "multicast",
    "232.1.2.3": "multicast",
    "239.255.255.250": "multicast",
    "240.0.0.1": "reserved",
    "255.255.255.255": "broadcast",
    "::": "unspecified",
    "::1": "loopback",
    "::127.0.0.1": "IPv4-compatible",
    "::8.8.8.8": "IPv4-compatible of a public address",
    "::ffff:127.0.0.1": "mapped",
    "::ffff:10.0.0.1": "mapped",
    "::ffff:169.254.169.254": "mapped",
    "::ffff:0:127.0.0.1": "IPv4-translated",
    "64:ff9b::127.0.0.1": "NAT64",
    "64:ff9b::10.0.0.1": "NAT64",
    "64:ff9b::169.254.169.254": "NAT64",
    "64:ff9b:1::8.8.8.8": "NAT64 of somebody's own",
    "100::1": "discard-only",
    "2001::1": "Teredo",
    "2001:2::1": "benchmarks",
    "2001:10::1": "ORCHID",
    "2001:20::1": "ORCHIDv2",
    "2001:db8::1": "documentation",
    "2002:7f00:1::": "6to4 of loopback",
    "2002:a00:1::1": "6to4 of a private address",
    "2002:808:808::1": "6to4 of a public address",
    "3fff::1": "documentation",
    "4000::1": "never given to anybody",
    "5f00::1": "segment ids",
    "fc00::1": "unique local",
    "fd00:ec2::254": "metadata of AWS",
    "fd20:ce::254": "metadata of GCP",
    "fe80::1": "link-local",
    "fe80::a9fe:a9fe": "metadata by link-local",
    "fe80::1%1": "link-local with a zone",
    "fec0::1": "site-local",
    "ff02::1": "multicast",
    "ff0e::1": "multicast, global",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: f"{text}-{REFUSED[text]}".replace(" ", "-"))
def test_what_is_not_public_is_refused(text: str) -> None:
    """Nothing of the machine, its networks, its cloud, or of no single place is a destination."""
    with pytest.raises(Refused):
        POLICY.check(ip_address(text))


@pytest.mark.parametrize("text", ["1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::1.1.1.1"])
def test_what_is_public_is_a_destination(text: str) -> None:
    """Public addresses are allowed, those of IPv4 by way of NAT64 included."""
    assert POLICY.check(ip_address(text)) == ip_address(text)


def test_a_mapped_address_is_the_address() -> None:
    """What is connected to is the IPv4 address that was checked, not IPv6's way of writing it."""
    assert POLICY.check(ip_address("::ffff:1.1.1.1")) == IPv4Address("1.1.1.1")


@given(address=some.ip_addresses(v=4))
def test_no_writing_of_an_address_gets_further_than_the_address(address: IPv4Address) -> None:
    """Mapped and translated by NAT64, an IPv4 address is refused if and only if it is refused by itself."""
    allowed = _is_allowed(address)
    assert _is_allowed(IPv6Address(0xFFFF << 32 | int(address))) == allowed
    assert _is_allowed(IPv6Address(int(IPv6Address("64:ff9b::")) | int(address))) == allowed
    assert not _is_allowed(IPv6Address(0x2002 << 112 | int(address) << 80))
    assert not (allowed and (address.is_private or address.is_multicast or address.is_reserved))


@given(address=some.ip_addresses(v=6))
def test_ipv6_outside_of_what_is_given_out_is_refused(address: IPv6Address) -> None:
    """No address outside 2000::/3 is allowed, except those that stand for an IPv4 address."""
    assume(address not in IPv6Network("64:ff9b::/96") and address.ipv4_mapped is None)
    assert not _is_allowed(address) or address in IPv6Network("2000::/3")


def test_the_providers_own_networks_are_refused_in_any_writing() -> None:
    """A public network of the provider's own is refused, mapped or by NAT64 too, even where a test allows it."""
    own, other = ip_network("9.9.9.0/24"), ip_network("2620:fe::/48")
    policy = Destinations(refused_networks=[own, other], allowed_networks=[own, other])
    for text in ("9.9.9.9", "::ffff:9.9.9.9", "64:ff9b::9.9.9.9", "2620:fe::9"):
        assert _is_allowed(ip_address(text))
        assert not _is_allowed(ip_address(text), policy)


def test_the_machines_own_addresses_are_known() -> None:
    """An address that the machine has is told from one that it has not, in both families."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        assert _is_ours(ip_address(probe.getsockname()[0]))
    assert _is_ours(ip_address("::1"))
    assert not _is_ours(ip_address("192.0.2.1"))
    assert not _is_ours(ip_address("2001:db8::1"))


def test_ports_are_refused() -> None:
    """Port 25 is refused unless the policy says otherwise, port 0 always."""
    for port, policy in ((25, POLICY), (0, POLICY), (0, Destinations(refused_ports=[]))):
        with pytest.raises(Refused, match="port"):
            policy.check_port(port)
    POLICY.check_port(443)
    Destinations(refused_ports=[]).check_port(25)


async def test_a_name_that_leads_inside_is_refused(names: Names) -> None:
    """A name is refused if all that it leads to is; otherwise the rest of it is handed on, in its order."""
    names["inside.test"] = [["127.0.0.1", "::1", "10.0.0.1"]]
    names["both.test"] = [["10.0.0.1", "1.1.1.1", "::ffff:127.0.0.1", "2606:4700::1111"]]
    turns = asyncio.Semaphore()
    with pytest.raises(Refused, match="destination"):
        await POLICY.resolve(b"inside.test", 80, turns)
    assert await POLICY.resolve(b"both.test", 80, turns) == [ip_address("1.1.1.1"), ip_address("2606:4700::1111")]
    with pytest.raises(Unknown):
        await POLICY.resolve(b"nowhere.test", 80, turns)


async def test_a_name_that_changes_its_mind_gains_nothing(names: Names) -> None:
    """What was checked is what is connected to: the name is not asked for again (DNS rebinding)."""
    names["rebinding.test"] = [["127.0.0.1"], ["127.0.0.2"]]

    async def whoami(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(writer.get_extra_info("sockname")[0].encode())

    async with running() as proxy, Target(whoami, "0.0.0.0") as target, proxy.dial() as client:  # noqa: S104
        await client.connect(b"rebinding.test", target.port)
        assert await client.reader.read() == b"127.0.0.1"


async def test_the_next_address_of_a_name_is_tried(names: Names) -> None:
    """Where one address does not take the connection, the next one is asked."""
    names["several.test"] = [["::1", "10.0.0.1", "127.0.0.3", "127.0.0.1"]]
    async with running() as proxy, Target(echo) as target, proxy.dial() as client:
        await client.connect(b"several.test", target.port)
        assert await client.says(b"ping") == b"ping"


async def test_names_that_nobody_answers_for_are_their_customers_trouble(names: Names) -> None:
    """However many slow names one customer asks for, another one's name is looked up."""
    names["slow.test"] = names["quick.test"] = [["127.0.0.1"]]
    async with running() as proxy, Target(echo) as target:
        proxy.credentials.put(new_credential("px_2"))

        async def all_ask() -> bool:
            return proxy.credentials.open_sessions == 100

        async with AsyncExitStack() as stack:
            for _ in range(100):
                slow = await stack.enter_async_context(proxy.dial())
                await slow.log_in()
                slow.writer.write(request(CONNECT, b"slow.test", target.port))
            await eventually(all_ask)
            async with proxy.dial() as client:
                await client.connect(b"quick.test", target.port, name="px_2")
                assert await client.says(b"ping") == b"ping"
            names.answer_slow()
        await proxy.quiet()


def _is_allowed(address: Address, policy: Destinations = POLICY) -> bool:
    try:
        policy.check(address)
    except Refused:
        return False
    return True
