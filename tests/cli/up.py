"""`controlplane up` as a person runs it: in the foreground of a terminal."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, environment
from tests.stack import eventually, free_port

PORTS = (
    *("HTTP", "GRPC", "METRICS", "EDGE_METRICS", "POSTGRES", "MARIADB", "CLICKHOUSE"),
    *("PROXY", "PROXY_METRICS", "FUNCTIONS_METRICS"),
)


class Up:
    """A running `controlplane up`, and what it has printed so far."""

    def __init__(self, data_dir: Path, *, command: Sequence[str] = (str(COMMAND),), **variables: str) -> None:
        self.data_dir = data_dir
        self.command = command
        self.variables = variables
        self.ports = {f"HTX_{name}_PORT": free_port() for name in PORTS}
        self.output = ""
        self.process: asyncio.subprocess.Process

    @property
    def base(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.ports['HTX_HTTP_PORT']}"

    async def start(self) -> None:
        """Start it, as a terminal would: in a process group of its own."""
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            "up",
            env=environment(self.data_dir, **self.ports, **self.variables),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        self.output = ""

    async def until(self, text: str, *, seconds: float = 90) -> None:
        """Wait until it has printed something."""
        assert self.process.stdout is not None
        async with asyncio.timeout(seconds):
            while text not in self.output:
                line = await self.process.stdout.readline()
                assert line, f"it has ended:\n{self.output}"
                self.output += line.decode()

    def login(self) -> tuple[str, str]:
        """Return the address and the password that it has printed."""
        login = re.search(r"Login +(\S+)  /  (\S+)   \(shown this once\)", self.output)
        assert login is not None
        return login[1], login[2]

    async def end(self) -> int:
        """Wait until it has ended; return the status."""
        assert self.process.stdout is not None
        self.output += (await asyncio.wait_for(self.process.stdout.read(), 90)).decode()
        return await asyncio.wait_for(self.process.wait(), 10)

    def processes(self) -> dict[int, str]:
        """Return the processes of this installation: those that have its data folder in their variables or line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (folder / "cmdline").read_bytes()
                variables = (folder / "environ").read_bytes()
                if os.fsencode(self.data_dir) in line + variables and not _is_zombie(folder):
                    found[int(folder.name)] = line.replace(b"\0", b" ").decode()
        return found

    def users(self) -> set[int]:
        """Return whom the processes belong to."""
        return {Path(f"/proc/{pid}").stat().st_uid for pid in self.processes()}

    def pid_of(self, text: str) -> int:
        """Return the one process with this in its command line."""
        pids = [pid for pid, line in self.processes().items() if text in line and "setpriv" not in line]
        assert len(pids) == 1, self.processes()
        return pids[0]

    async def until_nothing_runs(self) -> None:
        """Wait until no process of this installation is left."""

        async def none() -> bool:
            return not self.processes()

        try:
            await eventually(none, seconds=25)
        except TimeoutError:
            pytest.fail(f"still running: {self.processes()}")


def _is_zombie(folder: Path) -> bool:
    return (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


@asynccontextmanager
async def running(up: Up) -> AsyncIterator[Up]:
    """Start it, wait until it is up, and leave nothing of it running, whatever happens."""
    await up.start()
    try:
        await up.until("Ctrl-C stops everything")
        yield up
    finally:
        with suppress(ProcessLookupError):
            up.process.send_signal(signal.SIGTERM)
        with suppress(TimeoutError):
            await up.end()
        for pid in up.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
