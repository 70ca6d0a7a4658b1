"""Runs a customer's Python functions: by the system's Python, in the sandbox, with the standard library alone.

The host speaks on descriptor 3, in frames: what it is (one letter), the number of the call (4 bytes), the body's
length (4 bytes, big endian), the body. `C` is what a call is about, `E` its event, and for each `E` there is an answer
with its number: `A` with the result, or `X` with why there is none. Call 0 is our greeting, call 1 loads the code.

What imports slowly is imported where it is needed: each millisecond here is one of every cold start.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

TOO_LARGE = 6 << 20  # bytes of an answer
_LONGEST_MESSAGE = 4_000
_LONGEST_TRACE = 16_000
_CODE = "/code"

Handler = Callable[[bytes, "Context"], bytes]


class Failure(Exception):
    """What the host is to tell the customer; `kind` as in InvocationFailed."""

    def __init__(self, message: str, *, kind: str = "error", trace: str | None = None) -> None:
        super().__init__(message)
        self.kind, self.trace = kind, trace


class Context:
    """What a handler learns of its call, besides the event."""

    function_name: str
    function_version: int
    memory_limit_in_mb: int
    request_id: str

    def __init__(self, facts: dict[str, Any]) -> None:
        self._end = time.monotonic() + facts.pop("remaining_ms") / 1000
        self.__dict__.update(facts)
        self.aws_request_id = self.request_id

    def get_remaining_time_in_millis(self) -> int:
        """Return how long it may still take, in milliseconds."""
        return max(0, int((self._end - time.monotonic()) * 1000))


def serve(load: Callable[[str], Handler]) -> None:
    """Greet, load what the host names, then answer one call after the other."""
    channel = _Channel()
    channel.answer(0, b"")
    program, _, number = channel.next_call()
    os.environ.update(program.pop("environment"))
    time.tzset()
    try:
        handler = load(program.pop("entrypoint"))
    except BaseException as error:  # noqa: BLE001 - also a SystemExit: it is the customer's, not ours
        channel.fail(number, error)
        os._exit(1)  # whatever threads the code has started
    else:
        channel.answer(number, b"")
    while True:
        facts, event, number = channel.next_call()
        try:
            answer = handler(event, Context({**program, **facts}))
            if len(answer) > TOO_LARGE:
                raise Failure(f"The answer has {len(answer)} bytes: at most {TOO_LARGE} are allowed.", kind="too_large")  # noqa: TRY301
        except BaseException as error:  # noqa: BLE001 - likewise
            channel.fail(number, error)
        else:
            channel.answer(number, answer)


class _Channel:
    """The host's end is trusted, ours is the customer's to spoil: then the host ends the worker."""

    def __init__(self) -> None:
        # Somewhere else than where everybody would look, and closed to the programs that the function starts.
        import fcntl  # noqa: PLC0415

        self._descriptor = fcntl.fcntl(3, fcntl.F_DUPFD_CLOEXEC, 100 + os.getrandom(1)[0])
        os.close(3)

    def next_call(self) -> tuple[dict[str, Any], bytes, int]:
        """Wait for a call; return its facts, its event and its number."""
        _, _, facts = self._read_frame()
        _, number, event = self._read_frame()
        return json.loads(facts), event, number

    def answer(self, number: int, body: bytes) -> None:
        """Send the result."""
        self._send(b"A", number, body)

    def fail(self, number: int, error: BaseException) -> None:
        """Send why there is none."""
        if isinstance(error, Failure):
            failure = {"kind": error.kind, "message": str(error), "trace": error.trace}
        else:
            kind = "out_of_memory" if isinstance(error, MemoryError) else "error"
            failure = {"kind": kind, "message": describe(error), "trace": _trace(error)}
        self._send(b"X", number, json.dumps(failure).encode())

    def _send(self, kind: bytes, number: int, body: bytes) -> None:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (AttributeError, OSError, ValueError):  # the function has closed or replaced it
                continue
        frame = memoryview(kind + number.to_bytes(4, "big") + len(body).to_bytes(4, "big") + body)
        try:
            while frame:
                frame = frame[os.write(self._descriptor, frame) :]
        except OSError:  # the function has closed it
            os._exit(os.EX_PROTOCOL)

    def _read_frame(self) -> tuple[bytes, int, bytes]:
        header = self._read(9)
        return header[:1], int.from_bytes(header[1:5], "big"), self._read(int.from_bytes(header[5:], "big"))

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self._descriptor, min(size, 1 << 20))
            if not part:
                os._exit(0)  # the host has gone
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def describe(error: BaseException) -> str:
    """Return an exception in one line or a few, as the customer's code has worded it."""
    if isinstance(error, SystemExit):
        return f"The function called sys.exit({error.code!r}): return instead."
    try:
        return f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
    except Exception:  # noqa: BLE001 - its __str__ is the customer's
        return type(error).__name__


def _trace(error: BaseException) -> str | None:
    """Return the traceback without our frames."""
    import traceback  # noqa: PLC0415

    try:
        report: traceback.TracebackException | None = traceback.TracebackException.from_exception(error)
        todo = [report]
        while todo:
            if (part := todo.pop()) is not None:
                ours = (__file__, "<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")
                part.stack = traceback.StackSummary.from_list([f for f in part.stack if f.filename not in ours])
                todo += [part.__cause__, part.__context__]
        assert report is not None  # noqa: S101 - for mypy
        return "".join(report.format())[-_LONGEST_TRACE:]
    except Exception:  # noqa: BLE001 - as above
        return None


def _load(entrypoint: str) -> Handler:
    """Import a module of the customer's and return its function as a handler."""
    import importlib  # noqa: PLC0415

    sys.path.insert(0, _CODE)
    name, _, function_name = entrypoint.rpartition(".")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise Failure(f"The code has no module {name!r}, which the entrypoint {entrypoint!r} names.") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise Failure(f"The module {name!r} has no function {function_name!r}, which the entrypoint names.")
    return lambda event, context: _encode(_finish(function(json.loads(event), context)))


_loop: Any = None


def _finish(result: Any) -> Any:
    """Return what a coroutine returns. All share one event loop, because connections that are kept belong to theirs."""
    if not hasattr(type(result), "__await__"):
        return result
    global _loop  # noqa: PLW0603 - made once, and only if a handler is async
    import asyncio  # noqa: PLC0415

    if _loop is None:
        _loop = asyncio.new_event_loop()
    return _loop.run_until_complete(result)


def _encode(result: Any) -> bytes:
    try:
        return json.dumps(result, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise Failure(f"The function returned what JSON cannot hold: {error}.") from None


if __name__ == "__main__":
    del sys.argv[1:]
    serve(_load)
