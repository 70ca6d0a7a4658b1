"""Addresses and networks, as customers write them."""

from ipaddress import IPv4Address, IPv4Network, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as some

from controlplane.access.allowlist import is_allowed, parse_address, parse_network


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("203.0.113.7", "203.0.113.7/32"),
        ("198.51.100.0/24", "198.51.100.0/24"),
        ("2001:db8::1", "2001:db8::1/128"),
        ("2001:DB8::/32", "2001:db8::/32"),
        ("::ffff:203.0.113.7", "203.0.113.7/32"),
        ("::ffff:203.0.113.0/120", "203.0.113.0/24"),
        ("128.0.0.0/1", "128.0.0.0/1"),
        ("::/1", "::/1"),
    ],
)
def test_a_network_is_read(text: str, network: str) -> None:
    """Addresses and networks of both families are read; what is mapped into IPv6 is IPv4."""
    assert parse_network(text) == ip_network(network)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10.0.0.1/8", "bits set after the network's prefix: write '10.0.0.0/8'"),
        ("2001:db8::1/32", "write '2001:db8::/32'"),
        ("fe80::1%eth0", "zone id"),
        ("10.0.0.0/8%1", "zone id"),
        ("0.0.0.0/0", "every address: leave the list empty"),
        ("::/0", "every address: leave the list empty"),
        ("::ffff:0.0.0.0/96", "every address: leave the list empty"),
        ("example.com", "neither an IP address nor a network"),
        ("10.0.0", "neither an IP address nor a network"),
        ("10.0.0.256", "neither"),
        ("10.0.0.0/33", "neither"),
        ("10.0.0.0/-1", "neither"),
        ("10.0.0.0 /8", "neither"),
        ("1", "neither"),
        ("", "neither"),
        ("\u0661.0.0.1", "neither"),
    ],
)
def test_what_is_no_network_is_refused_in_words(text: str, words: str) -> None:
    """The complaint repeats what was written and says how to write it."""
    with pytest.raises(ValueError, match=words) as refused:
        parse_network(text)
    assert text in str(refused.value)


@given(address=some.ip_addresses(v=4), prefix=some.integers(1, 32))
def test_a_network_holds_its_own_addresses_only(address: IPv4Address, prefix: int) -> None:
    """An address is let in if and only if its first bits are the network's, mapped into IPv6 or not."""
    network = IPv4Network((int(address) >> 32 - prefix << 32 - prefix, prefix))
    outside = IPv4Address(int(address) ^ 1 << 32 - prefix)
    for form in ("{}", "::ffff:{}"):
        assert is_allowed(form.format(address), [parse_network(str(network))])
        assert not is_allowed(form.format(outside), [parse_network(str(network))])


def test_one_of_several_is_enough() -> None:
    """An address passes if it lies in any of the networks, and the families do not mix."""
    networks = [parse_network(text) for text in ("203.0.113.7", "2001:db8::/32")]
    assert is_allowed("2001:db8::5", networks)
    assert not is_allowed("203.0.113.8", networks)
    assert not is_allowed("::1", networks)
    assert not is_allowed("203.0.113.7", [])


def test_what_is_no_address_is_an_error() -> None:
    """Nothing that is not an address is taken for one that is allowed."""
    for text in ("", "unix:", "localhost", "203.0.113.7:80", "203.0.113.0/24"):
        with pytest.raises(ValueError, match="does not appear to be"):
            parse_address(text)
        with pytest.raises(ValueError, match="does not appear to be"):
            is_allowed(text, [parse_network("203.0.113.7")])
