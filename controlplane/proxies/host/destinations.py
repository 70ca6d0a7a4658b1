"""Where nobody may go: a proxy is no way into the provider's own network, nor into the machine that it runs on."""

import asyncio
import errno
import re
import socket
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from controlplane.access.caller import Address, Network
from controlplane.hosts.refused import MAIL, REFUSED

# All of IPv6 that is given to anybody (RFC 4291, 2.4). Outside of it are, among others: loopback, unspecified and
# IPv4-compatible addresses (::/96), IPv4-translated ones (RFC 2765), NAT64 for local use (RFC 8215), discard-only
# (RFC 6666), segment ids (RFC 9602), unique local (RFC 4193), link-local, site-local (RFC 3879), and multicast.
_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_NAME = re.compile(rb"[A-Za-z0-9._:-]{1,255}")
_THREADS = 64
_MOST_TRIED = 8  # addresses of a name


class Refused(Exception):
    """The policy forbids the destination; `reason` is for a counter."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Unknown(Exception):
    """The name has no address."""


class Destinations:
    """The policy on destinations.

    `refused_networks` are the provider's own, which include a NAT64 prefix of its own and the public addresses by which
    these hosts are known elsewhere; `refused_ports` are refused everywhere. `allowed_networks` is for tests, whose
    servers are all on loopback: addresses in it are allowed unless they are among the provider's own.
    """

    def __init__(
        self,
        *,
        refused_networks: Iterable[Network] = (),
        refused_ports: Collection[int] = (MAIL,),
        allowed_networks: Iterable[Network] = (),
    ) -> None:
        self._refused_networks = tuple(refused_networks)
        self._refused_ports = frozenset(refused_ports) | {0}
        self._allowed_networks = tuple(allowed_networks)
        # asyncio's own pool has a thread or two a core, libuv's has four: a few names that nobody answers for would
        # keep everybody waiting.
        self._pool = ThreadPoolExecutor(_THREADS, "resolver")

    async def resolve(self, host: Address | bytes, port: int, turns: asyncio.Semaphore) -> list[Address]:
        """Return the addresses at which a host may be connected to, in the order in which to try them.

        The caller connects to these addresses and does not ask for the name again: the second answer could be another
        one. A name waits for one of `turns`.

        Raises Refused, or Unknown.
        """
        self.check_port(port)
        addresses = await self._look_up(host, turns) if isinstance(host, bytes) else [host]
        allowed, refused = list[Address](), None
        for address in addresses:
            try:
                allowed.append(self.check(address))
            except Refused as error:
                refused = error
        if not allowed and refused is not None:
            raise refused
        return allowed[:_MOST_TRIED]

    def check_port(self, port: int) -> None:
        """Raise Refused for a port that is closed to everybody."""
        if port in self._refused_ports:
            raise Refused("port")

    def check(self, address: Address) -> Address:
        """Return the address to connect to: the same, or the IPv4 address that is mapped into it.

        Raises Refused.
        """
        if isinstance(address, IPv6Address):
            address = IPv6Address(int(address))  # without a zone id, which would hide it from comparisons
            if address.ipv4_mapped is not None:
                address = address.ipv4_mapped
        if self._is_refused(address):
            raise Refused("destination")
        return address

    def close(self) -> None:
        """Let go of the threads that ask for names."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _look_up(self, name: bytes, turns: asyncio.Semaphore) -> list[Address]:
        if not _NAME.fullmatch(name):
            raise Unknown
        await turns.acquire()
        asking = asyncio.get_running_loop().run_in_executor(self._pool, _addresses, name)
        # The thread keeps its turn until it is done, also when the client is long gone.
        asking.add_done_callback(lambda _: turns.release())
        return await asyncio.shield(asking)

    def _is_refused(self, address: Address) -> bool:
        if _is_in(address, self._refused_networks):
            return True
        if _is_in(address, self._allowed_networks):
            return False
        if isinstance(address, IPv6Address) and address in _NAT64:
            return self._is_refused(IPv4Address(int(address) & 0xFFFFFFFF))
        if isinstance(address, IPv6Address) and address not in _UNICAST:
            return True
        return _is_in(address, REFUSED) or _is_ours(address)


def _addresses(name: bytes) -> list[Address]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Unknown from None
    return [ip_address(str(place[0])) for *_, place in found]


def _is_in(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


def _is_ours(address: Address) -> bool:
    """Tell whether an address is this machine's own, whose firewall does not stand between it and itself.

    Only such an address can be bound to; unlike a list of them, this is never out of date. In doubt it is.
    """
    family = socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True
