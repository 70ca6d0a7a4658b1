"""A function that may gets into the internet, and nowhere else; nobody else gets anywhere."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from controlplane.functions.host import sandbox as the_sandbox
from controlplane.functions.host.network import NAMESERVER
from controlplane.functions.host.sandbox import Sandbox
from controlplane.functions.host.worker import StartFailed
from tests.functions.host.internet import MAIL, NAMES, PORT, Internet, open_internet
from tests.functions.host.workshop import PROGRAMS, Running, Workshop, all_ended, open_workshop
from tests.stack import eventually

_CODE = PROGRAMS / "network.py"
_ROOT = Path(__file__).parents[3]
_AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
_METADATA = ("169.254.169.254", "168.63.129.16", "100.100.100.200", "192.0.0.192")
_UIDS = range(706_000, 706_010)
_REFUSED, _REFUSED_BY_UDP = "EHOSTUNREACH", "EPERM"  # by our rules; else it would be for want of an answer
_NO_WAY = {"ENETUNREACH", "EADDRNOTAVAIL"}
# A host that calls a function with a network, prints its answer and its processes, and never ends.
_HOST = """
import asyncio, json, sys
from pathlib import Path
from tests.functions.host.workshop import Workshop
from controlplane.functions.host.sandbox import Sandbox

async def main():
    place, source, name, event = sys.argv[1:]
    sandbox = Sandbox.open(Path(place), range(706_000, 706_010))
    workshop = Workshop(sandbox, Path(place))
    async with workshop.running(Path(source).read_text(), entrypoint=f"main.{name}", allow_network=True) as it:
        answer = await it.call(json.loads(event))
        print(json.dumps([answer, list(it.worker._cell.group.pids)]), flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
async def internet() -> AsyncIterator[Internet]:
    """An internet for this module."""
    async with open_internet() as internet:
        yield internet


@pytest.fixture(scope="module")
async def workshop(folder: Path, internet: Internet) -> AsyncIterator[Workshop]:
    """A sandbox for this module, of a provider whose own networks are none."""
    del internet
    async with open_workshop(folder) as workshop:
        assert workshop.sandbox.network
        yield workshop


@pytest.fixture
def programs(folder: Path) -> Iterator[Path]:
    """A folder for programs, open to every user."""
    made = folder / "programs"
    made.mkdir(mode=0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def call(workshop: Workshop) -> Any:
    """Call one of the functions, which may get into the internet."""

    async def run(name: str, event: Any = None, *, allow_network: bool = True) -> Any:
        async with _function(workshop, name, allow_network=allow_network) as function:
            return await function.call(event, seconds=60)

    return run


@asynccontextmanager
async def _function(workshop: Workshop, name: str, **wanted: Any) -> AsyncIterator[Running]:
    wanted = {"allow_network": True, "timeout_ms": 60_000, **wanted}
    async with workshop.running(_CODE.read_text(), entrypoint=f"main.{name}", **wanted) as function:
        yield function


def _pids(function: Running) -> set[int]:
    return function.worker._cell.group.pids  # noqa: SLF001 - what only the machine can see


async def _is_there(kind: str, address: str, port: int) -> bool:
    """Return whether the machine itself can reach a server."""
    return await asyncio.to_thread(_says_hello, kind, address, port)


def _says_hello(kind: str, address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}[kind]) as ours:
        ours.settimeout(3)
        ours.connect((address, port))
        ours.send(b"hello")
        return ours.recv(100) == b"hello"


async def test_into_the_internet(call: Any, internet: Internet) -> None:
    """A function that may reaches a server by TCP and UDP; one that may not has no way."""
    places = [["tcp", internet.address, PORT], ["udp", internet.address, PORT], ["tcp", internet.second, PORT]]
    assert await call("reach", places) == ["hello", "hello", "hello"]
    assert set(await call("reach", places, allow_network=False)) == {"ENETUNREACH"}


async def test_private_networks(call: Any, internet: Internet) -> None:
    """No network that is not public is reached, where the machine itself does reach it; written as IPv6 neither."""
    assert all([await _is_there("tcp", address, PORT) for address in internet.inside])
    writings = [f"{prefix}{address}" for address in (*internet.inside, *_METADATA) for prefix in ("", "::ffff:")]
    assert set(await call("reach", [["tcp", each, PORT] for each in writings])) == {_REFUSED}
    assert set(await call("reach", [["udp", each, PORT] for each in writings])) == {_REFUSED_BY_UDP}


async def test_the_machine(call: Any, internet: Internet) -> None:
    """No address of the machine is reached; its loopback is not even by the interface that leads outside."""
    ours = ("127.0.0.1", internet.ours, internet.ours_too)
    assert all([await _is_there("tcp", address, internet.our_port) for address in ours])
    assert await _is_there("udp", "127.0.0.1", internet.our_port)
    port = internet.our_port
    assert await call("reach", [["tcp", "127.0.0.1", port], ["udp", "127.0.0.1", port]]) == ["ECONNREFUSED"] * 2
    places = [[internet.ours, port], [internet.ours_too, port], ["127.0.0.1", port, "tap0"]]
    assert await call("reach", [["tcp", *place] for place in places]) == [_REFUSED] * 3
    assert await call("reach", [["udp", *place] for place in places]) == [_REFUSED_BY_UDP] * 3
    places = [["tcp", "127.0.0.1", port], ["udp", "127.0.0.1", port], ["tcp", internet.ours, port]]
    assert await call("reach", places, allow_network=False) == ["ECONNREFUSED", "ECONNREFUSED", "ENETUNREACH"]


async def test_the_way_out(call: Any, internet: Internet) -> None:
    """Of slirp4netns itself only its port for names is reached, of which the machine's name server is behind all."""
    places = [["tcp", address, port] for address in ("10.0.2.2", NAMESERVER) for port in (internet.our_port, 22, 80)]
    assert await call("reach", [*places, ["tcp", "10.0.2.2", NAMES]]) == [_REFUSED] * 7
    assert await call("reach", [["udp", "10.0.2.2", 67], ["udp", NAMESERVER, 69]]) == [_REFUSED_BY_UDP] * 2


async def test_mail(call: Any, internet: Internet) -> None:
    """Nobody sends mail: port 25 is closed everywhere."""
    assert await _is_there("tcp", internet.address, MAIL)
    assert await call("reach", [["tcp", internet.address, MAIL]]) == [_REFUSED]


async def test_ipv6(call: Any, internet: Internet) -> None:
    """There is no IPv6, not even on the function's own loopback."""
    assert await _is_there("tcp", internet.ipv6, PORT)
    addresses = (internet.ipv6, "fd00::1", "::1")
    assert set(await call("reach", [[kind, each, PORT] for each in addresses for kind in ("tcp", "udp")])) <= _NO_WAY


async def test_the_providers_own_networks(workshop: Workshop, call: Any, internet: Internet) -> None:
    """What the provider refuses is refused to whatever is started from then on."""
    places = [["tcp", internet.address, PORT], ["tcp", internet.second, PORT]]
    workshop.sandbox.refused_networks = [ip_network(f"{internet.second}/32"), ip_network("2a0f::/32")]
    try:
        assert await call("reach", places) == ["hello", _REFUSED]
    finally:
        workshop.sandbox.refused_networks = []


async def test_nobody_calls_from_inside(call: Any, internet: Internet) -> None:
    """Who may not be reached is not heard either."""
    assert await call("hear", [internet.address, PORT]) == [internet.address]


async def test_two_functions(workshop: Workshop, internet: Internet) -> None:
    """Two functions, even of one account, cannot reach each other, by any address or name."""
    async with _function(workshop, "serve") as one, _function(workshop, "reach") as other:
        await one.call(5000)
        addresses = ("127.0.0.1", "10.0.2.100", "10.0.2.2", "10.0.2.15", internet.ours)
        assert set(await other.call([["tcp", each, 5000] for each in addresses])) == {"ECONNREFUSED", _REFUSED}
        async with _function(workshop, "reach_by_name") as third:
            assert await third.call(5000) == "ECONNREFUSED"


async def test_rules_stay(workshop: Workshop, call: Any, internet: Internet) -> None:
    """A function can neither change the rules nor get around them, and had it all rights in its cell, it could not."""
    switches = [
        "ipv4/ip_forward",
        "ipv4/ping_group_range",
        "ipv6/conf/all/disable_ipv6",
        "ipv4/conf/all/route_localnet",
    ]
    tried = await call("tamper", switches)
    assert {name: tried.pop(name) for name in switches} == dict.fromkeys(switches, "EACCES")
    assert set(tried.values()) <= {"ENOSYS", "EPERM", "EACCES"}
    async with _function(workshop, "reach") as function:
        cell = max(_pids(function))
        for change in ("nft flush ruleset", "ip addr add 10.0.2.7 dev tap0", "ip link set tap0 down"):
            with_all_rights = (
                f"nsenter --net=/proc/{cell}/ns/net --user=/proc/{cell}/ns/user --preserve-credentials {change}"
            )
            process = await asyncio.create_subprocess_exec(*with_all_rights.split(), stderr=PIPE)
            assert b"not permitted" in (await process.communicate())[1]
        assert await function.call([["tcp", internet.inside[0], PORT], ["tcp", internet.address, PORT]]) == [
            _REFUSED,
            "hello",
        ]


async def test_names(folder: Path, internet: Internet, tmp_path: Path) -> None:
    """Names are the machine's name server's; one that leads inside is known, and not reached."""
    own = tmp_path / "resolv.conf"
    own.write_text(f"nameserver {internet.address}\n")
    names = [f"{address.replace('.', '-')}.test" for address in (internet.address, internet.inside[0])]
    under_it = ("unshare", "--mount", "sh", "-c", f'mount --bind {own} /etc/resolv.conf && exec "$@"', "sh")
    for name, event, told in (
        ("look_up", names, [internet.address, internet.inside[0]]),
        ("reach", [["tcp", each, PORT] for each in names], ["hello", _REFUSED]),
    ):
        async with _host(*under_it, place=folder / f"names-{name}", name=name, event=event) as (answer, _, _):
            assert answer == told
        await Sandbox.open(folder / f"names-{name}", _UIDS).close()


async def test_authorities(call: Any) -> None:
    """A function can tell whom it talks to: it knows the authorities that the machine trusts."""
    assert await call("count_authorities") == len(ssl.create_default_context(cafile=_AUTHORITIES).get_ca_certs())


async def test_users(workshop: Workshop) -> None:
    """A function's network is a process of a user of its own, who is nobody on this machine, and not the function's."""
    async with _function(workshop, "reach") as function:
        users = {_program(pid): Path(f"/proc/{pid}/status").stat().st_uid for pid in _pids(function)}  # noqa: ASYNC240
        assert set(users) == {"bwrap", "python3", "slirp4netns"}
        assert min(users.values()) > 700_000
        assert users["slirp4netns"] != users["python3"]


async def test_end(workshop: Workshop) -> None:
    """With a function its network ends: there is no process of it, and no namespace."""
    async with _function(workshop, "reach") as function:
        pids = _pids(function)
        names = _names(pids)
        assert len(names) == 2
        assert names & _namespaces()
    await all_ended(pids)

    async def gone() -> bool:
        return not (names - _names([os.getpid()])) & _namespaces()

    await eventually(gone, seconds=5)


async def test_the_network_dies(workshop: Workshop) -> None:
    """A function whose network has died is ended, so that the next one gets another."""
    async with _function(workshop, "reach") as function:
        (slirp,) = (pid for pid in _pids(function) if _program(pid) == "slirp4netns")
        os.kill(slirp, signal.SIGKILL)

        async def dead() -> bool:
            return not function.worker.alive

        await eventually(dead, seconds=5)


async def test_host_is_killed(folder: Path, internet: Internet) -> None:
    """A network ends with its host, also when that is killed; nobody has to come after it."""
    place = folder / "killed-network"
    event = [["tcp", internet.address, PORT]]
    async with _host(place=place, name="reach", event=event) as (answer, pids, host):
        assert answer == ["hello"]
        names = _names(pids) - _names([os.getpid()])
        assert len(names) == 1
        host.kill()
        await host.wait()
        await all_ended(pids)
        assert not names & _namespaces()
    await Sandbox.open(place, _UIDS).close()


async def test_what_is_missing_is_named(folder: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where slirp4netns is missing, who wants a network is refused, and the log says what to install."""
    _only(programs, monkeypatch)
    with capture_logs() as logs:
        async with open_workshop(folder) as workshop:
            assert not workshop.sandbox.network
            async with _function(workshop, "reach", allow_network=False):
                pass
            with pytest.raises(StartFailed, match="offers no network"):
                async with _function(workshop, "reach"):
                    pass
    assert ["There is no slirp4netns: apt-get install slirp4netns."] in [each.get("why") for each in logs]


@pytest.mark.parametrize("broken", ["", "nft", "slirp4netns"])
async def test_what_does_not_work_is_not_offered(
    folder: Path, programs: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Where a program is there and fails, even without a word, nobody is offered a network."""
    _only(programs, monkeypatch)
    (programs / "slirp4netns").symlink_to(shutil.which("slirp4netns") or "")
    if broken:
        (programs / broken).unlink()
        (programs / broken).symlink_to("/bin/false")
    async with open_workshop(folder) as workshop:
        assert workshop.sandbox.network == (not broken)


def _only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have only the programs in a folder: all that are needed but for slirp4netns."""
    for name in ("sh", "bwrap", "setpriv", "prlimit", "nft", "unshare", "nsenter"):
        (folder / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setattr(the_sandbox, "_SYSTEM_FOLDERS", str(folder))


def _program(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _names(pids: Iterable[int]) -> set[str]:
    """Return the network namespaces that processes are in."""
    return {str(Path(f"/proc/{pid}/ns/net").readlink()) for pid in pids}


def _namespaces() -> set[str]:
    """Return all network namespaces that anything on this machine is in or holds."""
    found = set()
    for each in (*Path("/proc").glob("[0-9]*/ns/net"), *Path("/proc").glob("[0-9]*/fd/*")):
        with contextlib.suppress(OSError):
            found.add(str(each.readlink()))
    return {each for each in found if each.startswith("net:")}


@asynccontextmanager
async def _host(
    *prefix: str, place: Path, name: str, event: Any
) -> AsyncIterator[tuple[Any, list[int], asyncio.subprocess.Process]]:
    """Run a host that calls a function; have its answer and its processes while the body runs."""
    command = (*prefix, sys.executable, "-c", _HOST, str(place), str(_CODE), name, json.dumps(event))
    host = await asyncio.create_subprocess_exec(*command, stdout=PIPE, cwd=_ROOT)
    try:
        assert host.stdout is not None
        answer, pids = json.loads(await host.stdout.readline())
        yield answer, pids, host
    finally:
        if host.returncode is None:
            host.kill()
        await host.wait()
