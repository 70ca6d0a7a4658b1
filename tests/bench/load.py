"""The load: wrk, or our own native gRPC client; and what one run of it has shown."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONNECTIONS = 32
_SCRIPT = Path(__file__).with_name("wrk.lua")
_PATIENCE = 30.0  # seconds beyond the run itself


class LoadError(Exception):
    """A run had errors, and what it has measured means nothing; the message says which."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run: how many requests were answered a second, and how long half and 99 % of them took at the most."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


def wrk_command(url: str, tokens: Path, seconds: int) -> list[str]:
    """Return the command that keeps `url` busy over 32 connections, with one token after another.

    Raises LoadError if there is no wrk.
    """
    wrk = shutil.which("wrk")
    if wrk is None:
        raise LoadError("There is no wrk: `apt-get install wrk`.")
    return [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", str(_SCRIPT), url, "--", str(tokens)]


def native_command(address: str, tokens: Path, seconds: int) -> list[str]:
    """Return the command that does the same by native gRPC, with as many calls at a time."""
    return [sys.executable, "-m", "tests.bench.native", address, str(tokens), str(seconds), str(CONNECTIONS)]


def run_load(command: Sequence[str], seconds: int) -> Run:
    """Run a load.

    Raises LoadError unless every request of it was answered, and with a success.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + _PATIENCE, check=False)
    if done.returncode:
        raise LoadError(f"{command[0]} has failed: {done.stderr or done.stdout}")
    return read_run(done.stdout)


def read_run(output: str) -> Run:
    """Read what a load has printed.

    Raises LoadError unless every request of it was answered, and with a success.
    """
    result = json.loads(output.splitlines()[-1])
    refused, broken = result.pop("refused"), result.pop("broken")
    if refused or broken or not result["requests"]:
        raise LoadError(f"{result['requests']} requests, {refused} refused, {broken} broken.")
    return Run(**result)
