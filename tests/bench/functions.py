"""What a call of a function costs, cold and warm, beside a process per call and beside the handler alone."""

import asyncio
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click

from controlplane.functions.host.host import FunctionHostSettings
from tests.bench.load import Run, run_load, wrk_command
from tests.bench.process import Process, ProcessError, running
from tests.bench.report import Aim, percentile
from tests.functions.host.control import ACCOUNT, SECRET, Control
from tests.functions.host.serve import command
from tests.stack import eventually, free_port

_UIDS = range(740_000, 740_010)
_COLD = 10
_WARM = 500
_AT_ONCE = 32  # as many as wrk has connections; those of the run before may still be answered
_PYTHON = "def handler(event, context):\n    return {'hello': event['rawPath']}\n"
_NODE = "export function handler(event) {\n  return {hello: event.rawPath}\n}\n"
# Writes `{}`; what reading JSON costs is the customer's business.
_WAT = """
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 8) "{}")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 8))
    (i32.store (i32.const 4) (i32.const 2))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 20)))))
"""
_CODE = {"python3": _PYTHON, "nodejs": _NODE, "wasm": _WAT}
_EVENT = json.dumps({"rawPath": "/"})
_BARE = {
    "/usr/bin/python3 -c, a process per call": (
        "/usr/bin/python3",
        "-c",
        f"import json, sys\n{_PYTHON}print(json.dumps(handler(json.load(sys.stdin), None)))",
    ),
    "node -e, a process per call": (
        "/usr/bin/node",
        "-e",
        f"{_NODE.replace('export ', '')} console.log(JSON.stringify(handler(JSON.parse(fs.readFileSync(0)))))",
    ),
}
_MOST_WARM_MS = 5.0
_MOST_COLD_MS = 1000.0


@dataclass(frozen=True, slots=True)
class Called:
    """How long calls took, in ms: those that found no worker, and those that found one; and how many a second."""

    title: str
    cold: tuple[float, ...]
    warm: tuple[float, ...]
    load: Run | None = None


class Functions:
    """The results, as a part of the report."""

    name = "functions"

    def __init__(self, ours: Sequence[Called], bare: Sequence[Called]) -> None:
        self._ours = ours
        self._bare = bare

    def text(self) -> list[str]:
        """Return it for a person to read."""
        row = "{:<42} {:>12} {:>12} {:>9} {:>9} {:>10} {:>10}"
        return [
            f"GET /f/{{account}}/{{name}} at the host itself, on a loopback port. Cold: the first call of {_COLD}",
            f"functions of each runtime, whose code has to be fetched. Warm: {_WARM} calls one after the other.",
            f"Requests a second: {_AT_ONCE} callers and as many workers.",
            "",
            row.format("", "cold p50 ms", "cold max ms", "warm p50", "warm p99", "requests/s", "p99 ms"),
            *(row.format(*_cells(called)) for called in (*self._ours, *self._bare)),
        ]

    def aims(self) -> list[Aim]:
        """Return what is aimed at and what was reached."""
        process = median(self._bare[0].cold)
        aims = []
        for called in self._ours:
            cold, warm = median(called.cold), median(called.warm)
            aims.append(
                Aim(f"{called.title}: a cold call in {_MOST_COLD_MS:.0f} ms", f"{cold:.0f} ms", cold <= _MOST_COLD_MS)
            )
            text = f"{called.title}: a warm call in {_MOST_WARM_MS:.0f} ms, and less than a process"
            aims.append(Aim(text, f"{warm:.2f} ms", warm <= min(_MOST_WARM_MS, process)))
        return aims

    def facts(self) -> dict[str, Any]:
        """Return it for programs."""
        return {"ours": [asdict(called) for called in self._ours], "bare": [asdict(called) for called in self._bare]}


def _cells(called: Called) -> tuple[str, ...]:
    cold = (f"{median(called.cold):.0f}", f"{max(called.cold):.0f}") if called.cold else ("", "")
    warm = (f"{median(called.warm):.3f}", f"{percentile(called.warm, 99):.3f}") if called.warm else ("", "")
    load = (f"{called.load.rate:,.0f}", f"{called.load.p99_ms:.1f}") if called.load else ("", "")
    return called.title, *cold, *warm, *load


async def measure_functions(folder: Path, *, seconds: int = 3) -> Functions:
    """Start a host, and call functions of every runtime.

    Raises ProcessError if the host does not come up, LoadError if a call has failed.
    """
    folder.mkdir(mode=0o711)  # noqa: ASYNC240 - nothing else is going on yet
    control = Control()
    await control.serve()
    settings = FunctionHostSettings(
        server=f"127.0.0.1:{control.port}",
        secret=SECRET,
        listen=f"127.0.0.1:{free_port()}",
        data_dir=folder / "host",
        metrics_port=free_port(),
        uids=_UIDS,
    )
    tokens = folder / "tokens"  # public functions want none, but the load has to send something
    tokens.write_text("none\n")
    try:
        with running(command(settings), log=folder / "host.log") as host:
            await _until_started(control, host)
            ours = [await _measure(control, settings, tokens, runtime, seconds) for runtime in _CODE]
    finally:
        await control.go_away()
    bare = [
        Called(title, cold=tuple(_timed(partial(_run, program), _COLD)), warm=()) for title, program in _BARE.items()
    ]
    return Functions(ours, [*bare, Called("the handler alone", cold=(), warm=tuple(_timed(_handle, _WARM)))])


async def _until_started(control: Control, host: Process) -> None:
    async def started() -> bool:
        if not host.is_running:
            raise ProcessError(host.log.read_text())
        return bool(control.instance)

    await eventually(started)


async def _measure(
    control: Control, settings: FunctionHostSettings, tokens: Path, runtime: str, seconds: int
) -> Called:
    click.echo(f"Calling functions in {runtime}…", err=True)
    cold = []
    for _ in range(_COLD):
        # There is a version that answers, and nothing of it is at the host yet.
        function = await control.put(_CODE[runtime], runtime=runtime)
        await control.until_applied(control.places[function.id])
        cold += await asyncio.to_thread(_call, settings.listen, f"/f/{ACCOUNT}/{function.name}", 1)
    function = await control.deploy(_CODE[runtime], runtime=runtime, max_concurrency=2 * _AT_ONCE)
    path = f"/f/{ACCOUNT}/{function.name}"
    warm = await asyncio.to_thread(_call, settings.listen, path, _WARM)
    wrk, *options = wrk_command(f"http://{settings.listen}{path}", tokens, seconds)
    load = [wrk, "--timeout", "20s", *options]  # more than it takes to start all workers
    await asyncio.to_thread(run_load, load, seconds)  # so that there are workers
    measured = await asyncio.to_thread(run_load, load, seconds)
    return Called(f"{runtime}, through the host", tuple(cold), tuple(warm), measured)


def _call(address: str, path: str, times: int) -> list[float]:
    """Return how long so many calls took, in ms, over one connection."""
    connection = HTTPConnection(address)
    connection.connect()

    def call() -> None:
        connection.request("GET", path)
        answer = connection.getresponse()
        if answer.status != 200:
            raise ProcessError(f"{path} answers {answer.status}: {answer.read().decode()}")
        answer.read()

    try:
        return _timed(call, times)
    finally:
        connection.close()


def _run(program: Sequence[str]) -> None:
    subprocess.run(program, input=_EVENT, text=True, check=True, capture_output=True)


_scope: dict[str, Any] = {}
exec(_PYTHON, _scope)  # noqa: S102 - the same code that the functions have


def _handle() -> None:
    json.dumps(_scope["handler"](json.loads(_EVENT), None))


def _timed(work: Callable[[], None], times: int) -> list[float]:
    """Return how long each time took, in ms."""
    took = []
    for _ in range(times):
        began = perf_counter()
        work()
        took.append((perf_counter() - began) * 1000)
    return took
