"""A host follows the control plane: what is deployed answers, what is gone does not, and nothing else is lost."""

import asyncio
import io
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from controlplane.api.hosts.v1 import hosts_pb2
from controlplane.functions.host.host import FunctionHost, FunctionHostSettings
from controlplane.hosts.link import LinkError
from controlplane.operator_error import OperatorError
from tests.functions.host.conftest import answering, client_of, get, running_host, settings_for, until_answers
from tests.functions.host.control import ACCOUNT, Control, processes_of
from tests.stack import eventually, free_port

# Writes "hello" to its standard output.
HELLO_WAT = """
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 8) "\\"hello\\"")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 8))
    (i32.store (i32.const 4) (i32.const 7))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 20)))))
"""


async def test_the_host_says_what_it_offers(own: Control, own_settings: FunctionHostSettings) -> None:
    """The control plane learns where the host is and which runtimes it has."""
    async with running_host(own_settings):

        async def started() -> bool:
            return bool(own.starts)

        await eventually(started)
    assert own.starts[0].address == own_settings.listen
    assert list(own.starts[0].runtimes) == ["nodejs", "python3", "wasm"]


@pytest.mark.parametrize(
    ("runtime", "code"),
    [
        ("python3", answering("hello")),
        ("nodejs", "export function handler(event) {\n  return 'hello'\n}\n"),
        ("wasm", HELLO_WAT),
    ],
)
async def test_every_runtime_answers(
    control: Control, host: FunctionHost, client: httpx.AsyncClient, runtime: str, code: str
) -> None:
    """A function of each runtime, of a single file, is built and answers."""
    del host
    function = await control.deploy(code, runtime=runtime)
    answer = await get(client, function)
    assert (answer.status_code, answer.json()) == (200, "hello")


async def test_an_archive_is_deployed(control: Control, host: FunctionHost, client: httpx.AsyncClient) -> None:
    """Code of several files is found by its entrypoint, and its variables are there."""
    del host
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("app/greet.py", "import os\ndef greet():\n    return os.environ['GREETING']\n")
        files.writestr("app/start.py", "from app.greet import greet\ndef run(event, context):\n    return greet()\n")
    function = await control.deploy(archive.getvalue(), entrypoint="app.start.run", env={"GREETING": "good day"})
    assert (await get(client, function)).json() == "good day"


@pytest.mark.parametrize(
    ("code", "wanted", "why"),
    [
        ("import nothing_of_that_name\n", {}, "ModuleNotFoundError"),
        ("def other(event, context):\n    pass\n", {}, "handler"),
        ("def handler(:\n", {}, "SyntaxError"),
        (b"PK not a zip", {}, "zip"),
        ("raise Exception('\\ud800\\0' + 200 * 'x')\n", {}, "Exception"),
        (answering(1), {"entrypoint": "../../main.handler"}, "entrypoint"),
    ],
)
async def test_code_that_cannot_be_loaded_is_reported(
    control: Control, host: FunctionHost, code: str | bytes, wanted: Any, why: str
) -> None:
    """The customer gets to know why a version was not built."""
    del host
    _, version_id = await control.order(code, **wanted)

    async def reported() -> str:
        return control.builds.get(version_id, "")

    assert why in await eventually(reported)


async def test_a_version_that_fails_leaves_the_old_one(
    control: Control, host: FunctionHost, client: httpx.AsyncClient
) -> None:
    """While a version is built, and if it cannot be, the one before goes on answering."""
    del host
    function = await control.deploy(answering(1))
    _, version_id = await control.order("1 / 0\n", function_id=function.id)

    async def reported() -> bool:
        assert (await get(client, function)).json() == 1
        return version_id in control.builds

    await eventually(reported)
    await control.until_applied(control.places[function.id])
    assert (await get(client, function)).json() == 1


async def test_what_is_removed_while_its_code_comes_leaves_none(folder: Path, own: Control) -> None:
    """Code that arrives after its function was removed does not stay on the disk."""
    settings = settings_for(folder, own)
    async with running_host(settings) as host:
        own.may_fetch.clear()
        function_id, version_id = await own.order(answering(1))

        async def is_fetched() -> bool:
            return version_id in own.fetched

        await eventually(is_fetched)
        await own.until_applied(await own.change(hosts_pb2.HostedFunction(id=function_id, removed=True)))
        own.may_fetch.set()

        async def has_come() -> bool:
            return not host._directory._cache._loading  # noqa: SLF001 - the moment from which it could stay

        async def is_gone() -> bool:
            return not list((settings.data_dir / "code").iterdir())

        await eventually(has_come)
        await eventually(is_gone)


async def test_a_slow_build_holds_nobody_up(control: Control, host: FunctionHost, client: httpx.AsyncClient) -> None:
    """While a version takes long to load, the changes of others are put in force."""
    del host
    _, slow = await control.order("import time\ntime.sleep(5)\n" + answering(1))
    function = await control.deploy(answering(2))
    assert (await get(client, function)).json() == 2
    assert slow not in control.builds


async def test_a_deploy_under_load_drops_no_call(
    control: Control, host: FunctionHost, client: httpx.AsyncClient
) -> None:
    """While eight callers call without a pause, five versions go live, each call is answered, none by an older one."""
    del host
    function = await control.deploy(answering(1))
    running, answers = True, 0

    async def keep_calling() -> None:
        nonlocal answers
        newest = 0
        while running:
            answer = await get(client, function)
            assert answer.status_code == 200, answer.text
            assert answer.json() >= newest
            newest = answer.json()
            answers += 1

    async with asyncio.TaskGroup() as callers:
        for _ in range(8):
            callers.create_task(keep_calling())
        for number in range(2, 7):
            await control.deploy(answering(number), function_id=function.id)
            assert (await get(client, function)).json() == number
        running = False
    assert answers > 100


async def test_a_rollback_under_load_drops_no_call(
    control: Control, host: FunctionHost, client: httpx.AsyncClient
) -> None:
    """A version whose code was removed is fetched again while calls come in, and none of them fails."""
    del host
    function = await control.deploy(answering(1))
    first = hosts_pb2.HostedVersion()
    first.CopyFrom(function.active)
    function = await control.deploy(answering(2), function_id=function.id)
    running = True

    async def keep_calling() -> None:
        while running:
            answer = await get(client, function)
            assert answer.status_code == 200, answer.text

    async with asyncio.TaskGroup() as callers:
        for _ in range(4):
            callers.create_task(keep_calling())
        function.active.CopyFrom(first)
        await control.until_applied(await control.change(function))
        assert (await get(client, function)).json() == 1
        running = False


async def test_settings_are_in_force_at_once(control: Control, host: FunctionHost, client: httpx.AsyncClient) -> None:
    """Once a change of who may call is applied, it holds for every call that begins."""
    del host
    function = await control.deploy(answering(1))
    assert (await get(client, function)).status_code == 200
    control.authorize = lambda _: hosts_pb2.AuthorizeFunctionCallResponse(
        status=401, code="unauthenticated", error="No."
    )
    function.auth = "token"
    await control.until_applied(await control.change(function))
    assert (await get(client, function)).status_code == 401


async def test_a_function_that_is_removed(own: Control, own_settings: FunctionHostSettings) -> None:
    """Its address is a 404 at once, the call that runs is finished, and then no process, code or metric is left."""
    async with running_host(own_settings) as host, client_of(own_settings) as client:
        function = await own.deploy("import time\ndef handler(event, context):\n    time.sleep(1)\n    return 'done'\n")
        late = asyncio.create_task(get(client, function))
        await asyncio.sleep(0.3)
        await own.until_applied(await own.change(hosts_pb2.HostedFunction(id=function.id, removed=True)))
        assert (await get(client, function)).status_code == 404
        assert not late.done()
        assert (await late).json() == "done"

        async def nothing_is_left() -> bool:
            code = list((own_settings.data_dir / "code").iterdir())
            metrics = [sample for metric in host.metrics.registry.collect() for sample in metric.samples]
            shown = [sample for sample in metrics if sample.labels.get("function") == function.id]
            return not (code or shown or processes_of(own_settings.uids))

        await eventually(nothing_is_left)


async def test_code_that_nobody_needs_is_removed(own: Control, own_settings: FunctionHostSettings) -> None:
    """After a deploy only the new version's code is kept."""
    async with running_host(own_settings):
        function = await own.deploy(answering(1))
        function = await own.deploy(answering(2), function_id=function.id)

        async def one_is_left() -> bool:
            return [path.name for path in (own_settings.data_dir / "code").iterdir()] == [function.active.id]

        await eventually(one_is_left)


async def test_the_host_goes_on_while_the_control_plane_is_away(
    own: Control, own_settings: FunctionHostSettings
) -> None:
    """Public functions answer, those that want a token are a 503, and afterwards changes come through again."""
    async with running_host(own_settings), client_of(own_settings) as client:
        public, private = await own.deploy(answering(1)), await own.deploy(answering(2), auth="token")
        await own.go_away()
        assert (await get(client, public)).json() == 1
        refused = await get(client, private)
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert refused.headers["retry-after"] == "1"
        await own.serve()
        assert (await own.deploy(answering(3), function_id=public.id)).active.version == 2
        assert (await get(client, public)).json() == 3
        assert (await get(client, private)).json() == 2


async def test_what_the_control_plane_has_forgotten_is_dropped(
    own: Control, own_settings: FunctionHostSettings
) -> None:
    """When the host has to start anew, it keeps what is named then, without a gap, and drops what is not."""
    async with running_host(own_settings), client_of(own_settings) as client:
        kept, dropped = await own.deploy(answering(1)), await own.deploy(answering(2))
        del own.functions[dropped.id], own.places[dropped.id]
        own.instance = "of another life"
        await until_answers(client, dropped, 404)
        assert len(own.starts) == 2
        assert (await get(client, kept)).json() == 1
        secret = {"x-htx-call-secret": f"secret of {own.instance}"}
        assert (await client.post(f"/invoke/{kept.id}", headers=secret)).json()["cold_start"] is False


async def test_many_functions_come_in_pages(own: Control, own_settings: FunctionHostSettings) -> None:
    """Until all pages have come nothing is dropped, also after another start, and no worker is started unasked."""
    made = [await own.put(answering(number)) for number in range(250)]
    async with running_host(own_settings), client_of(own_settings) as client:
        await own.until_applied(own.sequence)
        assert not processes_of(own_settings.uids)
        for number in (0, 99, 100, 249):
            assert (await get(client, made[number])).json() == number
        own.instance = "of another life"

        async def started_again() -> bool:
            return len(own.starts) == 2

        await eventually(started_again)
        await own.until_applied(own.sequence)
        secret = {"x-htx-call-secret": f"secret of {own.instance}"}
        assert (await client.post(f"/invoke/{made[249].id}", headers=secret)).json()["cold_start"] is False


async def test_a_secret_that_is_none(folder: Path, own: Control) -> None:
    """A host that the control plane does not know ends, and says so."""
    settings = settings_for(folder, own, secret="wrong")
    async with running_host(settings) as host:
        with pytest.raises(LinkError, match="No host has this secret"):
            await asyncio.wait_for(host.following, 10)


async def test_a_place_that_is_taken(folder: Path, own: Control) -> None:
    """A second host at the same address, metrics port or folder does not start, and leaves the first one alone."""
    first = settings_for(folder, own)
    async with running_host(first), client_of(first) as client:
        function = await own.deploy(answering(1))
        for taken, why in {"listen": "is another host running", "metrics_port": "cannot be used for metrics"}.items():
            second = FunctionHost(settings_for(folder, own, **{taken: getattr(first, taken)}))
            with pytest.raises(OperatorError, match=why):
                await second.start()
        with pytest.raises(Exception, match="Another host uses"):
            await FunctionHost(settings_for(folder, own, data_dir=first.data_dir)).start()
        assert (await get(client, function)).json() == 1


async def test_a_host_on_a_port(folder: Path, own: Control) -> None:
    """A host may listen at HOST:PORT instead of a socket's path."""
    settings = settings_for(folder, own, listen=f"127.0.0.1:{free_port()}")
    async with running_host(settings), httpx.AsyncClient(base_url=f"http://{settings.listen}") as client:
        function = await own.deploy(answering(1))
        assert (await get(client, function)).json() == 1


async def test_the_metrics(folder: Path, own: Control) -> None:
    """Calls by how they ended, seconds, cold starts, workers and memory are shown per function, on their own port."""
    settings = settings_for(folder, own)
    async with running_host(settings), client_of(settings) as client, httpx.AsyncClient() as reader:
        function = await own.deploy("def handler(event, context):\n    return 1 / (event['rawPath'] == '/')\n")
        await get(client, function)
        await client.get(f"/f/{ACCOUNT}/{function.name}/fail")
        text = (await reader.get(f"http://127.0.0.1:{settings.metrics_port}/metrics")).text
        name = f'function="{function.id}"'
        assert f'htx_function_calls_total{{{name},outcome="ok"}} 1.0' in text
        assert f'htx_function_calls_total{{{name},outcome="error"}} 1.0' in text
        assert f"htx_function_seconds_count{{{name}}} 2.0" in text
        assert f"htx_function_cold_starts_total{{{name}}} 0.0" in text
        assert f"htx_function_workers{{{name}}} 1.0" in text
        assert f"htx_function_memory_bytes{{{name}}}" in text
