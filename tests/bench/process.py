"""A server under test: started in a session of its own, measured from /proc, and never left behind."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

_TICKS = os.sysconf("SC_CLK_TCK")
_SECONDS_TO_START = 30.0
_SECONDS_TO_STOP = 15.0


class ProcessError(Exception):
    """A program does not answer; the message has what it said last."""


@dataclass(frozen=True, slots=True)
class Process:
    """A program and all that it has started; `log` is where it says what it has to say."""

    pid: int
    log: Path

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        stat = _stat(self.pid)
        return bool(stat) and stat[0] != "Z"

    def cpu_seconds(self) -> float:
        """Return the CPU time that all of it has taken so far, in user and kernel mode."""
        return sum(_cpu_seconds(pid) for pid in self._pids())

    def memory(self) -> tuple[float, float]:
        """Return in MB the resident memory (RSS) of its largest process, and the memory of all of it (PSS)."""
        sizes = [_memory(pid) for pid in self._pids()]
        return max(rss for rss, _ in sizes), sum(pss for _, pss in sizes)

    def _pids(self) -> list[int]:
        """Return the processes of its session."""
        every = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [pid for pid in every if _session(pid) == self.pid]


@contextmanager
def running(command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> Iterator[Process]:
    """Run a program while the body runs, with `env` added to our own environment."""
    setpriv = shutil.which("setpriv")
    dies_with_us = [setpriv, "--pdeathsig", "TERM"] if setpriv else []
    with log.open("wb") as out:
        program = subprocess.Popen(
            [*dies_with_us, *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    try:
        yield Process(program.pid, log)
    finally:
        _stop(program)


def wait_for(url: str, *processes: Process, token: str = "") -> None:
    """Wait until this URL answers with a success.

    Raises ProcessError if it does not, or if one of the processes has ended.
    """
    headers = {"authorization": f"Bearer {token}"} if token else {}
    until = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < until:
        with suppress(httpx.TransportError):
            if httpx.get(url, headers=headers).is_success:
                return
        if not all(process.is_running for process in processes):
            break
        time.sleep(0.1)
    logs = "\n".join(f"--- {process.log.name}\n{_tail(process.log)}" for process in processes)
    raise ProcessError(f"{url} does not answer.\n{logs}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:])


def _stop(program: "subprocess.Popen[bytes]") -> None:
    """Ask it to end, then make all of its group end."""
    program.terminate()
    with suppress(subprocess.TimeoutExpired):
        program.wait(_SECONDS_TO_STOP)
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    program.wait()


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name (proc(5)); none for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _session(pid: int) -> int | None:
    stat = _stat(pid)
    return int(stat[3]) if stat else None


def _cpu_seconds(pid: int) -> float:
    stat = _stat(pid)
    return (int(stat[11]) + int(stat[12])) / _TICKS if stat else 0.0


def _memory(pid: int) -> tuple[float, float]:
    """Return RSS and PSS in MB."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, size = line.partition(":")
        sizes[name] = int(size.split()[0]) / 1024
    return sizes["Rss"], sizes["Pss"]
