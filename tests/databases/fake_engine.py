"""An engine whose cluster is a dictionary, at the seam that is ours: a test decides when a step ends, and how."""

import asyncio
from collections import Counter
from pathlib import Path

from controlplane.databases.engines.engine import Connection, EngineError, Target


class FakeEngine:
    """Holds targets by name. It counts what it is asked, and notices two at once on one name.

    With `hold()` each call waits until `release()`; with `failure` set each call raises it, after the wait.
    """

    def __init__(self) -> None:
        self.databases: dict[str, Target] = {}
        self.calls: list[tuple[str, str]] = []
        self.failure: Exception | None = None
        self.takes = 0.0
        self.entered = asyncio.Semaphore(0)
        self.at_once: Counter[str] = Counter()
        self._inside: Counter[str] = Counter()
        self._gate = asyncio.Event()
        self._gate.set()

    def hold(self) -> asyncio.Event:
        """Let whoever comes from now on wait for the event that this returns."""
        self._gate = asyncio.Event()
        return self._gate

    def release(self) -> None:
        """Let those go on who wait since the last `hold`."""
        self._gate.set()

    async def apply(self, target: Target) -> None:
        """Keep the target."""
        await self._pass("apply", target.name)
        self.databases[target.name] = target

    async def drop(self, name: str) -> None:
        """Forget the target."""
        await self._pass("drop", name)
        self.databases.pop(name, None)

    async def dump(self, name: str, path: Path) -> None:
        """Write the name into the file."""
        await self._pass("dump", name)
        if name not in self.databases:
            raise EngineError("There is no such database.")
        await asyncio.to_thread(path.write_text, name)

    def connection(self, name: str, password: str) -> Connection:
        """Return an address that leads nowhere."""
        return Connection("host", 1, name, name, password, f"fake://{name}")

    async def _pass(self, what: str, name: str) -> None:
        self.calls.append((what, name))
        self._inside[name] += 1
        self.at_once[name] = max(self.at_once[name], self._inside[name])
        gate = self._gate
        self.entered.release()
        try:
            await gate.wait()
            if self.takes:
                await asyncio.sleep(self.takes)
            if self.failure is not None:
                raise self.failure
        finally:
            self._inside[name] -= 1
