"""FastAPI on our own data path: what remains of the difference when both sides read the database in the same way.

The look-up of the credential and its cache, allowlist, rate limit, policy, statement and the memory of what was read
are the server's own objects; only the protocol differs. `/api/portal/databases` answers through a response model, as
FastAPI is meant to be used. `/bare` hands FastAPI the remembered bytes, past its validation and its documentation: the
fastest way that it has.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from controlplane.access.allowlist import is_allowed
from controlplane.access.caller import Caller
from controlplane.access.credentials import Credentials
from controlplane.access.policy import check_policy
from controlplane.access.rate import LocalLimiter
from controlplane.catalog.model import Catalog
from controlplane.clock import SystemClock
from controlplane.databases.service import _LIST
from controlplane.errors import IpDenied, PortalError, RateLimited, Unauthenticated
from controlplane.keys import Keys
from controlplane.rpc.contract import rpcs
from controlplane.settings import Settings
from controlplane.sql import Remembered, Store

_REMEMBERED = 500
_EVERYTHING: Mapping[str, Any] = {"after": "", "limit": 1001}
_RPC = rpcs()["/controlplane.api.v1.DatabaseService/ListDatabases"]


class Portal:
    """The parts of the server that both sides share."""

    def __init__(self, settings: Settings) -> None:
        self.clock = SystemClock()
        self.store = Store(settings.storage_url)
        self.limiter = LocalLimiter(self.clock)
        self.credentials = Credentials(
            store=self.store,
            keys=Keys.load(settings.data_dir / "keys.json"),
            catalog=Catalog.load(settings.catalog),
        )
        self._rows = Remembered[Sequence[Any]](self.store, most=_REMEMBERED)
        self._bytes = Remembered[bytes](self.store, most=_REMEMBERED)

    async def databases(self, account_id: str) -> Sequence[Any]:
        """Return the rows of the account's databases, oldest first."""
        return await self._rows.get(account_id, lambda: self._read(account_id)) or ()

    async def databases_json(self, account_id: str) -> bytes:
        """Return the same as the bytes of the answer."""

        async def read() -> bytes:
            rows = [_as_json(row) for row in await self._read(account_id)]
            return json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()

        return await self._bytes.get(account_id, read) or b"[]"

    async def _read(self, account_id: str) -> Sequence[Any]:
        return await self.store.fetch(_LIST, {"account_id": account_id, **_EVERYTHING})


class DatabaseRead(BaseModel):
    """A managed database as the API shows it."""

    id: str
    name: str
    engine: str
    sku: str
    status: str = Field(validation_alias="state")
    cluster_target: str
    region: str
    tags: dict[str, str]
    deletion_protection: bool
    created_at: datetime
    updated_at: datetime
    generation: int
    observed_generation: int


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.portal = Portal(Settings())
    yield
    await app.state.portal.store.close()


app = FastAPI(lifespan=_lifespan)


@app.exception_handler(PortalError)
async def refuse(request: Request, error: PortalError) -> JSONResponse:
    """Answer with an error."""
    del request
    return JSONResponse({"error": str(error), "code": error.code}, error.http)


async def get_caller(request: Request, response: Response) -> Caller:
    """Do what stands between a caller and the list, in the interceptor's order."""
    portal: Portal = request.app.state.portal
    caller = await portal.credentials.find_caller({"authorization": request.headers.get("authorization", "")})
    if caller is None or not caller.holds(portal.clock.now()):
        raise Unauthenticated
    address = request.client.host if request.client else ""
    if caller.networks and not is_allowed(address, caller.networks):
        raise IpDenied(address)
    verdict = await portal.limiter.hit(caller.credential_id, caller.rate_limit)
    response.headers["ratelimit-limit"] = str(verdict.limit)
    response.headers["ratelimit-remaining"] = str(verdict.remaining)
    response.headers["ratelimit-reset"] = str(verdict.reset)
    if not verdict.allowed:
        raise RateLimited(verdict.limit, retry_after=verdict.reset)
    check_policy(_RPC, caller)
    return caller


CallerOfRequest = Annotated[Caller, Depends(get_caller)]


@app.get("/api/portal/databases", response_model=list[DatabaseRead])
async def list_databases(request: Request, caller: CallerOfRequest) -> Any:
    """List the account's databases through the response model."""
    return await request.app.state.portal.databases(caller.account_id)


@app.get("/bare")
async def list_databases_bare(request: Request, response: Response, caller: CallerOfRequest) -> Response:
    """List the account's databases as bytes of our own making."""
    body = await request.app.state.portal.databases_json(caller.account_id)
    return Response(body, media_type="application/json", headers=dict(response.headers))


def _as_json(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "engine": row.engine,
        "sku": row.sku,
        "status": row.state,
        "cluster_target": row.cluster_target,
        "region": row.region,
        "tags": row.tags,
        "deletion_protection": row.deletion_protection,
        "created_at": row.created_at.isoformat().replace("+00:00", "Z"),
        "updated_at": row.updated_at.isoformat().replace("+00:00", "Z"),
        "generation": row.generation,
        "observed_generation": row.observed_generation,
    }
