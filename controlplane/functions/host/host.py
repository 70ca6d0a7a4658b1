"""The process that runs customers' functions: it follows the control plane, and answers the calls of the edge.

    link        what the control plane wants (PullFunctions) → directory.py, which applies it
    directory   functions, each with a pool.py of workers; cache.py has their code, sandbox.py confines them
    calls.py    HTTP, in the format of http.py → the function's pool
    logs.py     what the functions print → the control plane

While the control plane is away, the host goes on with what it has. It keeps nothing beyond its end.
"""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

import structlog
import uvicorn
from prometheus_client import start_http_server

from controlplane.api.hosts.v1 import hosts_pb2, hosts_pb2_grpc
from controlplane.functions.host.cache import CodeCache
from controlplane.functions.host.calls import Calls
from controlplane.functions.host.directory import Directory
from controlplane.functions.host.logs import Logs
from controlplane.functions.host.metrics import Metrics
from controlplane.functions.host.pool import Limits, Room
from controlplane.functions.host.sandbox import Sandbox
from controlplane.hosts.link import Link
from controlplane.operator_error import OperatorError

_PULL_WAIT = 4  # seconds; the control plane takes a host that asks less often than every five for one that is away
_PATIENCE = 10.0  # beyond that, for any question to the control plane
_TIDY_EVERY = 1.0
_DRAIN = 70  # seconds; a call may take 60
# The edge ends connections that it does not use after an hour; were we to do so first, it might just be using one.
_KEEP_ALIVE = 2 * 3600

_log = structlog.get_logger("functions")


@dataclass(frozen=True, slots=True)
class FunctionHostSettings:
    """Where the control plane is and what it knows us by; where we listen: `unix:PATH` or `HOST:PORT`.

    `data_dir` is this host's alone, and so are `uids`, of which each account gets one while its functions run.
    """

    server: str
    secret: str
    listen: str
    data_dir: Path
    metrics_port: int
    uids: range


async def run(settings: FunctionHostSettings) -> None:
    """Run a host until SIGTERM or SIGINT.

    Raises OperatorError if it cannot start, LinkError once the control plane will not have it.
    """
    host = FunctionHost(settings)
    await host.start()
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    stopping = asyncio.create_task(asked_to_stop.wait())
    await asyncio.wait((stopping, host.following), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    ended = host.following if host.following.done() else None
    await host.stop()
    if ended is not None:
        ended.result()


class FunctionHost:
    """One host. `following` ends only if the control plane will not have it."""

    following: asyncio.Task[None]

    def __init__(self, settings: FunctionHostSettings, *, limits: Limits | None = None) -> None:
        self.metrics = Metrics()
        self._settings = settings
        self._room = Room(limits or Limits())
        self._link = Link(settings.server, settings.secret)
        self._control = hosts_pb2_grpc.FunctionHostServiceStub(self._link.channel)
        self._logs = Logs(self._report_logs)
        self._exit = AsyncExitStack()
        self._instance = ""
        self._held: set[str] | None = None

    async def start(self) -> None:
        """Serve, and begin to follow the control plane. Raises OperatorError."""
        async with AsyncExitStack() as begun:
            begun.push_async_callback(self._link.close)
            listener = begun.enter_context(_listening(self._settings.listen))
            begun.enter_context(_exposed(self.metrics, self._settings.metrics_port))
            self._sandbox = await asyncio.to_thread(Sandbox.open, self._settings.data_dir, self._settings.uids)
            begun.push_async_callback(self._sandbox.close)
            self._exit = begun.pop_all()
        self._directory = Directory(
            sandbox=self._sandbox,
            room=self._room,
            cache=CodeCache(self._settings.data_dir / "code", self._fetch_code),
            logs=self._logs,
            metrics=self.metrics,
            report_build=self._report_build,
        )
        self._calls = Calls(directory=self._directory, authorize=self._authorize, logs=self._logs)
        self._server = _Server(_config(self._calls))
        self._serving = asyncio.create_task(self._server.serve([listener]))
        self._background = [asyncio.create_task(self._logs.run()), asyncio.create_task(self._tidy())]
        self.following = asyncio.create_task(self._link.follow(self._begin, self._pull))
        _log.info("running functions", listen=self._settings.listen, runtimes=sorted(self._sandbox.runtimes))

    async def stop(self) -> None:
        """Take no more calls, finish those that run, and end every worker."""
        for task in (self.following, *self._background):
            task.cancel()
        self._server.should_exit = True
        await self._serving
        await self._directory.close()
        await self._room.close()
        await self._logs.flush()
        await self._exit.aclose()

    async def _begin(self) -> None:
        """Say what we offer, and forget nothing yet: all that there is comes with the next pulls."""
        request = hosts_pb2.StartFunctionHostRequest(
            address=self._settings.listen, runtimes=sorted(self._sandbox.runtimes), network=self._sandbox.network
        )
        answer = await self._control.StartFunctionHost(request, metadata=self._link.metadata, timeout=_PATIENCE)
        self._instance = answer.instance
        self._calls.call_secret = answer.call_secret
        self._sandbox.refused_networks = tuple(map(ip_network, answer.refused_networks))
        self._held = set()
        self._logs.restart()

    async def _pull(self, after: int) -> int:
        """Put the changes after a place in force, and return the place of the last one."""
        request = hosts_pb2.PullFunctionsRequest(instance=self._instance, after=after, wait=_PULL_WAIT)
        answer = await self._control.PullFunctions(
            request, metadata=self._link.metadata, timeout=_PULL_WAIT + _PATIENCE
        )
        for function in answer.functions:
            self._directory.apply(function)
        if self._held is not None:
            self._held.update(function.id for function in answer.functions)
            if answer.complete:
                self._directory.keep_only(self._held)
                self._held = None
        return max(after, answer.sequence)

    async def _fetch_code(self, version_id: str) -> hosts_pb2.GetFunctionCodeResponse:
        request = hosts_pb2.GetFunctionCodeRequest(version_id=version_id)
        return await self._control.GetFunctionCode(request, metadata=self._link.metadata, timeout=_PATIENCE)

    async def _report_build(self, version_id: str, error: str) -> None:
        request = hosts_pb2.ReportFunctionBuildRequest(version_id=version_id, error=error)
        await self._control.ReportFunctionBuild(request, metadata=self._link.metadata, timeout=_PATIENCE)

    async def _report_logs(self, batch: int, lines: Sequence[hosts_pb2.FunctionLog]) -> None:
        request = hosts_pb2.ReportFunctionLogsRequest(instance=self._instance, batch=batch, lines=lines)
        await self._control.ReportFunctionLogs(request, metadata=self._link.metadata, timeout=_PATIENCE)

    async def _authorize(
        self, request: hosts_pb2.AuthorizeFunctionCallRequest
    ) -> hosts_pb2.AuthorizeFunctionCallResponse:
        return await self._control.AuthorizeFunctionCall(request, metadata=self._link.metadata, timeout=_PATIENCE)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(_TIDY_EVERY)
            self._room.dismiss_unused()


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves SIGTERM to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def _config(app: Calls) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        date_header=False,  # the function's own would come beside it; the edge adds one
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_DRAIN,
    )


@contextmanager
def _exposed(metrics: Metrics, port: int) -> Iterator[None]:
    """Serve the metrics on a loopback port, from a thread."""
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=metrics.registry)
    except OSError as error:
        raise OperatorError(f"Port {port} cannot be used for metrics ({error.strerror}): choose another.") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def _listening(address: str) -> Iterator[socket.socket]:
    """Listen; connections are taken once somebody serves."""
    path = Path(address.removeprefix("unix:")) if address.startswith("unix:") else None
    try:
        listener = _bind(address) if path is None else _bind_at(path)
    except (OSError, ValueError) as error:
        raise OperatorError(f"Nobody can listen at '{address}' ({error}): is another host running?") from None
    try:
        yield listener
    finally:
        listener.close()
        if path is not None:
            path.unlink(missing_ok=True)


def _bind(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=socket.SOMAXCONN)


def _bind_at(path: Path) -> socket.socket:
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise OSError("somebody does already")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of a host that was killed
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o117)  # the socket is made here: for its owner and group only
    try:
        listener.bind(str(path))
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    listener.listen(socket.SOMAXCONN)
    return listener
