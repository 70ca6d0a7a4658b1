"""The servicer of functions: so far an account has none, and none can be made."""

from typing import Any

import grpc

from controlplane.api.v1 import functions_pb2, functions_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class FunctionService(functions_pb2_grpc.FunctionServiceServicer):
    """Serverless functions."""

    async def ListFunctions(
        self, request: functions_pb2.ListFunctionsRequest, context: Context
    ) -> functions_pb2.ListFunctionsResponse:
        """List the account's functions."""
        return functions_pb2.ListFunctionsResponse()
