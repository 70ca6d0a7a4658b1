"""The part of a host of functions, played by a test over the real link: it does what it is told, and runs nothing."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import uvicorn

from controlplane.api.hosts.v1 import hosts_pb2, hosts_pb2_grpc
from controlplane.hosts.admin import add_host, remove_host
from controlplane.hosts.kinds import FUNCTIONS
from controlplane.hosts.model import Host
from tests.stack import Stack, eventually

REGION = "elsewhere"  # where the real hosts of other tests are not
_numbers = itertools.count(1)

# Of an asked function's id and event: the status, the JSON and the headers of the host's answer.
Answer = Callable[[str, Any], tuple[int, Any, dict[str, str]]]


class PlayedHost:
    """A host. It loads any code but one that begins with `broken`, and answers calls as `answer` says."""

    instance: str
    call_secret: str

    def __init__(self, stack: Stack, row: Host, secret: str, *, offers: dict[str, Any]) -> None:
        self.row = row
        self.stub: Any = hosts_pb2_grpc.FunctionHostServiceStub(stack.channel)
        self.metadata = (("authorization", f"Bearer {secret}"),)
        self.offers = offers
        self.after = 0
        self.held: dict[str, hosts_pb2.HostedFunction] = {}
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.answer: Answer = self.echo
        self.together: asyncio.Barrier | None = None
        self.may_load, self.may_pull = asyncio.Event(), asyncio.Event()
        self.may_load.set()
        self.may_pull.set()
        self._loading: set[asyncio.Task[None]] = set()
        self._following: asyncio.Task[None] | None = None
        self._batches = itertools.count(1)

    @staticmethod
    def echo(_function_id: str, event: Any) -> tuple[int, Any, dict[str, str]]:
        """Answer with what came."""
        return 200, succeeded({"got": event}), {}

    async def start(self, **offers: Any) -> None:
        """Begin a start."""
        request = hosts_pb2.StartFunctionHostRequest(**(self.offers | offers))
        answer = await self.ask("StartFunctionHost", request)
        self.instance, self.call_secret, self.after = answer.instance, answer.call_secret, 0
        self.held.clear()

    async def pull(self, *, wait: int = 0) -> hosts_pb2.PullFunctionsResponse:
        """Say what is in force here, and take over what comes after it."""
        request = hosts_pb2.PullFunctionsRequest(instance=self.instance, after=self.after, wait=wait)
        page: hosts_pb2.PullFunctionsResponse = await self.ask("PullFunctions", request)
        for function in page.functions:
            self.held[function.id] = function
            if function.removed:
                del self.held[function.id]
        self.after = page.sequence
        return page

    def follow(self) -> None:
        """Take over whatever changes, and load what is to be loaded, from now on."""
        self._following = asyncio.create_task(self._follow())

    async def restart(self, **offers: Any) -> None:
        """Begin a start anew, which may offer something else, and take everything over."""
        await self.stop()
        await self.start(**offers)
        while not (await self.pull()).complete:
            pass
        await self.pull()
        self._batches = itertools.count(1)
        self.follow()

    def next_batch(self) -> int:
        """Return the number of the next batch of lines."""
        return next(self._batches)

    async def report(self, version_id: str, error: str = "") -> None:
        """Report how the loading of a version went."""
        await self.ask("ReportFunctionBuild", hosts_pb2.ReportFunctionBuildRequest(version_id=version_id, error=error))

    async def log(self, batch: int, *lines: hosts_pb2.FunctionLog) -> None:
        """Report lines."""
        request = hosts_pb2.ReportFunctionLogsRequest(instance=self.instance, batch=batch, lines=lines)
        await self.ask("ReportFunctionLogs", request)

    async def ask(self, name: str, request: Any) -> Any:
        """Call an RPC of the hosts' with this host's secret."""
        return await getattr(self.stub, name)(request, metadata=self.metadata, timeout=30)

    async def stop(self) -> None:
        """Follow no more, and end what is being loaded."""
        for task in (*self._loading, *([self._following] if self._following is not None else [])):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def serve_call(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Answer a call of the control plane's: the ASGI app."""
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        event = json.loads(body)
        function_id = scope["path"].removeprefix("/invoke/")
        self.asked.append((function_id, headers, event))
        status, answer, more = self.answer(function_id, event)
        if self.together is not None:
            await self.together.wait()
        if headers["x-htx-call-secret"] != self.call_secret:
            status, answer = 404, {"error": "There is nothing here.", "code": "not_found", "request_id": "1"}
        pairs = [(name.encode(), value.encode()) for name, value in more.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    async def _follow(self) -> None:
        while True:
            await self.may_pull.wait()
            for function in (await self.pull(wait=2)).functions:
                if function.HasField("building"):
                    task = asyncio.create_task(self._load(function.building.id))
                    self._loading.add(task)
                    task.add_done_callback(self._loading.discard)

    async def _load(self, version_id: str) -> None:
        with suppress(grpc.aio.AioRpcError):  # a version that is gone by now
            code = await self.ask("GetFunctionCode", hosts_pb2.GetFunctionCodeRequest(version_id=version_id))
            await self.may_load.wait()
            is_broken = code.source.startswith("broken")
            await self.report(version_id, "NameError: name 'broken' is not defined\n  in main.py" if is_broken else "")


def line(function_id: str, version: int, text: str, **more: Any) -> hosts_pb2.FunctionLog:
    """Return a line of a function's log, printed now unless it says otherwise."""
    made = hosts_pb2.FunctionLog(**{"stream": "stdout", **more}, function_id=function_id, version=version, text=text)
    made.time.GetCurrentTime()
    return made


def succeeded(result: Any) -> dict[str, Any]:
    """Return the answer of a host to a call that returned this."""
    return {
        "status": "succeeded",
        "result": result,
        "error": None,
        "trace": None,
        "version": 1,
        "duration_ms": 1.5,
        "memory_mb": 20.5,
        "cold_start": True,
        "request_id": "r-1",
    }


@asynccontextmanager
async def played_host(
    stack: Stack,
    folder: Path,
    *,
    region: str = REGION,
    runtimes: tuple[str, ...] = ("python3", "wasm"),
    network: bool = False,
    follows: bool = True,
) -> AsyncIterator[PlayedHost]:
    """Take a host into service and play it; one that does not follow asks only when the test has it ask."""
    name = f"played-{next(_numbers)}"
    store, keys = stack.server.store, stack.server.keys
    row, secret = await add_host(
        store, stack.server.catalog, stack.clock, keys, kind=FUNCTIONS, name=name, region=region
    )
    socket = folder / f"{name}.sock"
    host = PlayedHost(
        stack, row, secret, offers={"address": f"unix:{socket}", "runtimes": runtimes, "network": network}
    )
    async with _serving(host, socket):
        await host.start()
        if follows:
            host.follow()
        try:
            yield host
        finally:
            await host.stop()
            await remove_host(store, stack.clock, name=name, force=True)


@asynccontextmanager
async def _serving(host: PlayedHost, socket: Path) -> AsyncIterator[None]:
    server = _Server(
        uvicorn.Config(
            host.serve_call, uds=str(socket), interface="asgi3", lifespan="off", log_config=None, loop="none"
        )
    )
    work = asyncio.create_task(server.serve())

    async def started() -> bool:
        return server.started

    await eventually(started)
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        await work


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves the signals to pytest."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield
