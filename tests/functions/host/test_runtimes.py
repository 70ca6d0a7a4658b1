"""What customers' code can rely on, for each runtime."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from controlplane.functions.host import worker as worker_module
from controlplane.functions.host.worker import InvocationFailed, StartFailed
from tests.functions.host.workshop import PROGRAMS, Workshop, open_workshop
from tests.stack import eventually

_CONTEXT_PY = """
def handler(event, context):
    return [context.function_name, context.function_version, context.request_id, context.aws_request_id,
            context.memory_limit_in_mb, context.get_remaining_time_in_millis(), event]
"""
_CONTEXT_JS = """
export const handler = (event, context) => [
    context.function_name, context.functionVersion, context.request_id, context.awsRequestId,
    context.memoryLimitInMB, context.getRemainingTimeInMillis(), event]
"""
_ECHO: dict[str, str | Path] = {
    "python3": "def handler(event, context): return event",
    "nodejs": "export const handler = (event) => event",
    "wasm": PROGRAMS / "wasm",
}
_ASYNC = {
    "python3": "import asyncio\nasync def handler(event, _):\n    await asyncio.sleep(0.001)\n    return event + 1",
    "nodejs": "export const handler = async (event) => (await new Promise((r) => setTimeout(r, 1, 1))) + event",
}
_RAISES = {
    "python3": "def handler(event, context):\n    raise ValueError('no such colour')",
    "nodejs": "export function handler() {\n  throw new TypeError('no such colour') }",
}


@pytest.fixture(scope="module")
async def workshop(folder: Path) -> AsyncIterator[Workshop]:
    """A sandbox for this module."""
    async with open_workshop(folder) as workshop:
        yield workshop


@pytest.mark.parametrize("runtime", ["python3", "nodejs", "wasm"])
async def test_event(workshop: Workshop, runtime: str) -> None:
    """An event of any JSON reaches the function and comes back as it was, call after call."""
    async with workshop.running(_ECHO[runtime], runtime=runtime) as function:
        events: list[Any] = [{"a": [1, 2.5, None, True]}, "Grüße, 🌍", [], 0, {"long": "x" * 1_000_000}]
        for event in events:
            assert await function.call(event) == event


@pytest.mark.parametrize(("runtime", "source"), [("python3", _CONTEXT_PY), ("nodejs", _CONTEXT_JS)])
async def test_context(workshop: Workshop, runtime: str, source: str) -> None:
    """The context says which function and call it is, and how much time is left."""
    async with workshop.running(source, runtime=runtime) as function:
        *facts, left, event = await function.call("e", seconds=10)
    assert facts == ["greet", 7, "rq_1", "rq_1", 128]
    assert 5_000 < left <= 10_000
    assert event == "e"


@pytest.mark.parametrize("runtime", ["python3", "nodejs"])
async def test_async_handlers(workshop: Workshop, runtime: str) -> None:
    """A handler may be asynchronous."""
    async with workshop.running(_ASYNC[runtime], runtime=runtime) as function:
        assert [await function.call(number) for number in range(3)] == [1, 2, 3]


async def test_one_event_loop(workshop: Workshop) -> None:
    """All calls of an async Python handler run on one event loop, so that it can keep its connections."""
    source = "import asyncio\nasync def handler(event, context): return id(asyncio.get_running_loop())"
    async with workshop.running(source) as function:
        assert await function.call() == await function.call()


@pytest.mark.parametrize("runtime", ["python3", "nodejs"])
async def test_exception(workshop: Workshop, runtime: str) -> None:
    """An exception is the call's error, with a traceback of the customer's frames alone; the worker goes on."""
    async with workshop.running(_RAISES[runtime], runtime=runtime) as function:
        for _ in range(2):
            with pytest.raises(InvocationFailed) as failed:
                await function.call()
            assert failed.value.kind == "error"
            assert "Error: no such colour" in failed.value.message
            assert failed.value.trace is not None
            assert "/code/main." in failed.value.trace
            assert "/runtime" not in failed.value.trace
        assert function.worker.alive


@pytest.mark.parametrize(
    ("runtime", "source"),
    [
        ("python3", "def handler(event, context): return {1, 2}"),
        ("python3", "def handler(event, context): return float('nan')"),
        ("python3", "def handler(event, context): return chr(0xD800)"),
        ("nodejs", "export const handler = () => 10n"),
        ("nodejs", "export const handler = () => () => 1"),
        ("nodejs", "export const handler = () => { const a = {}; a.a = a; return a }"),
    ],
)
async def test_not_json(workshop: Workshop, runtime: str, source: str) -> None:
    """An answer that JSON cannot hold is an error that says so."""
    async with workshop.running(source, runtime=runtime) as function:
        with pytest.raises(InvocationFailed, match="what JSON cannot hold") as failed:
            await function.call()
        assert failed.value.kind == "error"
        assert function.worker.alive


@pytest.mark.parametrize(
    ("runtime", "source"),
    [
        ("python3", "def handler(event, context): return 'x' * event"),
        ("nodejs", "export const handler = (event) => 'x'.repeat(event)"),
    ],
)
async def test_too_large(workshop: Workshop, runtime: str, source: str) -> None:
    """An answer may have 6 MiB and not a byte more, and the worker bears both."""
    async with workshop.running(source, runtime=runtime) as function:
        quotes = 2
        assert len(await function.call((6 << 20) - quotes)) == (6 << 20) - quotes
        with pytest.raises(InvocationFailed, match="6291457 bytes") as failed:
            await function.call((6 << 20) - quotes + 1)
        assert failed.value.kind == "too_large"
        assert await function.call(1) == "x"


@pytest.mark.parametrize(
    ("runtime", "source", "told"),
    [
        ("python3", "import nonsense", "No module named 'nonsense'"),
        ("python3", "1 +", 'File "/code/main.py", line 1'),
        ("python3", "import sys; sys.exit('bye')", "SystemExit: bye"),
        ("python3", "import os; os._exit(9)", "exit status 9"),
        ("python3", "other = 1", "no function 'handler'"),
        ("python3", "x = bytearray(1 << 30)", "more than its 128 MB"),
        ("nodejs", "import 'nonsense'", "Cannot find package 'nonsense'"),
        ("nodejs", "const x = ;", "/code/main.mjs:1"),
        ("nodejs", "throw new Error('not today')", "at /code/main.mjs:1"),
        ("nodejs", "process.exit(9)", "exit status 9"),
        ("nodejs", "export const other = 1", "exports no function handler"),
        ("wasm", '(module (func (export "main")))', "exports no function _start"),
        ("wasm", "(module", "expected"),
        ("wasm", '(module (import "env" "magic" (func)) (func (export "_start")))', "magic"),
    ],
)
async def test_cannot_be_loaded(workshop: Workshop, runtime: str, source: str, told: str) -> None:
    """Code that cannot be loaded says why, with the customer's frames alone."""
    with pytest.raises(StartFailed) as failed:
        async with workshop.running(source, runtime=runtime):
            pass
    assert told in str(failed.value)
    assert "/runtime" not in str(failed.value)


@pytest.mark.parametrize(
    ("runtime", "entrypoint"), [("python3", "other.handler"), ("nodejs", "other.handler"), ("wasm", "other.wasm")]
)
async def test_missing_entrypoint(workshop: Workshop, runtime: str, entrypoint: str) -> None:
    """An entrypoint that names no file is told as such, and not as an import error."""
    with pytest.raises(StartFailed, match=r"The code has no .*entrypoint"):
        async with workshop.running(_ECHO[runtime], runtime=runtime, entrypoint=entrypoint):
            pass


async def test_memory_error(workshop: Workshop) -> None:
    """Memory that Python does not even get is told as such, and the worker goes on."""
    async with workshop.running("def handler(event, context): return len(bytearray(1 << 60))") as function:
        with pytest.raises(InvocationFailed, match="MemoryError") as failed:
            await function.call()
        assert failed.value.kind == "out_of_memory"
        assert function.worker.alive


@pytest.mark.parametrize("runtime", ["python3", "nodejs"])
async def test_loads_for_ever(workshop: Workshop, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that does not get loaded in time is given up."""
    monkeypatch.setattr(worker_module, "_SECONDS_TO_START", 1.0)
    source = "while True: pass" if runtime == "python3" else "for (;;);"
    with pytest.raises(StartFailed, match="longer than 1 s to load"):
        async with workshop.running(source, runtime=runtime):
            pass


async def test_python_folder(workshop: Workshop, tmp_path: Path) -> None:
    """Python finds packages in the code, and reads the files that lie beside them."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "prices.py").write_text("PRICE = 7")
    (tmp_path / "template.txt").write_text("a template")
    source = "from shop.prices import PRICE\ndef handler(event, context): return [PRICE, open('template.txt').read()]"
    (tmp_path / "shop" / "orders.py").write_text(source)
    async with workshop.running(tmp_path, entrypoint="shop.orders.handler") as function:
        assert await function.call() == [7, "a template"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("main.mjs", "import fs from 'node:fs'; export const handler = () => typeof fs"),
        (
            "main.js",
            "import fs from 'node:fs';\nimport { one } from './one.js';\nexport const handler = () => typeof fs",
        ),
        ("main.js", "const fs = require('node:fs'); exports.handler = () => typeof fs"),
        ("main.cjs", "const fs = require('node:fs'); module.exports = { handler: async () => typeof fs }"),
        ("main.mjs", "import fs from 'node:fs'; export default { handler: () => typeof fs }"),
    ],
)
async def test_node_modules(workshop: Workshop, tmp_path: Path, file: str, source: str) -> None:
    """Node.js takes ES modules and CommonJS, also where only the text of a .js file says which it is."""
    (tmp_path / "one.js").write_text("export const one = 1")
    (tmp_path / file).write_text(source)
    async with workshop.running(tmp_path, runtime="nodejs") as function:
        assert await function.call() == "object"


async def test_node_late_exception(workshop: Workshop) -> None:
    """What a timer throws is the error of the call that waits, and ends the worker, whose state nobody knows."""
    source = """export const handler = () => {
        setTimeout(() => { throw new Error('late') }, 5)
        return new Promise(() => {})
    }"""
    async with workshop.running(source, runtime="nodejs") as function:
        with pytest.raises(InvocationFailed, match="late") as failed:
            await function.call()
        assert failed.value.kind == "error"

        async def dead() -> bool:
            return not function.worker.alive

        await eventually(dead)


@pytest.mark.parametrize(
    ("runtime", "source"),
    [
        ("python3", "import os, time\ndef handler(e, c): return [os.environ['COLOUR'], time.localtime(0).tm_hour]"),
        ("nodejs", "export const handler = () => [process.env.COLOUR, new Date(0).getHours()]"),
    ],
)
async def test_environment(workshop: Workshop, runtime: str, source: str) -> None:
    """The function's environment variables are there, and its time zone counts."""
    environment = {"COLOUR": "bleu=ciel\n2", "TZ": "Asia/Tokyo"}
    async with workshop.running(source, runtime=runtime, environment=environment) as function:
        assert await function.call() == ["bleu=ciel\n2", 9]


_CHILD_PY = """
import os, subprocess
code = "import os\\nfor n in range(1024):\\n try: print(os.readlink(f'/proc/self/fd/{n}'))\\n except OSError: pass"
def list_own(): return [os.readlink(f"/proc/self/fd/{n}") for n in range(1024) if os.path.exists(f"/proc/self/fd/{n}")]
def handler(event, context):
    child = subprocess.run(["python3", "-c", code], capture_output=True, close_fds=False, text=True)
    return [list_own(), child.stdout.split()]
"""
_CHILD_JS = """
import fs from "node:fs"
import { spawnSync } from "node:child_process"
const code = `for (let n = 0; n < 1024; n++) try { console.log(fs.readlinkSync("/proc/self/fd/" + n)) } catch {}`
const own = []
for (let n = 0; n < 1024; n++) try { own.push(fs.readlinkSync("/proc/self/fd/" + n)) } catch {}
export const handler = () => [own, spawnSync("node", ["-e", code], { encoding: "utf8" }).stdout.split("\\n")]
"""


@pytest.mark.parametrize(("runtime", "source"), [("python3", _CHILD_PY), ("nodejs", _CHILD_JS)])
async def test_programs_have_no_channel(workshop: Workshop, runtime: str, source: str) -> None:
    """The programs that a function starts do not inherit the channel to the host."""
    async with workshop.running(source, runtime=runtime) as function:
        own, of_child = await function.call()
    channel = {each for each in own if each.startswith("socket:")}
    assert len(channel) == 1
    assert not channel & set(of_child)
    assert "/dev/null" in own


async def test_environment_of_wasm(workshop: Workshop) -> None:
    """WebAssembly has its environment variables, and the context among them."""
    program = (PROGRAMS / "wasm" / "environment.wat").read_text()
    async with workshop.running(program, runtime="wasm", environment={"COLOUR": "blue"}) as function:
        with pytest.raises(InvocationFailed):  # what it prints is no JSON
            await function.call()
        printed = "".join(function.printed("stderr")).split("\0")
    found = dict(pair.split("=", 1) for pair in "\n".join(printed).replace("\ufffd", "\n").split("\n") if "=" in pair)
    assert found["COLOUR"] == "blue"
    assert found["REQUEST_ID"] == "rq_1"
    assert found["FUNCTION_NAME"] == "greet"
    assert 0 < int(found["REMAINING_TIME_IN_MILLIS"]) <= 20_000


async def test_wasm_begins_anew(workshop: Workshop) -> None:
    """Each call has a fresh instance: nothing of the call before is in its memory."""
    async with workshop.running((PROGRAMS / "wasm" / "count.wat").read_text(), runtime="wasm") as function:
        assert [await function.call() for _ in range(3)] == [1, 1, 1]


async def test_wasm_time(workshop: Workshop) -> None:
    """An endless loop in WebAssembly is cut off in time, and the worker goes on."""
    async with workshop.running(PROGRAMS / "wasm", runtime="wasm", entrypoint="loop_if_7.wat") as function:
        for _ in range(2):
            with pytest.raises(InvocationFailed, match=r"did not answer within 0\.3 s") as failed:
                await function.call(7, seconds=0.3)
            assert failed.value.kind == "timeout"
            assert await function.call(1) == 1


async def test_wasm_memory(workshop: Workshop) -> None:
    """A module cannot grow beyond its share of the memory, and the worker goes on."""
    async with workshop.running(PROGRAMS / "wasm", runtime="wasm", entrypoint="grow.wat", memory_mb=128) as function:
        for _ in range(2):
            with pytest.raises(InvocationFailed, match="unreachable") as failed:
                await function.call()
            assert failed.value.kind == "error"
        assert function.worker.alive


async def test_wasm_needs_more_memory(workshop: Workshop) -> None:
    """A module that needs more memory from the beginning is out of memory."""
    source = '(module (memory 2000) (func (export "_start")))'
    async with workshop.running(source, runtime="wasm") as function:
        with pytest.raises(InvocationFailed) as failed:
            await function.call()
        assert failed.value.kind == "out_of_memory"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("", "must be one JSON value"),
        ("(call $exit (i32.const 3))", "exit status 3"),
        ("unreachable", "unreachable"),
        ("(call $self)", "call stack exhausted"),
    ],
)
async def test_wasm_errors(workshop: Workshop, body: str, told: str) -> None:
    """A module that prints no answer, ends with another status than 0, or traps, says so; the worker goes on."""
    source = f"""(module
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1)
      (func $self {"(call $self)" if "self" in body else ""})
      (func (export "_start") {body}))"""
    async with workshop.running(source, runtime="wasm") as function:
        with pytest.raises(InvocationFailed, match=told) as failed:
            await function.call()
        assert failed.value.kind == "error"
        assert function.worker.alive


async def test_unknown_runtime(workshop: Workshop) -> None:
    """A runtime that is not there is refused."""
    with pytest.raises(StartFailed, match="perl is not offered here"):
        async with workshop.running(PROGRAMS / "wasm", runtime="perl"):
            pass
