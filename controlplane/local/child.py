"""A program that runs for as long as we do: started, started again if it dies, and never left behind."""

import asyncio
import shutil
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

import structlog

_SECONDS_TO_STOP = 15.0
_RESTART_AFTER = 1.0

_log = structlog.get_logger("up")


class Child:
    """One program. It has a session of its own, so that Ctrl-C reaches us alone and we decide the order of the end."""

    def __init__(self, name: str, command: Sequence[str], *, stdout: IO[bytes] | None = None) -> None:
        self.name = name
        self._command = [*_dies_with_us(), *command]
        self._stdout = stdout
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start it once; `keep_alive` is for when it has shown that it works."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=self._stdout, start_new_session=True
        )

    @property
    def is_running(self) -> bool:
        """Whether it runs right now."""
        return self._process is not None and self._process.returncode is None

    def keep_alive(self) -> None:
        """From now on, start it again whenever it ends."""
        self._watch = asyncio.create_task(self._restart())

    async def stop(self) -> None:
        """Ask it to end (SIGTERM), and make it end if it has not after a while."""
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        if self._process is None:
            return
        for order, patience in ((signal.SIGTERM, _SECONDS_TO_STOP), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError):
                self._process.send_signal(order)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), patience)
                return

    async def _restart(self) -> None:
        while True:
            assert self._process is not None  # noqa: S101 - it was started before it was watched
            status = await self._process.wait()
            _log.error("a program has ended and is started again", program=self.name, status=status)
            await asyncio.sleep(_RESTART_AFTER)
            await self.start()


def _dies_with_us() -> list[str]:
    """Return what to put before a command so that the kernel ends it when we are killed (Linux only)."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []
