"""A sandbox of the tests' own, and functions of a few lines to run in it."""

import itertools
import json
import shutil
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlplane.functions.host.sandbox import Sandbox
from controlplane.functions.host.worker import Program, Worker
from tests.stack import eventually

PROGRAMS = Path(__file__).with_name("programs")
_FILES = {"python3": "main.py", "nodejs": "main.mjs", "wasm": "main.wat"}
_FIRST_UID, _UIDS = 710_000, 50

_numbers = itertools.count(1)
_uids = itertools.count(_FIRST_UID, _UIDS)


@dataclass
class Running:
    """A worker, and what it has printed so far: the stream and the line."""

    worker: Worker
    lines: list[tuple[str, str]]

    async def call(self, event: Any = None, *, seconds: float = 20) -> Any:
        """Call the function; return its answer."""
        answer = await self.worker.invoke(json.dumps(event).encode(), {"request_id": "rq_1"}, seconds=seconds)
        return json.loads(answer.payload)

    def printed(self, stream: str = "stdout") -> list[str]:
        """Return the lines of one stream."""
        return [line for each, line in self.lines if each == stream]


class Workshop:
    """A sandbox, and where its functions' code is."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self.sandbox = sandbox
        self.folder = folder

    def program(self, source: str | Path, **wanted: Any) -> Program:
        """Return a function from its source, or from a folder with its code."""
        runtime = wanted.get("runtime", "python3")
        folder = self.folder / f"code-{next(_numbers)}"
        if isinstance(source, Path):
            shutil.copytree(source, folder)
        else:
            folder.mkdir()
            (folder / _FILES[runtime]).write_text(source)
        for each in (folder, *folder.rglob("*")):
            each.chmod(0o755)
        facts: dict[str, Any] = {
            "runtime": runtime,
            "folder": folder,
            "entrypoint": "main.wasm" if runtime == "wasm" else "main.handler",
            "memory_mb": 128,
            "timeout_ms": 3000,
            "environment": {},
            "allow_network": False,
            "tenant": "ac_one",
            "name": "greet",
            "version": 7,
        }
        return Program(**{**facts, **wanted})

    @asynccontextmanager
    async def running(self, source: str | Path, **wanted: Any) -> AsyncIterator[Running]:
        """Run a function while the body runs."""
        lines: list[tuple[str, str]] = []
        worker = await Worker.start(
            self.program(source, **wanted), self.sandbox, lambda stream, line: lines.append((stream, line))
        )
        try:
            yield Running(worker, lines)
        finally:
            await worker.stop()


@asynccontextmanager
async def open_workshop(folder: Path) -> AsyncIterator[Workshop]:
    """Have a sandbox while the body runs; the folder must be open for every user to pass through."""
    place = folder / f"sandbox-{next(_numbers)}"
    first = next(_uids)
    sandbox = Sandbox.open(place, range(first, first + _UIDS))
    try:
        yield Workshop(sandbox, place)
    finally:
        await sandbox.close()


async def all_ended(pids: Iterable[int]) -> None:
    """Wait until processes are gone. They have left their control groups a moment before that."""

    async def gone() -> bool:
        return not any(map(_is_running, pids))

    await eventually(gone, seconds=5)


def _is_running(pid: int) -> bool:
    """Return whether it is there, and not only until somebody takes note of its end."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
