"""Where secrets are not: logs, the storage, its file, later answers."""

import asyncio

import httpx
import structlog
from sqlalchemy import select

from controlplane.tables import METADATA
from tests.doors import Native
from tests.stack import PASSWORD, Customer, Stack


async def test_no_secret_is_logged_or_stored(stack: Stack, native: Native) -> None:
    """Tokens, cookies and passwords of every kind are in no log line and in no row or file, refused ones neither."""
    wrong = "htx_000000000000000000000000000000WRONG1"
    with structlog.testing.capture_logs() as lines:
        customer = await stack.customer()
        made = await customer.new_token()
        path, grace = f"/api/portal/tokens/{made['id']}/rotate", {"grace_seconds": 3600}
        rotated = (await customer.by_login("POST", path, json=grace)).json()
        last_rotated = (await customer.by_login("POST", path, json=grace)).json()
        for token in (made["token"], rotated["token"], last_rotated["token"]):
            assert (await customer.call("GET", "/api/portal/account", token=token)).status_code in {200, 401}
        await stack.server.uses.flush()
        await stack.server.audit.flush()
        await customer.create_database("secretive")
        connection = (await customer.call("GET", "/api/portal/databases/secretive/connection")).json()
        key = {"idempotency-key": "keeps-a-secret"}
        kept = (await customer.by_login("POST", "/api/portal/tokens", json={"name": "a"}, headers=key)).json()
        body = {"email": customer.email, "password": "a wrong but telling password"}
        assert (await stack.rest.post("/api/portal/session", json=body)).status_code == 401
        assert (await native.call("ListDatabases", authorization=f"Bearer {wrong}")).code == "unauthenticated"
        last = await _in_query(stack, customer)
    secrets = {
        "password": PASSWORD,
        "wrong password": body["password"],
        "token": customer.token,
        "first secret": made["token"],
        "previous secret": rotated["token"],
        "last secret": last_rotated["token"],
        "replayable secret": kept["token"],
        "refused token": wrong,
        "cookie": customer.cookie.partition("=")[2],
        "database password": connection["password"],
    }
    logs = repr(lines) + await stack.logged(last.headers["x-request-id"])
    assert customer.account_id in logs
    stored = await _stored(stack)
    assert rotated["prefix"] in stored
    assert last_rotated["prefix"] in stored
    for name, secret in secrets.items():
        assert secret not in logs, name
        assert secret not in stored, name


async def test_a_request_is_found_in_the_logs_by_its_id(stack: Stack, customer: Customer) -> None:
    """The server's line and the edge's line of a write carry the request id of the answer."""
    with structlog.testing.capture_logs() as lines:
        answer = await customer.by_login("POST", "/api/portal/tokens", json={"name": "a"})
    request_id = answer.headers["x-request-id"]
    assert [line["event"] for line in lines if line.get("request_id") == request_id] == ["CreateToken"]
    assert '"/api/portal/tokens"' in await stack.logged(request_id)


async def _in_query(stack: Stack, customer: Customer) -> httpx.Response:
    """Send a token where it does not belong: in the query."""
    return await stack.rest.get("/api/portal/databases", params={"access_token": customer.token})


async def _stored(stack: Stack) -> str:
    """Return everything that the storage holds, and for SQLite its files as they are."""
    found = []
    async with stack.server.store.session() as session:
        for table in METADATA.tables.values():
            found += [repr((await session.execute(select(table))).all())]
    if stack.server.store.is_sqlite:
        files = await asyncio.to_thread(lambda: [path.read_bytes() for path in stack.settings.data_dir.glob("*.db*")])
        assert len(files) >= 2
        found += [content.decode("latin-1") for content in files]
    return "".join(found)
