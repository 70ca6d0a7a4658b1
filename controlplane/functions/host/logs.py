"""The log lines of all functions on their way to the control plane: bounded, in batches, and kept while it is away."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import grpc
import structlog

from controlplane.api.hosts.v1 import hosts_pb2
from controlplane.functions.host.pool import Ended

_SEND_EVERY = 0.5  # seconds
_SEND_PATIENCE = 5.0
_TRY_AGAIN_LONGEST = 5.0
_LAST_TRY = 2.0
# Of a batch: gRPC takes 4 MiB in one message.
_BATCH_LINES = 1000
_BATCH_BYTES = 1024 * 1024
# In a second, of one function: lines that it prints, and lines of its calls, each counted by themselves.
_LINES_A_SECOND = 200
_LONGEST_LINE = 8192  # characters
_REFUSED_FOR_GOOD = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}

_log = structlog.get_logger("functions")


@dataclass(slots=True)
class _Second:
    """What a function has said in the present second."""

    began: float
    version: int
    lines: int = 0
    left_out: int = 0


class Logs:
    """Takes lines at any time. `report` sends a batch with its number; an error of gRPC means that it is sent again."""

    def __init__(
        self, report: Callable[[int, Sequence[hosts_pb2.FunctionLog]], Awaitable[None]], *, most_lines: int = 50_000
    ) -> None:
        self._report = report
        self._most_lines = most_lines
        self._waiting: deque[hosts_pb2.FunctionLog] = deque()
        self._seconds: dict[tuple[str, bool], _Second] = {}
        self._overflow = 0
        self._batch: list[hosts_pb2.FunctionLog] = []
        self._sent = 0  # batches

    def add_line(
        self, function_id: str, version: int, stream: Literal["stdout", "stderr"], text: str, request_id: str
    ) -> None:
        """Add a line that a function printed."""
        if self._may_speak(function_id, version, is_request=False):
            line = hosts_pb2.FunctionLog(stream=stream, text=text[:_LONGEST_LINE], request_id=request_id)
            self._add(function_id, version, line)

    def add_call(self, function_id: str, ended: Ended, request_id: str) -> None:
        """Add the line of a call; what went wrong is its text."""
        if self._may_speak(function_id, ended.version, is_request=True):
            text = "\n".join(filter(None, (ended.message, ended.trace)))
            line = hosts_pb2.FunctionLog(
                stream="request",
                text=text[:_LONGEST_LINE],
                request_id=request_id,
                outcome=ended.outcome,
                duration_ms=ended.seconds * 1000,
                memory_mb=ended.memory_mb,
            )
            self._add(function_id, ended.version, line)

    def restart(self) -> None:
        """Count the batches anew: the control plane knows this start of the host by another name now."""
        self._sent = 0

    async def run(self) -> None:
        """Send what there is, every half a second, for ever."""
        failures = 0
        while True:
            await asyncio.sleep(min(_SEND_EVERY * 2**failures, _TRY_AGAIN_LONGEST))
            self._tell_what_was_left_out()
            try:
                while self._batch or self._waiting:
                    await self._send(_SEND_PATIENCE)
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                if not failures:
                    _log.warning("log lines could not be sent; they are kept", error=str(error))
                failures = min(failures + 1, 10)
            else:
                failures = 0

    async def flush(self) -> None:
        """Try once, for two seconds, to send what is left."""
        self._tell_what_was_left_out(at_last=True)
        try:
            async with asyncio.timeout(_LAST_TRY):
                while self._batch or self._waiting:
                    await self._send(_LAST_TRY)
        except (grpc.aio.AioRpcError, TimeoutError):
            _log.warning("log lines were lost", lines=len(self._batch) + len(self._waiting))

    def _may_speak(self, function_id: str, version: int, *, is_request: bool) -> bool:
        """Count a line; return whether it is one too many."""
        key, now = (function_id, is_request), time.monotonic()
        second = self._seconds.get(key)
        if second is None or now - second.began >= 1:
            if second is not None:
                self._say_left_out(function_id, second, is_request=is_request)
            second = self._seconds[key] = _Second(now, version)
        second.lines += 1
        if second.lines <= _LINES_A_SECOND:
            return True
        second.left_out += 1
        return False

    def _tell_what_was_left_out(self, *, at_last: bool = False) -> None:
        """Say it also of those that are silent now, and forget them."""
        now = time.monotonic()
        for (function_id, is_request), second in tuple(self._seconds.items()):
            if at_last or now - second.began >= 1:
                del self._seconds[function_id, is_request]
                self._say_left_out(function_id, second, is_request=is_request)

    def _say_left_out(self, function_id: str, second: _Second, *, is_request: bool) -> None:
        if second.left_out:
            what = "lines of calls" if is_request else "lines"
            text = f"({second.left_out} {what} left out: at most {_LINES_A_SECOND} are kept in a second)"
            self._add(function_id, second.version, hosts_pb2.FunctionLog(stream="stderr", text=text))

    def _add(self, function_id: str, version: int, line: hosts_pb2.FunctionLog) -> None:
        if len(self._waiting) >= self._most_lines:
            self._overflow += 1
            return
        if self._overflow:
            _log.warning("log lines were lost: the control plane was away for too long", lines=self._overflow)
            self._overflow = 0
        line.function_id, line.version = function_id, version
        line.time.FromNanoseconds(time.time_ns())
        self._waiting.append(line)

    async def _send(self, patience: float) -> None:
        """Send a batch; it stays the same, with its number, until it was taken."""
        if not self._batch:
            size = 0
            while self._waiting and len(self._batch) < _BATCH_LINES and size < _BATCH_BYTES:
                self._batch.append(line := self._waiting.popleft())
                size += line.ByteSize()
        try:
            async with asyncio.timeout(patience):
                await self._report(self._sent + 1, self._batch)
        except grpc.aio.AioRpcError as error:
            if error.code() not in _REFUSED_FOR_GOOD:
                raise
            _log.error("log lines were refused", error=error.details(), lines=len(self._batch))
        self._sent += 1
        self._batch = []
