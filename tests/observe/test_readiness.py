"""Readiness: the health service tells whether the control plane's own database answers."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from controlplane.local.postgres import EmbeddedPostgres
from tests.conftest import new_storage
from tests.stack import Stack, eventually, free_port

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def storage(folder: Path) -> AsyncIterator[EmbeddedPostgres]:
    """A PostgreSQL that holds nothing but the control plane's own rows."""
    home = folder / "ready-pg"
    server = EmbeddedPostgres(data_dir=home, run_dir=home / "run", port=free_port())
    await server.start()
    yield server
    await server.stop()


async def test_health_follows_the_database(storage: EmbeddedPostgres, folder: Path, catalog: Path) -> None:
    """While the database is gone nothing is SERVING and calls are 503 with Retry-After; afterwards all is well."""
    url = await new_storage(storage, "ready")
    async with Stack(folder / "ready", database_url=url, catalog=catalog) as stack:
        customer = await stack.customer()

        async def status(service: str = "") -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = await health_pb2_grpc.HealthStub(stack.channel).Check(request)
            return int(answer.status)

        async def is_down() -> bool:
            return bool(await status() == NOT_SERVING)

        async def is_up() -> bool:
            return bool(await status() == SERVING)

        async def works() -> bool:
            return (await stack.rest.get("/healthz")).status_code == 200 and (
                await customer.call("GET", "/api/portal/databases")
            ).status_code == 200

        for _ in range(2):
            await eventually(works)
            await storage.stop()
            await eventually(is_down)
            assert await status("controlplane.api.v1.DatabaseService") == NOT_SERVING
            answer = await customer.call("GET", "/api/portal/databases")
            assert answer.status_code == 503
            assert answer.json()["error"]
            assert int(answer.headers["retry-after"]) >= 1
            await storage.start()
        await eventually(is_up)
        assert await status("controlplane.api.v1.DatabaseService") == SERVING
        await eventually(works)

        await asyncio.wait_for(customer.create_database("analytics"), 20)
