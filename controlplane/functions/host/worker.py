"""A worker: one version of a customer's function, loaded once in the sandbox, answering one call after the other."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from controlplane.functions.host.cell import Cell, Confined
from controlplane.functions.host.lines import Lines
from controlplane.functions.host.runtimes import Name, Runtime
from controlplane.functions.host.sandbox import CORES, Sandbox, SandboxUnavailable

LARGEST_ANSWER = 6 << 20  # bytes; the runtimes refuse to send more

_SECONDS_TO_START = 10.0
_CORES_WHEN_IDLE = 0.05  # for what a function does between its calls, which nobody has asked for
_HEADER = struct.Struct("!cII")
_GREETING = 0  # the first answer's number, to no call
# The runtimes of their own accord give up in time; the host waits so much longer for them to say so.
_GRACE = {"python3": 0.0, "nodejs": 0.0, "wasm": 0.2}
_SECONDS_TO_DIE = 1.0
_HEAP_IS_FULL = "JavaScript heap out of memory"
_SIGNALLED = 128  # and the signal's number: the status of what a signal has ended
_LARGEST_FAILURE = 256 << 10  # bytes

Kind = Literal["error", "timeout", "crashed", "out_of_memory", "too_large"]


@dataclass(frozen=True, slots=True)
class Program:
    """One version of a function. The sandbox sees its folder as /code, and cannot write there."""

    runtime: Name
    folder: Path  # the unpacked code, readable by every user, below the sandbox's folder
    entrypoint: str  # "module.function", "file.export", "main.wasm"
    memory_mb: int
    timeout_ms: int
    environment: Mapping[str, str]
    allow_network: bool
    tenant: str  # the account's id
    name: str
    version: int


class StartFailed(Exception):
    """The code cannot be loaded; the text is for the customer, and has the traceback if there is one."""


class InvocationFailed(Exception):
    """A call has no answer; the text and `trace` are for the customer."""

    def __init__(self, kind: Kind, message: str, trace: str | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.trace = kind, message, trace


@dataclass(frozen=True, slots=True)
class Answer:
    """What a function returned, as JSON. A function that is out to cheat can send anything here."""

    payload: bytes


class Worker:
    """A running function. Made by `start()`; once `alive` is false it stays so."""

    _cell: Cell
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter

    def __init__(self, program: Program, on_line: Callable[[str, str], None]) -> None:
        self._program = program
        self._on_line = on_line
        self._lines = Lines(self._hear)
        self._number = _GREETING
        self._is_busy = False
        self._is_ending = False
        self._is_spoiled = False
        self._is_heap_full = False

    @classmethod
    async def start(cls, program: Program, sandbox: Sandbox, on_line: Callable[[str, str], None]) -> Self:
        """Load a function; `on_line` gets "stdout" or "stderr" and each line that it prints, as long as it lives.

        Raises StartFailed, for what the customer can change, and SandboxUnavailable, for what only we can.
        """
        runtime = sandbox.runtimes.get(program.runtime)
        if runtime is None:
            raise StartFailed(f"The runtime {program.runtime} is not offered here.")
        if program.allow_network and not sandbox.network:
            raise StartFailed("This provider offers no network to functions: deploy it without allow_network.")
        if program.folder.stat().st_mode & 0o005 != 0o005:  # noqa: PLR2004 - or its code would seem not to be there
            raise SandboxUnavailable([f"The functions' users cannot read {program.folder}: chmod -R o+rX it."])
        worker = cls(program, on_line)
        await worker._open(runtime, sandbox)
        try:
            await worker._load()
        except BaseException:
            worker._end()
            raise
        return worker

    @property
    def alive(self) -> bool:
        """Whether it can take another call."""
        return not self._is_ending and self._cell.status is None

    def memory_peak(self) -> int:
        """Return the most memory that it has used at any time, in bytes."""
        return self._cell.memory_peak()

    async def invoke(self, event: bytes, context: Mapping[str, str | int], *, seconds: float) -> Answer:
        """Call the function with an event (JSON); `context` has at least `request_id`, and is handed to it.

        One call at a time. Raises InvocationFailed; the worker may be dead then. A call that is cancelled ends it.
        """
        if self._is_busy:
            raise RuntimeError("This worker is answering another call.")
        if not self.alive:
            raise await self._obituary()
        self._is_busy = True
        try:
            facts = {**context, "remaining_ms": int(seconds * 1000)}
            self._give_cores(CORES)
            async with asyncio.timeout(seconds + _GRACE[self._program.runtime]):
                return Answer(await self._call(facts, event))
        except TimeoutError:
            await self.stop()
            if self._cell.is_out_of_memory:  # version 1 of control groups ends one process, and others wait for it
                raise self._out_of_memory() from None
            raise _timed_out(seconds) from None
        except _Gone:
            raise await self._obituary() from None
        except InvocationFailed as failure:
            if failure.kind == "timeout":  # the runtime of itself, which lives on
                raise _timed_out(seconds) from None
            raise
        except BaseException:
            self._end()
            raise
        finally:
            self._is_busy = False
            self._rest()

    async def stop(self) -> None:
        """End it at once, with everything that it has started; return when nothing of it is left."""
        self._end()
        await asyncio.shield(self._cell.ended)

    async def _open(self, runtime: Runtime, sandbox: Sandbox) -> None:
        ours, theirs = socket.socketpair()
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        outputs = [self._lines.open("stdout"), self._lines.open("stderr")]
        try:
            confined = _confine(self._program, runtime)
            self._cell = await sandbox.start(confined, channel=theirs, stdout=outputs[0], stderr=outputs[1])
        except BaseException:
            self._hang_up()
            raise
        finally:
            theirs.close()
            for descriptor in outputs:
                os.close(descriptor)
        self._cell.ended.add_done_callback(lambda _: self._hang_up())

    async def _load(self) -> None:
        program = self._program
        facts = {
            "entrypoint": program.entrypoint,
            "environment": dict(program.environment),
            "function_name": program.name,
            "function_version": program.version,
            "memory_limit_in_mb": program.memory_mb,
        }
        try:
            async with asyncio.timeout(_SECONDS_TO_START):
                await self._receive(_GREETING)
                self._lines.release()
                await self._call(facts, b"")
        except TimeoutError:
            await self.stop()
            raise StartFailed(f"The code took longer than {_SECONDS_TO_START:g} s to load.") from None
        except InvocationFailed as failure:
            await self.stop()
            raise StartFailed(failure.trace or failure.message) from None
        except _Gone:
            death = await self._obituary()
            if self._lines.aside and death.kind != "out_of_memory":  # it was the sandbox that failed
                raise SandboxUnavailable([self._lines.aside]) from None
            raise StartFailed(f"{death.message} That was while its code was loaded.") from None
        self._rest()

    async def _call(self, facts: Mapping[str, Any], event: bytes) -> bytes:
        """Send what the next call is about and its event; return the answer. Raises InvocationFailed and _Gone."""
        self._number += 1
        for kind, body in ((b"C", json.dumps(facts).encode()), (b"E", event)):
            self._writer.write(_HEADER.pack(kind, self._number, len(body)))
            self._writer.write(body)
        try:
            await self._writer.drain()
        except ConnectionError:
            raise _Gone from None
        return await self._receive(self._number)

    async def _receive(self, number: int) -> bytes:
        """Read the answer to a call, of which nothing can be trusted: the customer's code may have sent it."""
        try:
            kind, answered, length = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
            largest = {b"A": LARGEST_ANSWER, b"X": _LARGEST_FAILURE}.get(kind, -1)
            if answered != number or length > largest:
                self._is_spoiled = True
                raise _Gone
            body = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise _Gone from None
        if kind == b"A":
            return body
        try:
            failure = json.loads(body)
            trace = failure["trace"]
            if failure["kind"] not in get_args(Kind) or not isinstance(failure["message"], str):
                raise TypeError  # noqa: TRY301 - like whatever else may be wrong with it
        except (ValueError, TypeError, LookupError):
            self._is_spoiled = True
            raise _Gone from None
        raise InvocationFailed(failure["kind"], failure["message"], None if trace is None else str(trace))

    async def _obituary(self) -> InvocationFailed:
        """Return why there is no answer, once the worker is dead."""
        if not self._is_spoiled:
            # It is ending by itself, and how is known only if we do not end it first.
            await asyncio.wait([self._cell.ended], timeout=_SECONDS_TO_DIE)
        await self.stop()
        status = self._cell.status or 0
        if self._cell.is_out_of_memory or self._is_heap_full:
            return self._out_of_memory()
        if self._is_spoiled:
            message = "The function wrote to the channel that is its runtime's, and was ended."
        elif status > _SIGNALLED:
            message = f"The function's process was ended by {_signal_name(status - _SIGNALLED)}."
        else:
            message = f"The function's process ended by itself, with exit status {status}."
        return InvocationFailed("crashed", message)

    def _out_of_memory(self) -> InvocationFailed:
        memory_mb = self._program.memory_mb
        return InvocationFailed("out_of_memory", f"The function used more than its {memory_mb} MB of memory.")

    def _rest(self) -> None:
        """Hand over what it has printed, and let it do little until the next call."""
        self._lines.catch_up()
        if self.alive:
            self._give_cores(_CORES_WHEN_IDLE)

    def _give_cores(self, cores: float) -> None:
        with contextlib.suppress(OSError):  # it has just died
            self._cell.group.set_cores(cores)

    def _end(self) -> None:
        self._is_ending = True
        self._cell.kill()

    def _hang_up(self) -> None:
        """Take what is left to be read, once nothing of it is there any more."""
        self._lines.close()
        self._writer.close()

    def _hear(self, stream: str, line: str) -> None:
        self._is_heap_full |= stream == "stderr" and _HEAP_IS_FULL in line
        self._on_line(stream, line)


class _Gone(Exception):
    """The other end of the channel is closed, or is nobody to talk to."""


def _confine(program: Program, runtime: Runtime) -> Confined:
    three_quarters_mb = program.memory_mb * 3 // 4
    return Confined(
        tenant=program.tenant,
        command=[part.format(three_quarters_mb=three_quarters_mb) for part in runtime.command],
        folder="/code",
        mounts={**runtime.mounts, "/code": program.folder},
        memory_mb=program.memory_mb,
        network=program.allow_network,
    )


def _timed_out(seconds: float) -> InvocationFailed:
    return InvocationFailed("timeout", f"The function did not answer within {seconds:g} s.")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
