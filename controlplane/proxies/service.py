"""The servicer of proxies: so far an account has none, and none can be made."""

from typing import Any

import grpc

from controlplane.api.v1 import proxies_pb2, proxies_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class ProxyService(proxies_pb2_grpc.ProxyServiceServicer):
    """SOCKS5 proxies."""

    async def ListProxies(
        self, request: proxies_pb2.ListProxiesRequest, context: Context
    ) -> proxies_pb2.ListProxiesResponse:
        """List the account's proxies."""
        return proxies_pb2.ListProxiesResponse()
