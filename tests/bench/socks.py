"""What a proxy carries, beside no proxy at all and, where they are installed, beside microsocks and dante.

python -m tests.bench.socks serve PORT
python -m tests.bench.socks target PORT
"""

import asyncio
import hashlib
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from ipaddress import ip_network
from pathlib import Path
from statistics import median
from typing import Any

import click
import uvloop
from prometheus_client import CollectorRegistry

from controlplane.clock import SystemClock
from controlplane.proxies.host.credentials import Credential, Credentials
from controlplane.proxies.host.destinations import Destinations
from controlplane.proxies.host.server import ProxyServer
from tests.bench.process import Process, ProcessError, running
from tests.bench.report import Aim, spread
from tests.stack import free_port

_MB = 1_000_000
_BLOCK = bytes(1024 * 1024)
_SECONDS_TO_START = 20.0
_NAME, _PASSWORD = b"bench", b"password"
_AIMS = {"microsocks": 2.0, "dante": 0.8}  # times what these carry, which are written in C
_DANTE = """
logoutput: stderr
internal: 127.0.0.1 port = {port}
external: lo
clientmethod: none
socksmethod: none
client pass {{ from: 127.0.0.0/8 to: 0.0.0.0/0 }}
socks pass {{ from: 127.0.0.0/8 to: 0.0.0.0/0 }}
"""


@dataclass(slots=True)
class Result:
    """What went through one way, in the order of the rounds: MB/s, new connections a second; CPU by what it did.

    `cpu_gb` is in seconds for a GB, `cpu_connection` in ms for a connection, all of the proxy's processes together.
    """

    name: str
    title: str
    mb: list[float] = field(default_factory=list)
    connections: list[float] = field(default_factory=list)
    cpu_gb: list[float] = field(default_factory=list)
    cpu_connection: list[float] = field(default_factory=list)
    memory: float = 0.0


@dataclass(frozen=True, slots=True)
class Way:
    """A way to the target: by the proxy at `port` and its process, or directly."""

    name: str
    title: str
    port: int = 0
    process: Process | None = None
    with_login: bool = True

    def connect(self, target: int) -> socket.socket:
        """Return a connection to a port of 127.0.0.1.

        Raises ProcessError if the proxy refuses.
        """
        made = socket.create_connection(("127.0.0.1", self.port or target), timeout=30)
        if not self.port:
            return made
        if self.with_login:
            login = bytes([1, len(_NAME)]) + _NAME + bytes([len(_PASSWORD)]) + _PASSWORD
            self._say(made, b"\5\1\2", b"\5\2")
            self._say(made, login, b"\1\0")
        else:
            self._say(made, b"\5\1\0", b"\5\0")
        self._say(made, b"\5\1\0\1\x7f\0\0\1" + target.to_bytes(2), b"\5\0\0\1")
        made.recv(6, socket.MSG_WAITALL)
        return made

    def cpu_seconds(self) -> float:
        """Return the CPU time that it has taken so far."""
        return self.process.cpu_seconds() if self.process else 0.0

    def _say(self, to: socket.socket, words: bytes, expected: bytes) -> None:
        to.sendall(words)
        answer = to.recv(len(expected), socket.MSG_WAITALL)
        if answer != expected:
            raise ProcessError(f"{self.title} has answered {answer!r} to {words!r}.")


class Proxies:
    """The results, the direct way first and ours second, as a part of the report."""

    name = "proxies"

    def __init__(self, results: Sequence[Result], *, megabytes: int) -> None:
        self._results = results
        self._direct, self._ours, *self._others = results
        self._megabytes = megabytes

    def text(self) -> list[str]:
        """Return it for a person to read."""
        row = "{:<32} {:>24} {:>9} {:>26} {:>9} {:>6}"
        missing = {"microsocks", "dante"} - {result.name for result in self._others}
        install = [f"Not installed, and not compared: {', '.join(sorted(missing))}."] if missing else []
        return [
            f"{self._megabytes} MB from loopback to loopback over one connection, and connections one after the other;",
            f"{len(self._ours.mb)} rounds, the order rotating; medians (range).",
            "",
            row.format("", "MB/s", "CPU s/GB", "connections/s", "CPU ms", "MB"),
            *(row.format(*_cells(result)) for result in self._results),
            "",
            "CPU: of the proxy's processes, for a GB and for a connection. Dante is not asked for a login, the others",
            "are. Client and target are on the same cores: what a network carries is less than any of these.",
            *install,
        ]

    def aims(self) -> list[Aim]:
        """Return what is aimed at and what was reached."""
        aims = []
        for other in self._others:
            ratios = [ours / its for ours, its in zip(self._ours.mb, other.mb, strict=True)]
            least = _AIMS[other.name]
            text = f"proxies: at least {least:g} times the bytes a second of {other.name}"
            aims.append(Aim(text, spread(ratios), median(ratios) >= least))
        return aims

    def facts(self) -> dict[str, Any]:
        """Return it for programs."""
        return {"megabytes": self._megabytes, "ways": [asdict(result) for result in self._results]}


def measure_proxies(folder: Path, *, rounds: int, seconds: int, megabytes: int = 1000) -> Proxies:
    """Send bytes and open connections by every way, round by round.

    Raises ProcessError if a proxy does not start or does not do its work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _ways(folder) as (target, ways):
        results = [Result(way.name, way.title) for way in ways]
        for number in range(rounds):
            click.echo(f"Round {number + 1} of {rounds}…", err=True)
            for index in [(number + place) % len(ways) for place in range(len(ways))]:
                _download(results[index], ways[index], target, megabytes)
                _open(results[index], ways[index], target, seconds)
        for result, way in zip(results, ways, strict=True):
            result.memory = way.process.memory()[1] if way.process else 0.0
    return Proxies(results, megabytes=megabytes)


@contextmanager
def _ways(folder: Path) -> Iterator[tuple[int, list[Way]]]:
    """Start the target and every proxy that there is; yield the target's port and the ways to it."""
    with ExitStack() as stack:

        def start(name: str, *command: str) -> Process:
            return stack.enter_context(running(command, log=folder / f"{name}.log"))

        def ours(name: str, port: int) -> Process:
            return start(name, sys.executable, "-m", "tests.bench.socks", name, str(port))

        target, port = free_port(), free_port()
        process = ours("target", target)
        ways = [Way("direct", "directly"), Way("ours", "ours", port, ours("serve", port))]
        if microsocks := shutil.which("microsocks"):
            port = free_port()
            login = ("-u", _NAME.decode(), "-P", _PASSWORD.decode())
            by = start("microsocks", microsocks, "-i", "127.0.0.1", "-p", str(port), *login)
            ways.append(Way("microsocks", "microsocks", port, by))
        if danted := shutil.which("danted", path="/usr/sbin:/usr/bin"):
            port = free_port()
            config = folder / "danted.conf"
            config.write_text(_DANTE.format(port=port))
            by = start("dante", danted, "-f", str(config))
            ways.append(Way("dante", "dante", port, by, with_login=False))
        _wait(target, process)
        for way in ways[1:]:
            _wait(way.port, way.process)
        yield target, ways


def _wait(port: int, process: Process | None) -> None:
    until = time.monotonic() + _SECONDS_TO_START
    while process is not None and process.is_running and time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
        else:
            return
    raise ProcessError(f"Nobody answers on port {port}: {process and process.log.read_text(errors='replace')[-1000:]}")


def _download(result: Result, way: Way, target: int, megabytes: int) -> None:
    wanted, got, room = megabytes * _MB, 0, bytearray(len(_BLOCK))
    before = way.cpu_seconds()
    with way.connect(target) as made:
        began = time.perf_counter()
        made.sendall(wanted.to_bytes(8))
        while size := made.recv_into(room):
            got += size
        took = time.perf_counter() - began
    if got != wanted:
        raise ProcessError(f"{way.title}: {got} bytes of {wanted}.")
    result.mb.append(megabytes / took)
    result.cpu_gb.append((way.cpu_seconds() - before) / megabytes * 1000)


def _open(result: Result, way: Way, target: int, seconds: int) -> None:
    before, began, count = way.cpu_seconds(), time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        with way.connect(target) as made:
            made.sendall((1).to_bytes(8))
            if made.recv(2, socket.MSG_WAITALL) != _BLOCK[:1]:
                raise ProcessError(f"{way.title} has lost a byte.")
        count += 1
    result.connections.append(count / (time.perf_counter() - began))
    result.cpu_connection.append((way.cpu_seconds() - before) / count * 1000)


def _cells(result: Result) -> tuple[str, ...]:
    cpu = f"{median(result.cpu_gb):.2f}", f"{median(result.cpu_connection):.2f}", f"{result.memory:.1f}"
    of_bytes, of_connection, memory = cpu if result.memory else ("", "", "")
    mb, connections = spread(result.mb, digits=0), spread(result.connections, digits=0)
    return result.title, mb, of_bytes, connections, of_connection, memory


async def _serve(port: int) -> None:
    clock = SystemClock()
    credentials = Credentials(clock)
    digest = hashlib.sha256(_PASSWORD).digest()
    credentials.put(Credential("px_1", _NAME.decode(), b"", digest, (), 1000, 0, None))
    destinations = Destinations(allowed_networks=[ip_network("127.0.0.0/8")])
    server = ProxyServer(credentials=credentials, destinations=destinations, registry=CollectorRegistry(), clock=clock)
    await server.start(["127.0.0.1"], port)
    await asyncio.Event().wait()


def _send(port: int) -> None:
    """Be the target: send as many bytes as each client asks for in its first eight."""
    with socket.create_server(("127.0.0.1", port), backlog=1024) as listener:
        while True:
            client, _ = listener.accept()
            with client:
                left = int.from_bytes(client.recv(8, socket.MSG_WAITALL))
                while left > 0:
                    left -= client.send(_BLOCK[:left])


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        uvloop.run(_serve(int(sys.argv[2])))
    else:
        _send(int(sys.argv[2]))
