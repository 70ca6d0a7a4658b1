"""An engine whose cluster is a dictionary, at the seam that is ours: a test decides when a step ends, and how."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from controlplane.databases.engines.engine import (
    Check,
    Connection,
    Contents,
    Dump,
    EngineError,
    Missing,
    Observation,
    Target,
    unchecked,
)


class FakeDump:
    """A dump that is a name."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def chunks(self) -> AsyncIterator[bytes]:
        """Return the name."""
        yield self._name.encode()

    def contents(self) -> Contents:
        """Return that there is nothing."""
        return Contents({})


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

    async def apply(self, target: Target, *, check: Check = unchecked) -> tuple[str, ...]:
        """Keep the target, unless it should be there already and is not."""
        await self._pass("apply", target.name)
        await check()
        before = self.databases.get(target.name)
        if before is None and target.exists:
            raise Missing
        self.databases[target.name] = wanted = replace(target, exists=False)
        if before is None:
            return ("the database",)
        return () if before == wanted else ("the user",)

    async def drop(self, name: str, *, check: Check = unchecked) -> None:
        """Forget the target."""
        await self._pass("drop", name)
        await check()
        self.databases.pop(name, None)

    async def observe(self, name: str) -> Observation | None:
        """Tell whether there is such a target."""
        await self._pass("observe", name)
        target = self.databases.get(name)
        return None if target is None else Observation(login=target.login, connections=0, size_bytes=0)

    async def names(self, prefix: str) -> set[str]:
        """Return the names of the targets."""
        return {name for name in self.databases if name.startswith(prefix)}

    @asynccontextmanager
    async def dump(self, name: str) -> AsyncIterator[Dump]:
        """Open a dump that is the name."""
        await self._pass("dump", name)
        if name not in self.databases:
            raise EngineError("There is no such database.")
        yield FakeDump(name)

    async def restore(self, name: str, password: str, chunks: AsyncIterator[bytes]) -> None:
        """Read the dump to its end."""
        await self._pass("restore", name)
        del password
        async for _ in chunks:
            pass

    async def contents(self, name: str) -> Contents:
        """Return that there is nothing."""
        await self._pass("contents", name)
        return Contents({})

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
