"""What a server process tells: its metrics, its log lines, its traces."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from controlplane.accounts.admin import create_account
from controlplane.api.v1 import databases_pb2, databases_pb2_grpc, sessions_pb2, sessions_pb2_grpc
from controlplane.audit.log import AuditLog
from controlplane.catalog.model import Catalog
from controlplane.clock import SystemClock
from controlplane.keys import Keys
from controlplane.migrations import migrate
from controlplane.sql import Store
from tests.cli.conftest import environment
from tests.stack import PASSWORD, eventually, free_port

EMAIL = "a@example.com"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()

    async def Export(  # noqa: N802 - the RPC's name
        self,
        request: trace_service_pb2.ExportTraceServiceRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Keep the spans."""
        del context
        for resource in request.resource_spans:
            attributes = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            self.services.add(attributes["service.name"])
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@dataclass
class Process:
    """A server process, its internal port, its metrics and what it logs."""

    folder: Path
    grpc_port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)

    @asynccontextmanager
    async def running(self, **settings: object) -> AsyncIterator[grpc.aio.Channel]:
        """Start it and connect; stop it afterwards, which must take no force."""
        more = {"HTX_GRPC_PORT": self.grpc_port, "HTX_METRICS_PORT": self.metrics_port, **settings}
        with (self.folder / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "controlplane", "serve"), env=environment(self.folder, **more), stderr=log
            )
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
                await asyncio.wait_for(channel.channel_ready(), 30)
                yield channel
        finally:
            process.terminate()
            status = await asyncio.wait_for(process.wait(), 20)
        assert status == 0

    def log(self) -> str:
        """Return what it has logged."""
        return (self.folder / "log").read_text()


@pytest.fixture
async def process(tmp_path: Path) -> Process:
    """A server that is not started, with one account."""
    store = Store(f"sqlite+aiosqlite:///{tmp_path}/controlplane.db")
    await migrate(store)
    clock = SystemClock()
    audit = AuditLog(store=store, keys=Keys.load(tmp_path / "keys.json"), clock=clock)
    await create_account(store, Catalog.load(None), clock, audit=audit, email=EMAIL, password=PASSWORD)
    await store.close()
    return Process(tmp_path)


async def log_in(channel: grpc.aio.Channel, *, metadata: tuple[tuple[str, str], ...] = ()) -> str:
    """Log in; return the request's id."""
    wanted = sessions_pb2.CreateSession(email=EMAIL, password=PASSWORD)
    call = sessions_pb2_grpc.SessionServiceStub(channel).CreateSession(
        sessions_pb2.CreateSessionRequest(session=wanted), metadata=metadata
    )
    headers: Mapping[str, str] = dict(await call.initial_metadata())  # type: ignore[arg-type]
    await call
    return headers["x-request-id"]


async def test_metrics_logs_and_traces(process: Process) -> None:
    """A login is counted, is a JSON line with its request id, and is a span of the caller's trace at the collector."""
    collector, port = Collector(), free_port()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    traceparent = ("traceparent", f"00-{'a1' * 16}-{'b2' * 8}-01")
    tracing = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": 100}
    async with process.running(**tracing) as channel, httpx.AsyncClient() as http:
        request_id = await log_in(channel, metadata=(traceparent,))
        with pytest.raises(grpc.aio.AioRpcError):
            await databases_pb2_grpc.DatabaseServiceStub(channel).ListDatabases(databases_pb2.ListDatabasesRequest())
        answer = await http.get(f"http://127.0.0.1:{process.metrics_port}/metrics")
        lines = answer.text.splitlines()
        assert 'htx_rpcs_total{code="OK",rpc="CreateSession"} 1.0' in lines
        assert 'htx_rpcs_total{code="unauthenticated",rpc="ListDatabases"} 1.0' in lines
        assert 'htx_rpc_seconds_count{rpc="CreateSession"} 1.0' in lines
        for kind in ("database", "backup"):
            for name in ("due", "lag_seconds", "overdue"):
                assert f'htx_reconciler_{name}{{kind="{kind}"}} 0.0' in lines
        assert any(line.startswith("process_resident_memory_bytes ") for line in lines)

        async def both() -> bool:
            return len(collector.spans) == 2

        await eventually(both)
    await server.stop(None)
    assert collector.services == {"htx-controlplane"}
    spans = {span.name: span for span in collector.spans}
    login = spans["controlplane.api.v1.SessionService/CreateSession"]
    assert (login.trace_id.hex(), login.parent_span_id.hex()) == ("a1" * 16, "b2" * 8)
    assert {pair.key: pair.value.string_value for pair in login.attributes}["htx.request_id"] == request_id
    logged = [json.loads(line) for line in process.log().splitlines()]
    (line,) = [line for line in logged if line.get("request_id") == request_id]
    assert (line["event"], line["level"], line["ip"]) == ("CreateSession", "info", "127.0.0.1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", line["timestamp"])
    assert PASSWORD not in process.log()


async def test_logs_for_people(process: Process) -> None:
    """With the human format a line is for people, and below its level nothing is logged."""
    async with process.running(HTX_LOG_FORMAT="human") as channel:
        request_id = await log_in(channel)
    (line,) = [line for line in process.log().splitlines() if request_id in line]
    assert "CreateSession" in line
    with pytest.raises(json.JSONDecodeError):
        json.loads(line)
    async with process.running(HTX_LOG_LEVEL="warning") as channel:
        await log_in(channel)
    assert process.log() == ""


@pytest.mark.parametrize("taken", ["port", "socket"])
async def test_a_second_server_leaves_the_first_alone(process: Process, taken: str) -> None:
    """A server that finds its port or its socket taken ends, and the first one's socket for the edge still answers."""
    async with process.running():
        port = process.grpc_port if taken == "port" else free_port()
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "controlplane", "serve"),
            env=environment(process.folder, HTX_GRPC_PORT=port, HTX_METRICS_PORT=free_port()),
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert await asyncio.wait_for(second.wait(), 30) == 1
        async with grpc.aio.insecure_channel(f"unix:{process.folder}/run/server.sock") as edge:
            assert await log_in(edge)
