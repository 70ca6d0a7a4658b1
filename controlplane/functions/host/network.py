"""A network for one function: it leads into the internet, and nowhere else.

It is a network namespace with its rules (nftables), whose one way out is slirp4netns: that takes the packets and speaks
for them from ordinary sockets of this machine. So to everybody out there, and to the machine itself, they come from the
machine: what must not be reached has to be refused in the namespace, before slirp4netns sees it.

The namespace belongs to a user of its own, in a user namespace that the function is not in: whatever that becomes in
its own one, it can change nothing here. IPv6 is off.
"""

import asyncio
import os
import subprocess
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, collapse_addresses
from pathlib import Path
from typing import Self

from controlplane.access.caller import Network as Refused
from controlplane.functions.host.cgroups import Group
from controlplane.hosts.refused import MAIL, REFUSED

NAMESERVER = "10.0.2.3"  # what slirp4netns hands on to the machine's own
INTERFACE = "tap0"

_PACKAGES = {"slirp4netns": "slirp4netns", "nft": "nftables", "unshare": "util-linux", "nsenter": "util-linux"}
PROGRAMS = tuple(_PACKAGES)

_SECONDS_TO_START = 10.0
_OPEN_FILES = 1024  # each connection is one
# It and slirp4netns live as long as we hold the other ends of their standard inputs.
_HOLD = """
set -e
: <>/dev/net/tun
for switch in /proc/sys/net/ipv6/conf/*/disable_ipv6; do
    if [ -e "$switch" ]; then echo 1 >"$switch"; fi
done
"$1" "$2"
echo ready
read -r nothing || :
"""
# What it prints must not come between its one sign that it is ready.
_CONNECT = 'exec "$@" 3>&1 >/dev/null'
# The interface is part of the rule for loopback: a socket bound to the other one sends 127.0.0.1 to slirp4netns, and so
# to the machine's own. And the port is part of the one for names: slirp4netns hands all ports on.
_RULES = """
table inet fence {{
    set refused {{
        type ipv4_addr; flags interval; elements = {{ {refused} }}
    }}
    chain output {{
        type filter hook output priority filter; policy drop;
        oifname "lo" accept
        ip daddr {nameserver} meta l4proto {{ tcp, udp }} th dport 53 accept
        ip daddr != @refused meta l4proto {{ tcp, udp }} th dport != {{ 0, {mail} }} accept
        reject with icmpx admin-prohibited
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname "lo" accept
        ip saddr {nameserver} meta l4proto {{ tcp, udp }} th sport 53 accept
        ip saddr != @refused accept
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
    }}
}}
"""


class Network:
    """A network that is there: `path` is its namespace, for as long as slirp4netns runs."""

    def __init__(self, namespace: int, slirp: Process) -> None:
        self.path = Path(f"/proc/{os.getpid()}/fd/{namespace}")
        self.ended = asyncio.create_task(slirp.wait())  # done when nothing gets out any more
        self.ended.add_done_callback(lambda _: os.close(namespace))
        self._slirp = slirp  # and with it the other end of its standard input

    @classmethod
    async def open(cls, *, programs: Mapping[str, str], group: Group, uid: int, refused: Iterable[Refused]) -> Self:
        """Make a network that does not lead into `refused` either; `uid` must not be that of any function.

        Its process is in the group: ending the group ends it, and what was begun of it. The machine's own addresses are
        refused as they are now. Raises OSError.
        """
        async with asyncio.timeout(_SECONDS_TO_START):
            holder = await _start(_holding(programs, uid, refused), group)
            await _until_ready(holder, b"ready\n", "its rules")
            namespace = os.open(f"/proc/{holder.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                slirp = await _start(_connecting(programs, uid, holder.pid), group)
                await _until_ready(slirp, b"1", "slirp4netns")
                await holder.communicate(b"")  # it has to hold nothing any more
            except BaseException:
                os.close(namespace)
                raise
        return cls(namespace, slirp)


def look_at_network(programs: Mapping[str, str], uid: int) -> Iterator[str]:
    """Look for programs (their paths by name), and make a network to see; give what is wrong in sentences. Blocks."""
    missing = [name for name in _PACKAGES if not programs.get(name)]
    for name in missing:
        yield f"There is no {name}: apt-get install {_PACKAGES[name]}."
    if not missing:
        try:
            _try(programs, uid)
        except (OSError, subprocess.SubprocessError) as error:
            yield f"No network can be made for functions: {error}."


def _try(programs: Mapping[str, str], uid: int) -> None:
    """Make a network and end it; raises OSError, or SubprocessError."""
    holding = _holding(programs, uid, ())
    with subprocess.Popen(holding, stdin=PIPE, stdout=PIPE, stderr=PIPE, env={}, cwd="/") as holder:
        assert holder.stdout is not None  # noqa: S101 - it is a pipe
        assert holder.stderr is not None  # noqa: S101 - likewise
        if not holder.stdout.readline():
            raise OSError(f"its rules do not hold ({holder.stderr.read().decode(errors='replace').strip()})")
        slirp = subprocess.run(
            _connecting(programs, uid, holder.pid),
            input=b"",  # it ends as soon as it is ready
            capture_output=True,
            timeout=_SECONDS_TO_START,
            env={},
            cwd="/",
            check=False,
        )
        if slirp.stdout != b"1":
            raise OSError(f"slirp4netns does not start ({slirp.stderr.decode(errors='replace').strip()})")


def _holding(programs: Mapping[str, str], uid: int, refused: Iterable[Refused]) -> Sequence[str]:
    return (
        *_as_user(programs, uid),
        *(programs["unshare"], "--user", "--map-root-user", "--net"),
        *(programs["sh"], "-c", _HOLD, "hold", programs["nft"], _rules(refused)),
    )


def _connecting(programs: Mapping[str, str], uid: int, holder: int) -> Sequence[str]:
    return (
        *(programs["sh"], "-c", _CONNECT, "connect", *_as_user(programs, uid), programs["slirp4netns"]),
        *("--configure", "--mtu=65520", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp"),
        *("--exit-fd=0", "--ready-fd=3", str(holder), INTERFACE),
    )


def _as_user(programs: Mapping[str, str], uid: int) -> Sequence[str]:
    return (
        *(programs["prlimit"], "--core=1:1", f"--nofile={_OPEN_FILES}:{_OPEN_FILES}"),
        *(programs["setpriv"], f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs"),
        *("--bounding-set=-all", "--inh-caps=-all"),
    )


def _rules(refused: Iterable[Refused]) -> str:
    networks = [each for each in (*REFUSED, *refused) if isinstance(each, IPv4Network)]
    # Collapsed, because nft refuses a set with overlaps.
    elements = ", ".join(map(str, collapse_addresses([*networks, *_own_networks()])))
    return _RULES.format(refused=elements, nameserver=NAMESERVER, mail=MAIL)


def _own_networks() -> Iterator[IPv4Network]:
    """Return what this machine takes for itself: its addresses, and networks that are routed to it as if they were."""
    address = ""
    for line in Path("/proc/net/fib_trie").read_text().splitlines():
        if "|-- " in line:
            address = line.split()[-1]
        elif " LOCAL" in line:
            yield IPv4Network(address + line.split()[0])


async def _start(command: Sequence[str], group: Group) -> Process:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=PIPE,
        stdout=PIPE,
        stderr=DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,  # Ctrl-C is for us
    )
    for entrance in group.entrances:
        entrance.write_text(str(process.pid))
    return process


async def _until_ready(process: Process, sign: bytes, what: str) -> None:
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    if await process.stdout.read(len(sign)) != sign:
        raise OSError(f"the network does not come up: {what} ended with status {await process.wait()}")
