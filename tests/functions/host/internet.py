"""An internet on this machine: a network namespace with servers, at the other end of a pair of interfaces.

Everything is held by the process that serves in there, and is gone when that ends.
"""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.stack import free_port

PORT = 8080
MAIL = 25
NAMES = 53
_NOT_PUBLIC = ("10.213", "100.64", "169.254", "172.29", "192.168", "198.18")
_SERVER = Path(__file__).with_name("programs") / "internet.py"


@dataclass(frozen=True)
class Internet:
    """Where its servers are, which say hello; and what the machine has on its side."""

    address: str  # public
    second: str  # public too
    ipv6: str
    inside: tuple[str, ...]  # in networks that are not public: the machine itself can reach them
    ours: str  # an address of the machine
    ours_too: str  # one that no interface has, but that is routed to the machine itself
    our_port: int  # of a server on every address of the machine


@asynccontextmanager
async def open_internet() -> AsyncIterator[Internet]:
    """Have an internet while the body runs."""
    number = os.getpid() & 0x7FFF  # so that two runs of the tests are not in each other's way
    of_this_run = f"{number >> 8}.{number & 0xFF}"
    network = f"11.{of_this_run}"
    internet = Internet(
        address=f"{network}.44",
        second=f"{network}.45",
        ipv6=f"2a0f:{number:x}::44",
        inside=tuple(f"{each}.{of_this_run}" for each in _NOT_PUBLIC),
        ours=f"{network}.1",
        ours_too=f"{network}.200",
        our_port=free_port(),
    )
    async with (
        _serving(sys.executable, _SERVER, internet.our_port),
        _serving("unshare", "--net", sys.executable, _SERVER, PORT, MAIL, NAMES, internet.inside[0]) as far,
    ):
        await _connect(internet, far, f"htx{number}", network)
        yield internet


@asynccontextmanager
async def _serving(*command: object) -> AsyncIterator[int]:
    """Run servers while the body runs; the value is their process's id."""
    server = await asyncio.create_subprocess_exec(*map(str, command), stdin=PIPE, stdout=PIPE)
    try:
        assert server.stdout is not None
        assert await server.stdout.readline() == b"ready\n"
        yield server.pid
    finally:
        await server.communicate(b"")


async def _connect(internet: Internet, pid: int, name: str, network: str) -> None:
    prefix6 = internet.ipv6.removesuffix("44")
    await _do(f"ip link add {name} type veth peer name far netns {pid}")
    within = f"nsenter --net=/proc/{pid}/ns/net"
    await _do(f"{within} ip link set lo up")
    for address in (f"{internet.address}/24", f"{internet.second}/24", *(f"{each}/32" for each in internet.inside)):
        await _do(f"{within} ip addr add {address} dev far")
    await _do(f"{within} ip addr add {internet.ipv6}/64 dev far nodad")
    await _do(f"{within} ip link set far up")
    await _do(f"ip addr add {internet.ours}/24 dev {name}")
    await _do(f"ip addr add {prefix6}1/64 dev {name} nodad")
    await _do(f"ip link set {name} up")
    await _do(f"ip route add local {network}.192/26 dev {name}")
    for each in internet.inside:
        await _do(f"ip route add {each}/32 via {internet.address}")


async def _do(command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command.split())
    assert await process.wait() == 0, command
