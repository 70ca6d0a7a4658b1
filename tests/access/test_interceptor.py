"""The interceptor before handlers that the contract has none of yet: streams, and services without a policy."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from controlplane.access.interceptor import AccessInterceptor
from controlplane.api.v1 import databases_pb2
from controlplane.events.feed import Feed
from controlplane.observe.traces import Traces
from controlplane.rpc.contract import rpcs
from controlplane.rpc.idempotency import Idempotency
from tests.stack import Customer, Stack

LIST = "/controlplane.api.v1.DatabaseService/ListDatabases"
UNKNOWN = "/somebody.else.Service/Do"


@pytest.fixture
async def channel(stack: Stack) -> AsyncIterator[grpc.aio.Channel]:
    """A server with the real interceptor, where ListDatabases streams, and a service has no policy."""
    server = stack.server
    access = AccessInterceptor(
        rpcs=rpcs(),
        store=server.store,
        admission=server.house.admission,
        uses=server.uses,
        audit=server.audit,
        feed=Feed(store=server.store, clock=stack.clock),
        idempotency=Idempotency(keys=server.keys, clock=stack.clock),
        metrics=server.metrics,
        traces=Traces(),
        max_body_bytes=65536,
    )

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        del context
        for number in range(3):
            yield databases_pb2.Database(name=f"{number} of {request.page_size}")

    async def answer(request: bytes, context: Any) -> bytes:
        del context
        return request

    streaming = grpc.aio.server(interceptors=[access])
    handlers: dict[str, Any] = {
        LIST: grpc.unary_stream_rpc_method_handler(stream),
        UNKNOWN: grpc.unary_unary_rpc_method_handler(answer),
    }
    for path, handler in handlers.items():
        service, method = path.strip("/").split("/")
        streaming.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = streaming.add_insecure_port("127.0.0.1:0")
    await streaming.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    await streaming.stop(None)


async def _streamed(channel: grpc.aio.Channel, page_size: int, token: str | None) -> list[str]:
    call: Any = channel.unary_stream(LIST, response_deserializer=databases_pb2.Database.FromString)
    request = databases_pb2.ListDatabasesRequest(page_size=page_size).SerializeToString()
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    return [message.name async for message in call(request, metadata=metadata)]


async def test_a_stream_reaches_who_may_have_it(channel: grpc.aio.Channel, customer: Customer) -> None:
    """A stream of answers arrives whole."""
    assert await _streamed(channel, 7, customer.token) == ["0 of 7", "1 of 7", "2 of 7"]


async def test_a_stream_has_the_same_door(channel: grpc.aio.Channel, customer: Customer) -> None:
    """Nobody, a revoked token, an address that is not allowed and a broken rule get no message of a stream."""
    revoked = await customer.new_token()
    await customer.by_login("DELETE", f"/api/portal/tokens/{revoked['id']}")
    elsewhere = await customer.new_token(allowed_ips=["203.0.113.7"])
    for token, size, code in (
        (None, 7, grpc.StatusCode.UNAUTHENTICATED),
        (revoked["token"], 7, grpc.StatusCode.UNAUTHENTICATED),
        (elsewhere["token"], 7, grpc.StatusCode.PERMISSION_DENIED),
        (customer.token, 5000, grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _streamed(channel, size, token)
        assert refused.value.code() == code


async def test_what_has_no_policy_is_denied(channel: grpc.aio.Channel, customer: Customer) -> None:
    """A handler that the contract does not know answers nobody, whatever he brings."""
    ask: Any = channel.unary_unary(UNKNOWN)
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(b"let me in", metadata=customer.metadata)
