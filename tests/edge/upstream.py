"""A server of the real contract for the edge to stand before: it records what reaches it and answers as it is told."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from controlplane.api.v1 import errors_pb2
from controlplane.rpc.bare_list import bare_list
from controlplane.rpc.contract import Rpc, rpcs

Answer = Callable[[Any, Any], Awaitable[Message]]


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it arrived: the RPC's name, the message, its metadata and its deadline (seconds)."""

    rpc: str
    request: Any
    metadata: dict[str, str | bytes]
    deadline: float | None


class Upstream(grpc.GenericRpcHandler):
    """Every RPC of the contract; `answers` replaces what one of them does, by its name."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.answers: dict[str, Answer] = {}
        self.health = health.aio.HealthServicer()
        self._server: Any = None

    async def start(self, socket: Path) -> None:
        """Serve on a Unix socket."""
        # The edge lets 16 KB of headers through, and adds its own; gRPC's default is half of that.
        sizes = [("grpc.max_metadata_size", 32768), ("grpc.absolute_max_metadata_size", 32768)]
        self._server = grpc.aio.server(handlers=[self], options=sizes)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self._server.add_insecure_port(f"unix:{socket}")
        await self._server.start()

    async def stop(self) -> None:
        """Stop at once, as if killed."""
        await self._server.stop(None)

    async def set_healthy(self, healthy: bool) -> None:
        """Say whether this server is ready."""
        statuses = health_pb2.HealthCheckResponse
        await self.health.set("", statuses.SERVING if healthy else statuses.NOT_SERVING)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Find the RPC: gRPC calls this."""
        rpc = rpcs().get(details.method)
        if rpc is None:
            return None

        async def behave(request: Message, context: Any) -> Message:
            metadata = dict(context.invocation_metadata())
            self.received.append(Received(rpc.name, request, metadata, context.time_remaining()))
            if rpc.name in self.answers:
                return await self.answers[rpc.name](request, context)
            if "x-envoy-original-path" in metadata:
                await context.send_initial_metadata(rest_headers(rpc))
                if rpc.response_body:
                    listed: Message = bare_list(rpc.response(), rpc.response_body)
                    return listed
            return rpc.response()

        return grpc.unary_unary_rpc_method_handler(
            behave,
            request_deserializer=rpc.request.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )


def rest_headers(rpc: Rpc) -> list[tuple[str, str]]:
    """Return what the server tells the edge about the answer to a REST caller."""
    return [("x-http-status", str(rpc.status))] if rpc.status != 200 else []


def answering(message: Message, *headers: tuple[str, str | bytes]) -> Answer:
    """Return a behaviour: this message, with these headers."""

    async def answer(_request: Message, context: Any) -> Message:
        if headers:
            await context.send_initial_metadata(headers)
        return message

    return answer


def refusing(
    status: grpc.StatusCode,
    http: int,
    error: errors_pb2.Error,
    *headers: tuple[str, str],
) -> Answer:
    """Return a behaviour: an error as the server makes it, for both kinds of caller."""
    standard = status_pb2.Status(code=status.value[0], message=error.error)
    ours = errors_pb2.Error()
    ours.CopyFrom(error)
    ours.ClearField("error")
    details = ("grpc-status-details-bin", standard.SerializeToString() + ours.SerializeToString())

    async def answer(_request: Message, context: Any) -> Message:
        await context.abort(status, error.error, (details, ("x-http-status", str(http)), *headers))
        raise AssertionError

    return answer


def failing(status: grpc.StatusCode, words: str) -> Answer:
    """Return a behaviour: an error as gRPC itself makes it, without details."""

    async def answer(_request: Message, context: Any) -> Message:
        await context.abort(status, words)
        raise AssertionError

    return answer
