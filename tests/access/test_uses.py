"""When, from where and for what a token was used and refused."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from controlplane.access.uses import FLUSH_EVERY
from controlplane.local.postgres import EmbeddedPostgres
from tests.clock import MovableClock
from tests.doors import Door, Rest
from tests.stack import Customer, Stack, eventually

NO_USE = {"last_used_at", "last_used_ip", "last_refused_at"}


async def show(customer: Customer, made: dict[str, Any]) -> dict[str, Any]:
    """Return a token as it is shown once its uses are written."""
    await customer.stack.server.uses.flush()
    shown: dict[str, Any] = (await customer.by_login("GET", f"/api/portal/tokens/{made['id']}")).json()
    return shown


def bearer(made: dict[str, Any]) -> dict[str, str]:
    """Return the header of a token."""
    return {"authorization": f"Bearer {made['token']}"}


async def test_a_use_is_shown(somebody: Customer, stack: Stack, door: Door) -> None:
    """A token shows no use before its first, then when and from where the last was; so does /account/me."""
    made = await somebody.new_token()
    shown = await show(somebody, made)
    assert (NO_USE & set(shown), shown["refused_requests"]) == (set(), 0)
    assert (await door.call("GetMe", **bearer(made))).result["token"]["last_used_at"] is None
    began = stack.clock.now()
    assert (await door.call("ListDatabases", **bearer(made))).code == "ok"
    shown = await show(somebody, made)
    assert began <= datetime.fromisoformat(shown["last_used_at"]) <= stack.clock.now()
    assert (shown["last_used_ip"], shown["refused_requests"]) == ("127.0.0.1", 0)
    assert shown in (await somebody.by_login("GET", "/api/portal/tokens")).json()
    assert (await door.call("GetMe", **bearer(made))).result["token"]["last_used_at"] == shown["last_used_at"]


async def test_a_refusal_is_no_use(somebody: Customer, door: Door) -> None:
    """Requests refused for the address, the permission or the rate are counted, and are no use."""
    elsewhere = await somebody.new_token(allowed_ips=["203.0.113.7"])
    reading = await somebody.new_token(scope="read")
    slow = await somebody.new_token(rate_limit_per_minute=1)
    assert (await door.call("ListDatabases", **bearer(slow))).code == "ok"
    used = (await show(somebody, slow))["last_used_at"]
    for made, rpc, code in (
        (elsewhere, "ListDatabases", "ip_denied"),
        (reading, "DeleteDatabase", "scope_denied"),
        (reading, "ListTokens", "login_required"),
        (slow, "ListDatabases", "rate_limited"),
    ):
        for _ in range(3):
            assert (
                await door.call(rpc, {"name": "a"} if rpc == "DeleteDatabase" else None, **bearer(made))
            ).code == code
    for made, refused in ((elsewhere, 3), (reading, 6), (slow, 3)):
        shown = await show(somebody, made)
        assert (shown["refused_requests"], "last_refused_at" in shown) == (refused, True)
        assert shown.get("last_used_at") == (used if made is slow else None)
        assert shown["used_permissions"] == (["databases:list"] if made is slow else [])


async def test_the_use_of_what_has_ended_is_counted(somebody: Customer, door: Door) -> None:
    """Whoever goes on using a revoked token is counted on it; whoever mistypes one is not."""
    made = await somebody.new_token()
    assert (await somebody.by_login("DELETE", f"/api/portal/tokens/{made['id']}")).status_code == 200
    for _ in range(2):
        assert (await door.call("ListDatabases", **bearer(made))).code == "unauthenticated"
    typo = {"token": made["token"][:-1] + ("0" if made["token"][-1] != "0" else "1")}
    assert (await door.call("ListDatabases", **bearer(typo))).code == "unauthenticated"
    shown = await show(somebody, made)
    assert (shown["refused_requests"], "last_used_at" in shown) == (2, False)


async def test_a_mistake_is_a_use(somebody: Customer, door: Door) -> None:
    """What is let in and then not found, or wrong, was used, and is not counted as refused."""
    made = await somebody.new_token()
    assert (await door.call("GetDatabase", {"name": "nowhere"}, **bearer(made))).code == "not_found"
    assert (await door.call("ListDatabases", {"page_size": -1}, **bearer(made))).code == "invalid_field"
    shown = await show(somebody, made)
    assert (shown["used_permissions"], shown["refused_requests"]) == (["databases:get", "databases:list"], 0)


async def test_many_requests_are_one_write(somebody: Customer, stack: Stack, door: Door) -> None:
    """However many requests there are, their uses are written once in ten seconds, and every refusal is counted."""
    made, lacking = await somebody.new_token(scope="read"), {"name": "a"}
    await stack.server.uses.flush()
    writes: list[Any] = []

    def count(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("INSERT INTO token_uses") and made["id"] in str(parameters):
            writes.append(parameters)

    engine = stack.server.store.engine.sync_engine
    event.listen(engine, "before_cursor_execute", count)
    began = time.monotonic()
    try:
        for _ in range(10):
            asked = (door.call("ListDatabases", **bearer(made)) for _ in range(20))
            refused = (door.call("DeleteDatabase", lacking, **bearer(made)) for _ in range(5))
            await asyncio.gather(*asked, *refused)
        await stack.server.uses.flush()
        await stack.server.uses.flush()
    finally:
        event.remove(engine, "before_cursor_execute", count)
    assert 1 <= len(writes) <= 2 + (time.monotonic() - began) / FLUSH_EVERY
    assert (await show(somebody, made))["refused_requests"] == 50


async def test_no_request_waits_for_uses_to_be_written(stack: Stack, somebody: Customer, door: Door) -> None:
    """While uses cannot be written, requests are answered, and what they use is written afterwards."""
    before, during = await somebody.new_token(), await somebody.new_token()
    assert (await door.call("ListDatabases", **bearer(before))).code == "ok"
    async with _nothing_written(stack):
        writing = asyncio.create_task(stack.server.uses.flush())
        for _ in range(20):
            assert (await door.call("ListDatabases", **bearer(during))).code == "ok"
        assert not writing.done()
    await writing
    for made in (before, during):
        assert "last_used_at" in await show(somebody, made)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)  # a SQLite file does not go down
async def test_a_storage_that_goes_down_costs_some_uses_only(
    timed: tuple[Stack, MovableClock], postgres: EmbeddedPostgres
) -> None:
    """Uses that cannot be written are lost without a trace in later requests, whose uses are written again."""
    stack, _ = timed
    customer = await stack.customer()
    made, door = await customer.new_token(), Rest(stack.rest)
    assert (await door.call("ListDatabases", **bearer(made))).code == "ok"
    admin = await asyncpg.connect(postgres.admin_dsn)
    await admin.execute("ALTER ROLE timed CONNECTION LIMIT 0")
    await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'timed'")
    try:
        with pytest.raises((DBAPIError, OSError, asyncpg.PostgresError)):
            await stack.server.uses.flush()
    finally:
        await admin.execute("ALTER ROLE timed CONNECTION LIMIT -1")
        await admin.close()

    async def works() -> bool:
        return (await door.call("ListPlans", **bearer(made))).code == "ok"

    await eventually(works)
    shown = await show(customer, made)
    assert ("last_used_at" in shown, "catalog:list" in shown["used_permissions"]) == (True, True)


@asynccontextmanager
async def _nothing_written(stack: Stack) -> AsyncIterator[None]:
    """Keep whoever writes uses waiting."""
    async with stack.server.store.session() as session:
        # SQLite has one writer, and so this is it.
        await session.execute(text("SELECT 1" if stack.server.store.is_sqlite else "LOCK TABLE token_uses"))
        yield
