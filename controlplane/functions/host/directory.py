"""The functions that this host holds: found by id and by address, and brought to what the control plane wants."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import structlog

from controlplane.api.hosts.v1 import hosts_pb2
from controlplane.functions.host.cache import CodeCache
from controlplane.functions.host.logs import Logs
from controlplane.functions.host.metrics import FunctionMetrics, Metrics
from controlplane.functions.host.pool import NotReady, Pool, Room, TooManyCalls, Version, plain
from controlplane.functions.host.sandbox import Sandbox
from controlplane.functions.host.worker import Program, StartFailed, Worker

_TRY_AGAIN = 1.0  # seconds

_log = structlog.get_logger("functions")


@dataclass(slots=True)
class Function:
    """A function as it is in force here; `versions` are those whose workers or code may still be wanted, by id."""

    id: str
    account_id: str
    name: str
    auth: str
    pool: Pool
    metrics: FunctionMetrics
    versions: dict[str, Version] = field(default_factory=dict)
    builds: dict[str, asyncio.Task[None]] = field(default_factory=dict)


class Directory:
    """All functions. `report_build` tells the control plane why a version could not be built, or nothing, by its id."""

    def __init__(
        self,
        *,
        sandbox: Sandbox,
        room: Room,
        cache: CodeCache,
        logs: Logs,
        metrics: Metrics,
        report_build: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self._sandbox = sandbox
        self._room = room
        self._cache = cache
        self._logs = logs
        self._metrics = metrics
        self._report_build = report_build
        self._functions: dict[str, Function] = {}
        self._addresses: dict[tuple[str, str], Function] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def get(self, function_id: str) -> Function | None:
        """Return the function with this id, if there is one."""
        return self._functions.get(function_id)

    def find(self, account_id: str, name: str) -> Function | None:
        """Return the function of this name in an account, if there is one."""
        return self._addresses.get((account_id, name))

    def apply(self, hosted: hosts_pb2.HostedFunction) -> None:
        """Put a function in force as the control plane has it; only its build goes on in the background."""
        if hosted.removed:
            self._remove(hosted.id)
            return
        function = self._functions.get(hosted.id) or self._add(hosted)
        function.auth = hosted.auth
        function.pool.max_concurrency = hosted.max_concurrency
        wanted = {
            version.id: version
            for version, is_set in (
                (hosted.active, hosted.HasField("active")),
                (hosted.building, hosted.HasField("building")),
            )
            if is_set
        }
        for version_id, version in wanted.items():
            if version_id not in function.versions:
                function.versions[version_id] = self._version(function, version)
        self._switch(function, hosted)
        if hosted.HasField("building"):
            self._build(function, hosted.building.id)
        self._forget_versions(function, function.versions.keys() - wanted.keys())

    def keep_only(self, ids: Collection[str]) -> None:
        """Remove every function but these."""
        for function_id in self._functions.keys() - set(ids):
            self._remove(function_id)

    async def close(self) -> None:
        """Build nothing any more."""
        builds = [build for function in self._functions.values() for build in function.builds.values()]
        for task in (*self._tasks, *builds):
            task.cancel()
        await asyncio.gather(*self._tasks, *builds, return_exceptions=True)

    def _add(self, hosted: hosts_pb2.HostedFunction) -> Function:
        pool = Pool(max_concurrency=hosted.max_concurrency)
        metrics = self._metrics.of(hosted.id)
        function = Function(hosted.id, hosted.account_id, hosted.name, hosted.auth, pool, metrics)
        self._functions[function.id] = function
        self._addresses[function.account_id, function.name] = function
        return function

    def _remove(self, function_id: str) -> None:
        """Answer no call any more; those that run are finished."""
        function = self._functions.pop(function_id, None)
        if function is None:
            return
        # Its address may be another function's by now.
        if self._addresses.get((function.account_id, function.name)) is function:
            del self._addresses[function.account_id, function.name]
        function.pool.switch(None)
        versions = tuple(function.versions.values())
        self._forget_versions(function, tuple(function.versions))
        self._spawn(self._forget_metrics(function_id, versions))

    def _switch(self, function: Function, hosted: hosts_pb2.HostedFunction) -> None:
        before = function.pool.active
        active = function.versions[hosted.active.id] if hosted.HasField("active") else None
        function.pool.switch(active)
        # Whoever calls it now should not wait for it to start. After a start of the host there may be nobody.
        if before is not None and active is not None and active is not before:
            self._spawn(self._warm(active))

    def _version(self, function: Function, hosted: hosts_pb2.HostedVersion) -> Version:
        async def load() -> Program:
            return Program(
                runtime=hosted.runtime,  # type: ignore[arg-type]  # the control plane orders what we said that we have
                folder=await self._cache.get(hosted),
                entrypoint=hosted.entrypoint,
                memory_mb=hosted.memory_mb,
                timeout_ms=hosted.timeout_ms,
                environment=dict(hosted.env),
                allow_network=hosted.allow_network,
                tenant=function.account_id,
                name=function.name,
                version=hosted.version,
            )

        return Version(
            number=hosted.version,
            memory_mb=hosted.memory_mb,
            seconds=hosted.timeout_ms / 1000,
            room=self._room,
            load=load,
            start=lambda program, on_line: Worker.start(program, self._sandbox, on_line),
            on_line=partial(self._logs.add_line, function.id, hosted.version),
            workers=function.metrics.workers,
        )

    def _build(self, function: Function, version_id: str) -> None:
        """Build a version, unless that goes on already. One that was reported before is reported again."""
        build = function.builds.get(version_id)
        if build is None or build.done():
            version = function.versions[version_id]
            function.builds[version_id] = asyncio.create_task(self._build_and_report(version_id, version))

    async def _build_and_report(self, version_id: str, version: Version) -> None:
        error = await self._try(version)
        while True:
            try:
                await self._report_build(version_id, error)
            except grpc.aio.AioRpcError as failed:
                _log.warning("a build could not be reported; it is tried again", error=failed.details())
                await asyncio.sleep(_TRY_AGAIN)
            else:
                return

    async def _try(self, version: Version) -> str:
        """Start a worker as soon as that is possible; return why the code cannot be loaded, empty if it can."""
        while True:
            try:
                await version.warm()
            except StartFailed as failed:
                return plain(str(failed)) or "The code could not be loaded."
            except (NotReady, TooManyCalls):
                await asyncio.sleep(_TRY_AGAIN)
            except Exception:  # noqa: BLE001 - the control plane would wait for ever
                _log.exception("a build failed by a fault of ours; it is tried again")
                await asyncio.sleep(_TRY_AGAIN)
            else:
                return ""

    async def _warm(self, version: Version) -> None:
        try:
            await version.warm()
        except (StartFailed, NotReady, TooManyCalls) as error:
            _log.info("no worker could be started ahead of the calls", error=str(error))

    def _forget_versions(self, function: Function, ids: Collection[str]) -> None:
        for version_id in tuple(ids):
            version = function.versions.pop(version_id)
            if build := function.builds.pop(version_id, None):
                build.cancel()
            version.retire()
            self._spawn(self._forget_code(function, version_id, version))

    async def _forget_code(self, function: Function, version_id: str, version: Version) -> None:
        await version.until_unused()
        await self._cache.until_loaded(version_id)  # or it would be there after it was removed
        present = self._functions.get(function.id)
        if present is None or version_id not in present.versions:  # it may have come back
            await self._cache.remove(version_id)

    async def _forget_metrics(self, function_id: str, versions: Collection[Version]) -> None:
        for version in versions:
            await version.until_unused()
        if function_id not in self._functions:
            self._metrics.forget(function_id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
