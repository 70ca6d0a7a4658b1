"""The ceiling: a gRPC server that answers ListFunctions with an empty message and does nothing else.

    python -m tests.bench.empty SOCKET

No interceptor, no database, no credential is looked at. It stands where ours stands: behind the same Envoy
configuration, on a Unix socket, with grpc.aio on uvloop.
"""

import asyncio
import signal
import sys
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2_grpc

from controlplane.api.v1 import functions_pb2, functions_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class Empty(functions_pb2_grpc.FunctionServiceServicer):
    """Answers with nothing."""

    async def ListFunctions(  # noqa: N802 - the RPC's name
        self,
        request: functions_pb2.ListFunctionsRequest,
        context: Context,
    ) -> functions_pb2.ListFunctionsResponse:
        """Return an empty list."""
        del request, context
        return functions_pb2.ListFunctionsResponse()


async def main(socket: str) -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)  # Envoy asks for it
    functions_pb2_grpc.add_FunctionServiceServicer_to_server(Empty(), server)  # type: ignore[abstract] # one RPC is asked
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    await stop.wait()
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
