"""The servicer of the catalogue."""

from typing import Any

import grpc

from controlplane.api.v1 import catalog_pb2, catalog_pb2_grpc
from controlplane.catalog.model import Catalog, Region
from controlplane.clock import Clock
from controlplane.hosts.kinds import FUNCTIONS, PROXIES
from controlplane.hosts.model import live_hosts
from controlplane.sql import Store

Context = grpc.aio.ServicerContext[Any, Any]


class CatalogService(catalog_pb2_grpc.CatalogServiceServicer):
    """What the provider sells, and where."""

    def __init__(self, *, catalog: Catalog, store: Store, clock: Clock) -> None:
        self._catalog = catalog
        self._store = store
        self._clock = clock

    async def ListPlans(self, request: catalog_pb2.ListPlansRequest, context: Context) -> catalog_pb2.ListPlansResponse:
        """List the plans."""
        return catalog_pb2.ListPlansResponse(
            plans=[
                catalog_pb2.Plan(
                    name=plan.name, quotas=dict(plan.quotas), rate_limit_per_minute=plan.rate_limit_per_minute
                )
                for plan in self._catalog.plans
            ]
        )

    async def ListSkus(self, request: catalog_pb2.ListSkusRequest, context: Context) -> catalog_pb2.ListSkusResponse:
        """List the sizes."""
        return catalog_pb2.ListSkusResponse(skus=[catalog_pb2.Sku(**dict(sku)) for sku in self._catalog.skus])

    async def ListRegions(
        self, request: catalog_pb2.ListRegionsRequest, context: Context
    ) -> catalog_pb2.ListRegionsResponse:
        """List the regions, and what can be ordered in each of them now."""
        return catalog_pb2.ListRegionsResponse(regions=[await self._shown(region) for region in self._catalog.regions])

    async def _shown(self, region: Region) -> catalog_pb2.Region:
        functions = await live_hosts(self._store, self._clock, kind=FUNCTIONS, region=region.name)
        proxies = await live_hosts(self._store, self._clock, kind=PROXIES, region=region.name)
        return catalog_pb2.Region(
            name=region.name,
            title=region.title,
            engines=self._catalog.engines_in(region.name),
            runtimes=sorted({runtime for host in functions for runtime in host.runtimes}),
            function_network=any(host.network for host in functions),
            proxies=bool(proxies),
        )
