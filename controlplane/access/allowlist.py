"""The addresses and networks that a credential may be used from."""

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from controlplane.access.caller import Address, Network
from controlplane.errors import BrokenRule, InvalidField


def parse_network(text: str) -> Network:
    """Read an address such as `203.0.113.7` or a network such as `2001:db8::/32`.

    Raises ValueError, with what is wrong in words that suit a customer.
    """
    if "%" in text:
        raise ValueError(f"'{text}' has a zone id, which means nothing to another machine: leave out '%' and the rest")
    try:
        network = _unmapped(ip_network(text))
    except ValueError:
        raise ValueError(_complaint(text)) from None
    if network.prefixlen == 0:
        raise ValueError(f"'{text}' is every address: leave the list empty to allow them all")
    return network


def parse_address(text: str) -> Address:
    """Read the address of a caller; an IPv4 address that is mapped into IPv6 is the IPv4 address.

    Raises ValueError if it is none.
    """
    return _parsed(text)


def checked_networks(texts: Iterable[str]) -> list[str]:
    """Return the addresses and networks as they are kept.

    Raises InvalidField naming every one that is wrong.
    """
    kept, broken = [], []
    for index, text in enumerate(texts):
        try:
            network = parse_network(text)
        except ValueError as error:
            broken.append(BrokenRule(f"allowed_ips[{index}]", str(error)))
        else:
            alone = network.prefixlen == network.max_prefixlen
            kept.append(str(network.network_address if alone else network))
    if broken:
        raise InvalidField(*broken)
    return kept


def network_of(address: str) -> str:
    """Return whom requests from an address are counted for: an IPv4 address itself, of IPv6 its /64 (RFC 6177)."""
    try:
        parsed = _parsed(address)
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address):
        return str(IPv6Network((parsed, _SUBSCRIBER_BITS), strict=False))
    return str(parsed)


def is_allowed(address: str, networks: Iterable[Network]) -> bool:
    """Tell whether an address lies in one of the networks."""
    parsed = _parsed(address)
    return any(parsed in network for network in networks)


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Address:
    address = ip_address(text)
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _complaint(text: str) -> str:
    try:
        wider = ip_network(text, strict=False)
    except ValueError:
        return f"'{text}' is neither an IP address nor a network such as 198.51.100.0/24 or 2001:db8::/32"
    return f"'{text}' has bits set after the network's prefix: write '{wider}'"


def _unmapped(network: Network) -> Network:
    """Return the IPv4 network that an IPv6 one such as `::ffff:203.0.113.0/120` stands for, else itself."""
    if isinstance(network, IPv6Network) and network.prefixlen >= _MAPPED_BITS:
        address = network.network_address.ipv4_mapped
        if address is not None:
            return IPv4Network((address, network.prefixlen - _MAPPED_BITS))
    return network


_MAPPED_BITS = 96  # RFC 4291, 2.5.5.2
_SUBSCRIBER_BITS = 64  # the least that a subscriber has all to himself
