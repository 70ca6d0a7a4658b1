"""The control plane as a host sees it: a gRPC server of our own, which holds functions and notes what it is told."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from controlplane.api.hosts.v1 import hosts_pb2, hosts_pb2_grpc
from controlplane.ids import new_id
from tests.stack import eventually, free_port

SECRET = "a-host's-secret"
ACCOUNT = "ac_tests"
_PAGE = 100

Context = grpc.aio.ServicerContext[Any, Any]


def processes_of(uids: range) -> list[int]:
    """Return the processes that run as one of these users; those that have ended do not count (proc(5))."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            if entry.name.isdigit() and entry.stat().st_uid in uids:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(entry.name)] if state != "Z" else []
    return found


def _allow(_request: hosts_pb2.AuthorizeFunctionCallRequest) -> hosts_pb2.AuthorizeFunctionCallResponse:
    return hosts_pb2.AuthorizeFunctionCallResponse()


@dataclass
class Control(hosts_pb2_grpc.FunctionHostServiceServicer):
    """What the tests look at and change. A version that was built is made active at once."""

    port: int = field(default_factory=free_port)
    functions: dict[str, hosts_pb2.HostedFunction] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    sequence: int = 0
    code: dict[str, hosts_pb2.GetFunctionCodeResponse] = field(default_factory=dict)
    builds: dict[str, str] = field(default_factory=dict)
    authorize: Callable[[hosts_pb2.AuthorizeFunctionCallRequest], hosts_pb2.AuthorizeFunctionCallResponse] = _allow
    questions: list[hosts_pb2.AuthorizeFunctionCallRequest] = field(default_factory=list)
    lines: list[hosts_pb2.FunctionLog] = field(default_factory=list)
    batches: list[tuple[str, int]] = field(default_factory=list)
    starts: list[hosts_pb2.StartFunctionHostRequest] = field(default_factory=list)
    instance: str = ""
    applied: int = 0
    fetched: set[str] = field(default_factory=set)
    may_fetch: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self) -> None:
        """Answer on `port`, again after `go_away()`."""
        self._changed = asyncio.Condition()
        self.may_fetch.set()
        self._server = grpc.aio.server()
        hosts_pb2_grpc.add_FunctionHostServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def go_away(self) -> None:
        """Answer nothing any more."""
        await self._server.stop(None)

    async def change(self, function: hosts_pb2.HostedFunction) -> int:
        """Let the hosts have a function as it is now; return its place."""
        async with self._changed:
            self.sequence += 1
            self.functions[function.id] = function
            self.places[function.id] = self.sequence
            self._changed.notify_all()
        return self.sequence

    async def until_applied(self, place: int) -> None:
        """Wait until the host says that it holds everything up to a place."""

        async def applied() -> bool:
            return self.applied >= place

        await eventually(applied)

    async def order(
        self,
        code: str | bytes,
        *,
        name: str = "",
        function_id: str = "",
        runtime: str = "python3",
        build: bool = True,
        **wanted: Any,
    ) -> tuple[str, str]:
        """Order a version of a new function, or of one that there is; return the ids of both."""
        function = self.functions.get(function_id) or hosts_pb2.HostedFunction(
            id=new_id("fn"), account_id=ACCOUNT, name=name or new_id("f").replace("_", "-"), max_concurrency=10
        )
        function.auth = wanted.pop("auth", function.auth or "public")
        function.max_concurrency = wanted.pop("max_concurrency", function.max_concurrency)
        entrypoint = {"python3": "main.handler", "nodejs": "index.handler", "wasm": "main.wat"}[runtime]
        version = hosts_pb2.HostedVersion(
            **{
                "id": new_id("fv"),
                "version": max(function.active.version, function.building.version) + 1,
                "runtime": runtime,
                "entrypoint": entrypoint,
                "memory_mb": 64,
                "timeout_ms": 10_000,
                **wanted,
            }
        )
        self.code[version.id] = (
            hosts_pb2.GetFunctionCodeResponse(source=code)
            if isinstance(code, str)
            else hosts_pb2.GetFunctionCodeResponse(archive=code)
        )
        (function.building if build else function.active).CopyFrom(version)
        await self.change(function)
        return function.id, version.id

    async def put(self, code: str | bytes, **wanted: Any) -> hosts_pb2.HostedFunction:
        """Have a function whose version was built before, by a host of another day."""
        function_id, _ = await self.order(code, build=False, **wanted)
        return self.functions[function_id]

    async def deploy(self, code: str | bytes, **wanted: Any) -> hosts_pb2.HostedFunction:
        """Order a version, and wait until it is what answers."""
        function_id, version_id = await self.order(code, **wanted)

        async def built() -> bool:
            return version_id in self.builds

        await eventually(built)
        assert not self.builds[version_id], self.builds[version_id]
        await self.until_applied(self.places[function_id])
        return self.functions[function_id]

    async def line(self, wanted: Callable[[hosts_pb2.FunctionLog], bool]) -> hosts_pb2.FunctionLog:
        """Return the first log line that is like this, as soon as there is one."""

        async def found() -> hosts_pb2.FunctionLog | None:
            return next((line for line in self.lines if wanted(line)), None)

        line = await eventually(found)
        assert line is not None
        return line

    async def StartFunctionHost(  # noqa: N802
        self, request: hosts_pb2.StartFunctionHostRequest, context: Context
    ) -> hosts_pb2.StartFunctionHostResponse:
        """Know the host by a new name."""
        if ("authorization", f"Bearer {SECRET}") not in (context.invocation_metadata() or ()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "No host has this secret.")
        self.starts.append(request)
        self.instance = new_id("start")
        self.applied = 0
        return hosts_pb2.StartFunctionHostResponse(instance=self.instance, call_secret=f"secret of {self.instance}")

    async def PullFunctions(  # noqa: N802
        self, request: hosts_pb2.PullFunctionsRequest, context: Context
    ) -> hosts_pb2.PullFunctionsResponse:
        """Answer with what comes after a place."""
        await self._check(request.instance, context)
        self.applied = request.after
        async with self._changed:
            try:
                async with asyncio.timeout(request.wait):
                    while self.sequence <= request.after:
                        await self._changed.wait()
            except TimeoutError:
                pass
        await self._check(request.instance, context)
        after = sorted((place, name) for name, place in self.places.items() if place > request.after)
        page = after[:_PAGE]
        return hosts_pb2.PullFunctionsResponse(
            functions=[self.functions[name] for _, name in page],
            sequence=page[-1][0] if page else request.after,
            complete=len(after) <= _PAGE,
        )

    async def GetFunctionCode(  # noqa: N802
        self, request: hosts_pb2.GetFunctionCodeRequest, context: Context
    ) -> hosts_pb2.GetFunctionCodeResponse:
        """Answer with a version's code, once that may be."""
        self.fetched.add(request.version_id)
        await self.may_fetch.wait()
        if request.version_id not in self.code:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such version.")
        return self.code[request.version_id]

    async def ReportFunctionBuild(  # noqa: N802
        self, request: hosts_pb2.ReportFunctionBuildRequest, context: Context
    ) -> hosts_pb2.ReportFunctionBuildResponse:
        """Make a version active that could be built."""
        del context
        if request.version_id not in self.builds:
            for function in tuple(self.functions.values()):
                if function.building.id == request.version_id:
                    if not request.error:
                        function.active.CopyFrom(function.building)
                    function.ClearField("building")
                    await self.change(function)
        self.builds.setdefault(request.version_id, request.error)
        return hosts_pb2.ReportFunctionBuildResponse()

    async def ReportFunctionLogs(  # noqa: N802
        self, request: hosts_pb2.ReportFunctionLogsRequest, context: Context
    ) -> hosts_pb2.ReportFunctionLogsResponse:
        """Keep lines, those of a batch once."""
        await self._check(request.instance, context)
        if (request.instance, request.batch) not in self.batches:
            self.batches.append((request.instance, request.batch))
            self.lines += request.lines
        return hosts_pb2.ReportFunctionLogsResponse()

    async def AuthorizeFunctionCall(  # noqa: N802
        self, request: hosts_pb2.AuthorizeFunctionCallRequest, context: Context
    ) -> hosts_pb2.AuthorizeFunctionCallResponse:
        """Answer as the test wants it."""
        del context
        self.questions.append(request)
        return self.authorize(request)

    async def _check(self, instance: str, context: Context) -> None:
        if instance != self.instance:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "Start anew.")
