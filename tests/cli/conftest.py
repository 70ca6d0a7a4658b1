"""The operator's command as an operator runs it: a process with variables of its own."""

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

COMMAND = Path(sys.executable).with_name("controlplane")


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    status: int
    output: str
    errors: str


Run = Callable[..., Coroutine[Any, Any, Ended]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run `controlplane` on a data folder of the test's own; capital letters are settings."""

    async def run(*arguments: str | Path, stdin: str = "", **settings: object) -> Ended:
        process = await asyncio.create_subprocess_exec(
            str(COMMAND),
            *map(str, arguments),
            env=environment(tmp_path / "data", **settings),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            output, errors = await asyncio.wait_for(process.communicate(stdin.encode()), 40)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        ended = Ended(process.returncode, output.decode(), errors.decode())
        assert "Traceback" not in ended.errors, ended.errors
        return ended

    return run


def environment(data_dir: Path, **settings: object) -> dict[str, str]:
    """Return this process's variables, without its settings and with these."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HTX_", "OTEL_"))}
    return {**inherited, "HTX_DATA_DIR": str(data_dir), **{name: str(value) for name, value in settings.items()}}
