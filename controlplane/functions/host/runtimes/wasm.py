"""Runs a customer's WebAssembly: a WASI command, a fresh instance for each call, by wasmtime in the system's Python.

The event is its standard input, and its standard output the answer, both JSON. What it prints on standard error is
logged. Of the sandbox it sees nothing. How the host speaks: see python3.py.
"""

import errno
import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[:0] = ["/runtime", "/packages"]

if TYPE_CHECKING:
    from controlplane.functions.host.runtimes.python3 import TOO_LARGE, Context, Failure, Handler, serve
else:
    from python3 import TOO_LARGE, Failure, serve

import wasmtime  # noqa: E402 - it is to be found only now

_CODE = Path("/code")
_OWN_SHARE = 0.75  # of the memory; the rest is for wasmtime and Python


def _load(entrypoint: str) -> "Handler":
    """Compile the module and link it."""
    config = wasmtime.Config()
    config.epoch_interruption = True
    config.parallel_compilation = False  # it would start a thread for each of the machine's cores, and we have one
    engine = wasmtime.Engine(config)
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    try:
        module = wasmtime.Module(engine, _find(entrypoint).read_bytes())
        linked = linker.instantiate_pre(module)
    except wasmtime.WasmtimeError as error:
        raise Failure(f"{entrypoint} is no module that can be run: {error}") from None
    if "_start" not in {each.name for each in module.exports}:
        raise Failure(f"{entrypoint} is no WASI command: it exports no function _start.")

    def answer(event: bytes, context: "Context") -> bytes:
        output = _Output()
        store = _store(engine, event, context, output)
        # The engine's epoch is what ends the instance; the join makes sure that it does not end the next one.
        alarm = threading.Timer(context.get_remaining_time_in_millis() / 1000, engine.increment_epoch)
        alarm.start()
        try:
            _run(linked, store)
        finally:
            alarm.cancel()
            alarm.join()
        return output.json()

    return answer


def _find(entrypoint: str) -> Path:
    for file in (_CODE / entrypoint, (_CODE / entrypoint).with_suffix(".wat")):
        if file.is_file():
            return file
    raise Failure(f"The code has no file {entrypoint}, which is the entrypoint.")


def _store(engine: wasmtime.Engine, event: bytes, context: "Context", output: "_Output") -> wasmtime.Store:
    wasi = wasmtime.WasiConfig()
    wasi.argv = [context.function_name]
    facts = {name.upper(): str(value) for name, value in vars(context).items() if not name.startswith("_")}
    facts["REMAINING_TIME_IN_MILLIS"] = str(context.get_remaining_time_in_millis())
    wasi.env = {**os.environ, **facts}.items()
    with os.fdopen(os.memfd_create("event"), "wb") as file:
        file.write(event)
        file.flush()
        wasi.stdin_file = f"/proc/self/fd/{file.fileno()}"
    wasi.stdout_custom = output.write
    wasi.inherit_stderr()
    store = wasmtime.Store(engine)
    store.set_limits(memory_size=int(context.memory_limit_in_mb * _OWN_SHARE) << 20)
    store.set_epoch_deadline(1)
    store.set_wasi(wasi)
    return store


def _run(linked: wasmtime.InstancePre, store: wasmtime.Store) -> None:
    try:
        start = linked.instantiate(store).exports(store)["_start"]
        assert isinstance(start, wasmtime.Func)  # noqa: S101 - for mypy; else the call raises by itself
        start(store)
    except wasmtime.ExitTrap as ended:
        if ended.code:
            raise Failure(f"The module ended with exit status {ended.code}.") from None
    except wasmtime.Trap as trap:
        if trap.trap_code is wasmtime.TrapCode.INTERRUPT:
            raise Failure("The function did not answer in time.", kind="timeout") from None
        raise Failure(f"The module was ended: {_last_line(trap.message)}", trace=trap.message) from None
    except wasmtime.WasmtimeError as error:
        kind = "out_of_memory" if "memory limits" in str(error) else "error"
        raise Failure(f"The module cannot be run: {_last_line(str(error))}", kind=kind, trace=str(error)) from None


def _last_line(message: str) -> str:
    """Return the cause: what comes before it is where the module was."""
    return message.strip().splitlines()[-1].strip()


class _Output:
    """What the module writes to its standard output."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, part: bytes) -> int:
        """Take a part; more than an answer may have is refused."""
        self._size += len(part)
        if self._size > TOO_LARGE:
            return -errno.EFBIG
        self._parts.append(part)
        return len(part)

    def json(self) -> bytes:
        """Return it all, if it is JSON."""
        if self._size > TOO_LARGE:
            raise Failure(f"The answer has more than the {TOO_LARGE} bytes that are allowed.", kind="too_large")
        whole = b"".join(self._parts).strip()
        try:
            json.loads(whole)
        except ValueError as error:
            raise Failure(f"The module's standard output must be one JSON value, and is not: {error}.") from None
        return whole


if __name__ == "__main__":
    serve(_load)
