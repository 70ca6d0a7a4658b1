"""How fast the list of databases is answered, beside the usual way to build the same: ratios of paired runs."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click

from tests.bench.commits import committing
from tests.bench.load import LoadError, Run, run_load
from tests.bench.ours import new_settings
from tests.bench.peers import Peer, peers
from tests.bench.report import Aim, spread
from tests.bench.revocation import Revocation, check_revocation
from tests.bench.same import check_same_work
from tests.bench.seed import seed

_MEMORY_AIM = 120.0  # MB
# How many times as fast as the fastest of these, by their paired medians, and in which words.
_AIMS = (
    (10.0, ("usual-1", "usual-1-pool1"), "the usual stack, one worker"),
    (4.0, ("usual-2", "usual-2-pool1"), "the usual stack, two workers"),
    (1.5, ("data-path-1",), "FastAPI on our data path, one worker"),
    (0.55, ("empty",), "an empty RPC through the same Envoy"),
)


@dataclass(slots=True)
class Result:
    """All runs of one peer, in the order of the rounds; CPU in microseconds per request, memory in MB."""

    name: str
    title: str
    runs: list[Run] = field(default_factory=list)
    server_cpu: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    process_mb: float = 0.0
    all_mb: float = 0.0


class Requests:
    """The results, ours first, as a part of the report."""

    name = "requests"

    def __init__(self, results: Sequence[Result], revocation: Revocation, *, seconds: int) -> None:
        self._results = results
        self._ours = results[0]
        self._revocation = revocation
        self._seconds = seconds

    def text(self) -> list[str]:
        """Return it for a person to read."""
        done = self._revocation
        row = "{:<42} {:>8} {:>24} {:>8} {:>8} {:>8} {:>8} {:>9} {:>7}"
        head = ("", "req/s", "ours ÷ it (range)", "CPU µs", "server", "p50 ms", "p99 ms", "MB/proc.", "MB all")
        tokens = f"{done.by_api} tokens revoked by the API and {done.by_another_process} by another process were"
        return [
            "GET /api/portal/databases: a bearer token, 20 databases, a hundred tokens in turn, over SQLite.",
            f"wrk -t1 -c32, {len(self._ours.runs)} rounds of {self._seconds} s each, the order rotating; medians.",
            "",
            row.format(*head),
            *(row.format(*self._cells(result)) for result in self._results),
            "",
            "CPU µs: per request, of all of a peer's processes, Envoy included; server: of its Python processes alone.",
            "MB: the largest process (RSS) and all together (PSS). Ours runs on two cores, as the two workers do.",
            "Native gRPC is asked by a Python client on the same cores: read its CPU, not its rate.",
            f"Beside {done.requests:,} requests, each just after it was used: {tokens} dead on the next request.",
        ]

    def aims(self) -> list[Aim]:
        """Return what is aimed at and what was reached."""
        named = {result.name: result for result in self._results}
        aims = []
        for factor, names, words in _AIMS:
            ratios = min((self._ratios(named[name]) for name in names), key=median)
            aims.append(Aim(f"at least {factor:g} times {words}", spread(ratios), median(ratios) >= factor))
        memory = self._ours.process_mb
        aims.append(Aim(f"a server process below {_MEMORY_AIM:.0f} MB", f"{memory:.0f} MB", memory < _MEMORY_AIM))
        return aims

    def facts(self) -> dict[str, Any]:
        """Return it for programs."""
        return {
            "seconds": self._seconds,
            "peers": [{**asdict(result), "ours_divided_by_it": self._ratios(result)} for result in self._results],
            "revocation": asdict(self._revocation),
        }

    def _cells(self, result: Result) -> tuple[str, ...]:
        return (
            result.title,
            f"{median(run.rate for run in result.runs):,.0f}",
            "1" if result is self._ours else spread(self._ratios(result)),
            f"{median(result.cpu):,.0f}",
            f"{median(result.server_cpu):,.0f}",
            f"{median(run.p50_ms for run in result.runs):.1f}",
            f"{median(run.p99_ms for run in result.runs):.1f}",
            f"{result.process_mb:.0f}",
            f"{result.all_mb:.0f}",
        )

    def _ratios(self, result: Result) -> list[float]:
        """Return how many times as fast ours was, round by round."""
        return [ours.rate / its.rate for ours, its in zip(self._ours.runs, result.runs, strict=True)]


def measure_requests(folder: Path, *, rounds: int, seconds: int) -> Requests:
    """Put every peer under load, round by round.

    Raises LoadError if a run had errors, PeerError if a peer does other work or a revoked token still worked.
    """
    settings = new_settings(folder, folder / "catalog.toml")
    seeded = asyncio.run(seed(settings))
    click.echo("Starting the peers…", err=True)
    with peers(settings, seeded, seconds=seconds) as every:
        check_same_work(every, seeded, f"127.0.0.1:{settings.grpc_port}")
        click.echo("All answer the same. Warming up…", err=True)
        for peer in every:
            _run(peer, seconds, settings.data_dir)
        results = [Result(peer.name, peer.title) for peer in every]
        for number in range(rounds):
            click.echo(f"Round {number + 1} of {rounds}…", err=True)
            for index in [(number + place) % len(every) for place in range(len(every))]:
                _add_run(results[index], every[index], seconds, settings.data_dir)
        for result, peer in zip(results, every, strict=True):
            result.process_mb, result.all_mb = _memory(peer)
        click.echo("Revoking tokens under load…", err=True)
        revocation = check_revocation(every[0], seeded, folder / "controlplane.db")
    return Requests(results, revocation, seconds=seconds)


def _add_run(result: Result, peer: Peer, seconds: int, folder: Path) -> None:
    server_before, before = peer.cpu_seconds()
    run = _run(peer, seconds, folder)
    server_after, after = peer.cpu_seconds()
    result.runs.append(run)
    result.server_cpu.append((server_after - server_before) / run.requests * 1e6)
    result.cpu.append((after - before) / run.requests * 1e6)


def _run(peer: Peer, seconds: int, folder: Path) -> Run:
    try:
        with committing(folder / "controlplane.db", a_second=peer.commits):
            return run_load(peer.load, seconds)
    except LoadError as error:
        raise LoadError(f"{peer.title}: {error}") from None


def _memory(peer: Peer) -> tuple[float, float]:
    """Return the MB of the server's largest process, and of all of the peer's."""
    largest, _ = peer.server.memory()
    return largest, sum(process.memory()[1] for process in peer.processes)
