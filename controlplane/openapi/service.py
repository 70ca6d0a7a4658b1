"""The servicer of the OpenAPI document, which is made of the proto files by `make proto`."""

from pathlib import Path
from typing import Any

import grpc
from google.api import httpbody_pb2

from controlplane import api
from controlplane.api.v1 import openapi_pb2, openapi_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class OpenApiService(openapi_pb2_grpc.OpenApiServiceServicer):
    """The description of this API."""

    def __init__(self) -> None:
        document = Path(api.__path__[0]) / "openapi.json"
        self._answer = httpbody_pb2.HttpBody(content_type="application/json", data=document.read_bytes())

    async def GetOpenApi(self, request: openapi_pb2.GetOpenApiRequest, context: Context) -> httpbody_pb2.HttpBody:
        """Return the document."""
        return self._answer
