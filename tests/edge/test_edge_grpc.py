"""Native gRPC and gRPC-Web through the edge: untouched, and not to what is internal."""

import struct
from collections.abc import AsyncIterator

import grpc
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from controlplane.api.v1 import databases_pb2, databases_pb2_grpc, errors_pb2
from tests.edge.conftest import Edge
from tests.edge.upstream import Upstream, answering, refusing

Call = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
WEB = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
LIST = "/controlplane.api.v1.DatabaseService/ListDatabases"


@pytest.fixture
async def channel(edge: Edge) -> AsyncIterator[grpc.aio.Channel]:
    """Return a channel to the edge."""
    async with grpc.aio.insecure_channel(edge.target) as opened:
        yield opened


async def test_a_native_call_is_untouched(channel: grpc.aio.Channel, upstream: Upstream) -> None:
    """A native caller gets the message, its pages' token too, and nothing marks the call as REST."""
    message = databases_pb2.ListDatabasesResponse(databases=[databases_pb2.Database()] * 3, next_page_token="n")
    upstream.answers["ListDatabases"] = answering(message, ("x-thing", "1"), ("x-thing-bin", b"\x00\xff"))
    forged = (("x-htx-client-ip", "6.6.6.6"), ("x-envoy-original-path", "/x"), ("x-own-bin", b"\x00"), ("grpc-x", "1"))
    call = databases_pb2_grpc.DatabaseServiceStub(channel).ListDatabases(
        databases_pb2.ListDatabasesRequest(), metadata=forged
    )
    assert await call == message
    initial = dict(await call.initial_metadata())
    assert (initial["x-thing"], initial["x-thing-bin"]) == ("1", b"\x00\xff")
    metadata = upstream.received[0].metadata
    assert metadata["x-htx-client-ip"] == "127.0.0.1"
    assert metadata["x-request-id"] == initial["x-request-id"]
    assert metadata["x-own-bin"] == b"\x00"
    assert not [name for name in metadata if name.startswith("x-envoy-original-")]


async def test_a_native_error_keeps_its_details(channel: grpc.aio.Channel, upstream: Upstream) -> None:
    """A native caller gets gRPC's status and the standard details."""
    error = errors_pb2.Error(error="„full“", code="quota_exceeded", request_id="r1")
    upstream.answers["ListDatabases"] = refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, 402, error)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await databases_pb2_grpc.DatabaseServiceStub(channel).ListDatabases(databases_pb2.ListDatabasesRequest())
    assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "„full“")
    details = dict(refused.value.trailing_metadata())["grpc-status-details-bin"]
    assert status_pb2.Status.FromString(details).message == "„full“"


async def test_health_and_reflection_stay_inside(channel: grpc.aio.Channel) -> None:
    """A service outside the contract is unknown to the edge, in gRPC's own words."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    reflect: Call = channel.unary_unary("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await reflect(b"")
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "{" not in str(refused.value.details())


async def test_a_grpc_call_to_a_rest_path_is_refused(channel: grpc.aio.Channel, upstream: Upstream) -> None:
    """A REST path takes no gRPC, so that nothing arrives that looks like neither."""
    listing: Call = channel.unary_unary("/api/portal/databases")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await listing(b"")
    assert "JSON" in str(refused.value.details())
    assert not upstream.received


async def test_grpc_web_is_answered(edge: Edge, upstream: Upstream) -> None:
    """A browser's gRPC-Web call gets the message and the trailers in the body."""
    answer = await edge.http.post(LIST, content=b"\0" + struct.pack(">I", 0), headers=WEB)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/grpc-web+proto"
    assert b"grpc-status:0" in answer.content
    assert "x-envoy-original-path" not in upstream.received[0].metadata


async def test_a_grpc_web_error_is_answered(edge: Edge, upstream: Upstream) -> None:
    """An error reaches a gRPC-Web caller as a gRPC status."""
    error = errors_pb2.Error(error="no", code="not_found")
    upstream.answers["ListDatabases"] = refusing(grpc.StatusCode.NOT_FOUND, 404, error)
    answer = await edge.http.post(LIST, content=b"\0" + struct.pack(">I", 0), headers=WEB)
    assert answer.headers.get("grpc-status") == "5" or b"grpc-status:5" in answer.content
