"""What was refused is in the record too: whose credential it was, from where, what for, and how often."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlmodel import col, select, update

from controlplane.audit.model import PROVIDER, AuditEntry
from controlplane.tokens.model import Token
from tests.audit.conftest import Book, Entry, record_of
from tests.doors import RPCS, Answer, Door, Native
from tests.stack import PASSWORD, Customer, Stack, eventually

NEW = {"name": "kept", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}
UNKNOWN = "htx_000000000000000000000000000000WRONG1"


@pytest.fixture
async def owner(stack: Stack) -> AsyncIterator[Customer]:
    """A customer with a database and a plan that is soon full."""
    customer = await stack.customer(plan="small")
    assert (await customer.call("POST", "/api/portal/databases", json=NEW)).status_code == 201
    yield customer
    stack.rest.cookies.clear()


async def of_nobody(stack: Stack, request_id: str) -> list[Any]:
    """Return the entries about a request in the provider's own record."""
    await stack.server.audit.flush()
    mine = col(AuditEntry.account_id) == PROVIDER, col(AuditEntry.request_id) == request_id
    return list(await stack.server.store.fetch(select(AuditEntry).where(*mine)))


async def test_every_refusal_is_told(stack: Stack, owner: Customer, door: Door) -> None:
    """Whatever refuses a token or a login, it is an entry of its account with all that was so."""
    limited = await owner.new_token(name="limited", rate_limit_per_minute=1)
    login_id = (await owner.by_login("GET", "/api/portal/session")).json()["id"]
    elsewhere = await stack.customer()
    reader = await elsewhere.new_token(scope="read", allowed_ips=["127.0.0.1"])
    fenced = await elsewhere.new_token(allowed_ips=["203.0.113.7"])
    page = {"cookie": owner.cookie, "sec_fetch_site": "same-origin"}

    def bearer(made: dict[str, Any]) -> dict[str, str]:
        return {"authorization": f"Bearer {made['token']}"}

    assert (await door.call("ListDatabases", **bearer(limited))).code == "ok"
    tried: list[tuple[Customer, str | None, str, str, dict[str, Any], dict[str, str]]] = [
        (owner, limited["id"], "rate_limited", "ListDatabases", {}, bearer(limited)),
        (owner, login_id, "cross_site", "DeleteToken", {"id": limited["id"]}, {"cookie": owner.cookie}),
        (owner, login_id, "not_found", "DeleteDatabase", {"name": "gone"}, page),
        (owner, login_id, "already_exists", "CreateDatabase", {"database": NEW}, page),
        (owner, login_id, "invalid_field", "CreateDatabase", {"database": {**NEW, "sku": "none"}}, page),
        (owner, login_id, "stale", "DeleteDatabase", {"name": "kept"}, {**page, "if_match": '"0"'}),
        (owner, login_id, "quota_exceeded", "CreateToken", {"token": {"name": "third"}}, page),
        (elsewhere, reader["id"], "scope_denied", "DeleteDatabase", {"name": "gone"}, bearer(reader)),
        (elsewhere, reader["id"], "login_required", "ListTokens", {}, bearer(reader)),
        (elsewhere, fenced["id"], "ip_denied", "ListDatabases", {}, bearer(fenced)),
    ]
    assert (await owner.by_login("POST", "/api/portal/tokens", json={"name": "second"})).status_code == 201
    for customer, credential, code, name, request, headers in tried:
        answer = await door.call(name, request, **headers)
        assert answer.code == code, name
        entry = _one(await record_of(customer), answer)
        assert entry.pop("created_at")
        assert entry.pop("sequence") > 0
        asked = request.get("database") or request.get("token") or request
        about = {"target": asked.get("id"), "target_name": asked.get("name")}
        assert entry == {
            "action": RPCS[name].action,
            "outcome": code,
            "actor": "login" if credential == login_id else "token",
            "credential": credential,
            "ip": "127.0.0.1",
            "request_id": answer.request_id,
            "count": 1,
            **{field: value for field, value in about.items() if value},
        }


async def test_a_credential_that_has_ended_is_named(stack: Stack, customer: Customer, door: Door) -> None:
    """The use of a revoked, of an expired and of a disabled account's token is told where the token belongs."""
    revoked, expired = await customer.new_token(), await customer.new_token()
    await customer.by_login("DELETE", f"/api/portal/tokens/{revoked['id']}")
    async with stack.server.store.session() as session:
        past = stack.clock.now() - timedelta(seconds=1)
        await session.execute(update(Token).where(col(Token.id) == expired["id"]).values(expires_at=past))
        await session.commit()
    for made in (revoked, expired):
        answer = await door.call("ListDatabases", authorization=f"Bearer {made['token']}")
        assert answer.code == "unauthenticated"
        entry = _one(await record_of(customer), answer)
        assert (entry["actor"], entry["credential"], entry["outcome"]) == ("token", made["id"], "unauthenticated")
        assert await of_nobody(stack, answer.request_id) == []


async def test_what_belongs_to_nobody_is_the_providers(stack: Stack, customer: Customer, door: Door) -> None:
    """Requests without a credential, or with one that is unknown or malformed, are in no customer's record."""
    before = await record_of(customer)
    for headers in ({}, {"authorization": f"Bearer {UNKNOWN}"}, {"authorization": "Basic eA=="}, {"cookie": "a=b"}):
        answer = await door.call("DeleteDatabase", {"name": "kept"}, **headers)
        (entry,) = await of_nobody(stack, answer.request_id)
        assert (entry.actor, entry.credential, entry.outcome) == ("anonymous", None, "unauthenticated")
        assert (entry.action, entry.target_name, entry.ip) == ("database.delete", "kept", "127.0.0.1")
    assert await record_of(customer) == before


async def test_a_wrong_password_is_told_to_whose_it_is(stack: Stack, customer: Customer, door: Door) -> None:
    """A failed login shows in the account whose address it was; an unknown address only in the provider's record."""
    wrong = await door.call("CreateSession", {"session": {"email": customer.email, "password": "a wrong one"}})
    entry = _one(await record_of(customer), wrong)
    assert (entry["action"], entry["outcome"], entry["actor"]) == ("session.create", "unauthenticated", "anonymous")
    assert await of_nobody(stack, wrong.request_id) == []
    unknown = await door.call("CreateSession", {"session": {"email": "nobody@example.com", "password": PASSWORD}})
    (entry,) = await of_nobody(stack, unknown.request_id)
    assert (entry.action, entry.outcome, entry.target, entry.target_name) == (
        "session.create",
        "unauthenticated",
        None,
        None,
    )


async def test_what_only_went_wrong_is_not_told(customer: Customer, door: Door) -> None:
    """A read that finds nothing, or whose fields are wrong, is no entry: nobody was refused and nothing changed."""
    before = await record_of(customer)
    headers = {"authorization": f"Bearer {customer.token}"}
    assert (await door.call("GetDatabase", {"name": "gone"}, **headers)).code == "not_found"
    assert (await door.call("ListDatabases", {"page_size": -1}, **headers)).code == "invalid_field"
    assert await record_of(customer) == before


async def test_refusals_are_written_by_themselves(customer: Customer) -> None:
    """Nobody has to ask for a refusal to be written: it is there soon."""
    refused = await customer.call("DELETE", "/api/portal/databases/gone")

    async def told() -> bool:
        entries = (await customer.call("GET", "/api/portal/audit")).json()
        return any(entry["request_id"] == refused.headers["x-request-id"] for entry in entries)

    assert await eventually(told, seconds=10)


async def test_refusals_that_are_alike_share_a_line(book: Book) -> None:
    """Of a batch the alike ones are one line, with how many they were and the first one's time and request."""
    for number in range(30):
        book.refuse(target="twelve" if number < 12 else "eighteen", request_id=f"r-{number}")
        book.clock.advance(1)
    await book.log.flush()
    await book.log.flush()
    rows = await book.store.fetch(select(AuditEntry).order_by(col(AuditEntry.sequence)))
    assert [(row.target_name, row.count, row.request_id) for row in rows] == [
        ("twelve", 12, "r-0"),
        ("eighteen", 18, "r-12"),
    ]
    assert (rows[1].created_at - rows[0].created_at).total_seconds() == 12
    assert (await book.verify()).broken == ()


async def test_a_flood_of_different_refusals_is_bounded(book: Book) -> None:
    """Of what goes beyond a thousand kinds only the number is kept, in one line."""
    for number in range(1500):
        book.refuse(target=f"db-{number}")
    await book.log.flush()
    rows = await book.store.fetch(select(AuditEntry.target_name, AuditEntry.count))
    assert len(rows) == 1001
    assert [tuple(row) for row in rows if row.count > 1] == [(None, 500)]


async def test_what_cannot_be_written_is_written_later(book: Book) -> None:
    """While the storage refuses, refusals are kept and counted on; then they are written, each once."""
    book.refuse(request_id="first")
    await _rename(book, "audit_heads", "aside")
    with pytest.raises(DBAPIError):
        await book.log.flush()
    book.refuse(request_id="second")
    await _rename(book, "aside", "audit_heads")
    await book.log.flush()
    await book.log.flush()
    rows = await book.store.fetch(select(AuditEntry))
    assert [(row.count, row.request_id) for row in rows] == [(2, "first")]


async def test_no_text_of_a_stranger_keeps_a_batch_from_being_written(stack: Stack, native: Native) -> None:
    """A name that no storage takes, or that is huge, is kept as far as it can be."""
    odd = {"a\0b": "a\N{REPLACEMENT CHARACTER}b", "x" * 100_000: "x" * 128}
    for name, kept in odd.items():
        answer = await native.call("DeleteDatabase", {"name": name})
        (entry,) = await of_nobody(stack, answer.request_id)
        assert (answer.code, entry.target_name) == ("unauthenticated", kept)
    broken = await native.send(RPCS["DeleteDatabase"], b"\xff\xff")
    (entry,) = await of_nobody(stack, broken.request_id)
    assert (entry.outcome, entry.target_name) == ("unauthenticated", None)


async def test_a_token_in_the_place_of_an_id_is_not_kept(customer: Customer, door: Door) -> None:
    """Who revokes a token by its secret has not written the secret into the record."""
    login = {"cookie": customer.cookie, "sec_fetch_site": "same-origin"}
    answer = await door.call("DeleteToken", {"id": customer.token}, **login)
    assert answer.code == "not_found"
    assert _one(await record_of(customer), answer)["target"] == f"{customer.token[:8]}…"


def _one(entries: list[Entry], answer: Answer) -> Entry:
    (entry,) = [entry for entry in entries if entry["request_id"] == answer.request_id]
    return entry


async def _rename(book: Book, old: str, new: str) -> None:
    async with book.store.engine.begin() as connection:
        await connection.execute(text(f"ALTER TABLE {old} RENAME TO {new}"))
