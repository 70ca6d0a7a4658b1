"""Every row of the error table, through Envoy and by native gRPC; `tests/doors.py` inspects the form of each."""

import asyncio
import operator
import re
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from typing import Any

import asyncpg
import pytest
import structlog
from sqlalchemy import make_url

from controlplane.local.postgres import EmbeddedPostgres
from tests.clock import MovableClock
from tests.doors import Answer, Door, Native, Rest, read_response
from tests.stack import Customer, Stack

DATABASE = {"name": "new", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}
Headers = dict[str, str]


@pytest.fixture(scope="module")
async def callers(stack: Stack) -> dict[str, Headers]:
    """What each kind of caller sends: a customer with three databases, which is all that its plan allows."""
    customer, fast = await stack.customer(plan="small"), await stack.customer()
    for name in ("taken", "second"):
        await customer.call("POST", "/api/portal/databases", json={**DATABASE, "name": name})
    kept = {**DATABASE, "name": "kept", "deletion_protection": True}
    await customer.call("POST", "/api/portal/databases", json=kept, headers={"idempotency-key": "used"})
    reading = await customer.new_token(scope="read")
    elsewhere = await customer.new_token(allowed_ips=["203.0.113.7"])
    once = await fast.new_token(rate_limit_per_minute=1)
    await fast.call("GET", "/api/portal/account", token=once["token"])
    full = bearer(customer.token)
    return {
        "full": full,
        "stale": {**full, "if-match": '"db_old.1"'},
        "repeating": {**full, "idempotency-key": "used"},
        "reading": bearer(reading["token"]),
        "elsewhere": bearer(elsewhere["token"]),
        "too fast": bearer(once["token"]),
        "cross-site": {"cookie": customer.cookie, "sec-fetch-site": "cross-site"},
        "nobody": {},
    }


def bearer(token: str) -> Headers:
    """Return the header of a token."""
    return {"authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    "row",
    [
        ("invalid_field", "full", "CreateDatabase", {"database": {**DATABASE, "name": "Bad"}}, "name: "),
        ("unauthenticated", "nobody", "ListDatabases", {}, "Bearer htx_"),
        ("quota_exceeded", "full", "CreateDatabase", {"database": DATABASE}, "3 of 3 databases"),
        ("scope_denied", "reading", "CreateDatabase", {"database": DATABASE}, r"databases:create.*'read'"),
        ("ip_denied", "elsewhere", "ListDatabases", {}, r"127\.0\.0\.1"),
        ("login_required", "full", "ListTokens", {}, "log in at /api/portal/session"),
        ("cross_site", "cross-site", "DeleteDatabase", {"name": "taken"}, "Origin"),
        ("not_found", "full", "GetDatabase", {"name": "nowhere"}, "'nowhere'"),
        ("already_exists", "full", "CreateDatabase", {"database": {**DATABASE, "name": "taken"}}, "'taken'"),
        ("conflict", "full", "DeleteDatabase", {"name": "kept"}, "deletion_protection"),
        ("stale", "stale", "DeleteDatabase", {"name": "taken"}, r'"db_\w+\.1"'),
        ("too_large", "full", "CreateDatabase", {"database": {**DATABASE, "name": "a" * 70_000}}, "65536 bytes"),
        ("idempotency_mismatch", "repeating", "CreateDatabase", {"database": DATABASE}, "Idempotency-Key"),
        ("rate_limited", "too fast", "ListDatabases", {}, "1 requests in 60 seconds"),
    ],
    ids=operator.itemgetter(0),
)
async def test_each_row_of_the_error_table(
    row: tuple[str, str, str, dict[str, Any], str], callers: dict[str, Headers], door: Door
) -> None:
    """Each refusal has its status, its code, its sentence and its details, at both doors."""
    code, caller, rpc, request, words = row
    answer = await door.call(rpc, request, **callers[caller])
    assert answer.code == code
    assert re.search(words, answer.sentence), answer.sentence


async def test_a_broken_rule_names_each_field(callers: dict[str, Headers], door: Door) -> None:
    """All the fields that break a rule are named, each with the path that the caller wrote."""
    body = {"name": "Bad", "engine": "oracle", "sku": "x" * 65, "tags": {"-": "v"}}
    answer = await door.call("CreateDatabase", {"database": body}, **callers["full"])
    prefix = "" if isinstance(door, Rest) else "database."
    assert set(answer.fields) == {f"{prefix}{name}" for name in ("name", "engine", "sku", "tags.-")}


async def test_a_scope_refusal_names_what_is_needed_and_what_is_held(
    callers: dict[str, Headers], native: Native
) -> None:
    """A native caller gets both as metadata of the ErrorInfo."""
    answer = await native.call("DeleteDatabase", {"name": "taken"}, **callers["reading"])
    info = answer.details["ErrorInfo"]
    assert (info.metadata["needed"], info.metadata["scope"]) == ("databases:delete", "read")


async def test_a_quota_refusal_names_the_quota(callers: dict[str, Headers], native: Native) -> None:
    """A native caller gets the kind as the subject of the QuotaFailure."""
    answer = await native.call("CreateDatabase", {"database": DATABASE}, **callers["full"])
    assert [violation.subject for violation in answer.details["QuotaFailure"].violations] == ["databases"]


async def test_a_rate_refusal_says_when_to_come_again(callers: dict[str, Headers], door: Door) -> None:
    """Retry-After is at least a second and at most the window, and the limit is told beside it."""
    answer = await door.call("ListDatabases", **callers["too fast"])
    seconds = int(answer.headers["retry-after"])
    assert 1 <= seconds <= 60
    limits = {name: answer.headers[f"ratelimit-{name}"] for name in ("limit", "remaining", "reset")}
    assert limits == {"limit": "1", "remaining": "0", "reset": str(seconds)}
    if isinstance(door, Native):
        assert answer.details["RetryInfo"].retry_delay.seconds == seconds


async def test_every_answer_to_a_token_tells_its_rate(somebody: Customer, door: Door) -> None:
    """Successes and refusals carry the limit and what is left of it; a login has none to tell."""
    ok = await door.call("ListDatabases", **bearer(somebody.token))
    refused = await door.call("GetDatabase", {"name": "nowhere"}, **bearer(somebody.token))
    assert ok.headers["ratelimit-limit"] == refused.headers["ratelimit-limit"] == "1000000"
    assert int(refused.headers["ratelimit-remaining"]) == int(ok.headers["ratelimit-remaining"]) - 1
    by_login = await door.call("ListDatabases", cookie=somebody.cookie)
    assert (by_login.code, "ratelimit-limit" in by_login.headers) == ("ok", False)


async def test_one_sentence_for_every_credential_that_does_not_hold(stack: Stack, door: Door) -> None:
    """None, malformed, mistyped, unknown, rotated and revoked credentials are told apart by nothing."""
    customer = await stack.customer()
    old, revoked = await customer.new_token(), await customer.new_token()
    assert (await customer.by_login("POST", f"/api/portal/tokens/{old['id']}/rotate")).status_code == 200
    assert (await customer.by_login("DELETE", f"/api/portal/tokens/{revoked['id']}")).status_code == 200
    secret = customer.token
    tries: list[Mapping[str, str]] = [
        {},
        {"authorization": ""},
        {"authorization": secret},
        {"authorization": f"Basic {secret}"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer htx_"},
        {"authorization": f"Bearer {secret[:-1]}"},
        {"authorization": f"Bearer {secret}x"},
        {"authorization": f"Bearer {secret} {secret}"},
        {"authorization": f"Bearer {secret.swapcase()}"},
        {"authorization": "Bearer htx_00000000000000000000000000000003D3aLc"},
        {"authorization": f"Bearer {old['token']}"},
        {"authorization": f"Bearer {revoked['token']}"},
        {"cookie": "__Host-htx_session="},
        {"cookie": "__Host-htx_session=unknown"},
        {"cookie": f"other={customer.cookie.partition('=')[2]}"},
        # A token that does not hold is not mended by a cookie that does.
        {"cookie": customer.cookie, "authorization": "Bearer htx_wrong"},
    ]
    answers = [await door.call("ListDatabases", **each) for each in tries]
    assert {(answer.code, answer.sentence) for answer in answers} == {("unauthenticated", answers[0].sentence)}
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}


async def test_another_accounts_resource_looks_like_none(stack: Stack, door: Door) -> None:
    """What belongs to another account is answered in the same bytes as what does not exist, to every RPC."""
    owner, stranger = await stack.customer(), await stack.customer()
    asks: list[tuple[str, dict[str, Any]]] = [
        ("GetDatabase", {}),
        ("UpdateDatabase", {"database": {"deletion_protection": True}}),
        ("DeleteDatabase", {}),
        ("GetDatabaseConnection", {}),
        ("ListBackups", {}),
        ("CreateBackup", {}),
        ("GetBackup", {"id": "bk_1"}),
        ("DeleteBackup", {"id": "bk_1"}),
        ("RestoreBackup", {"id": "bk_1", "database": {"name": "copy"}}),
        ("RotateDatabasePassword", {}),
        ("StopDatabase", {}),
        ("StartDatabase", {}),
        ("RetryDatabase", {}),
        ("UndeleteDatabase", {}),
    ]

    async def ask() -> list[tuple[str, str]]:
        answers = [await door.call(rpc, {"name": "mine", **more}, **bearer(stranger.token)) for rpc, more in asks]
        return [(answer.code, answer.sentence) for answer in answers]

    before = await ask()
    assert {code for code, _ in before} == {"not_found"}
    await owner.create_database("mine")
    assert await ask() == before
    token, login = await owner.new_token(), {"cookie": stranger.cookie, "sec-fetch-site": "same-origin"}
    for rpc in ("GetToken", "RotateToken", "DeleteToken"):
        theirs = await door.call(rpc, {"id": token["id"]}, **login)
        none = await door.call(rpc, {"id": "tk_none"}, **login)
        assert (theirs.code, none.code) == ("not_found", "not_found")
        assert theirs.sentence.replace(token["id"], "tk_none") == none.sentence
    assert (await owner.call("GET", "/api/portal/account", token=token["token"])).status_code == 200


async def test_what_only_the_edge_refuses(stack: Stack, somebody: Customer) -> None:
    """Bad JSON, an unknown path or method and another content type are refused in the same form."""
    path, headers = "/api/portal/databases", bearer(somebody.token)
    json = {**headers, "content-type": "application/json"}

    async def refused(method: str, where: str, **more: Any) -> Answer:
        return read_response(await stack.rest.request(method, where, **more))

    assert (await refused("POST", path, content=b'{"name":', headers=json)).code == "invalid_request"
    assert (await refused("GET", "/api/portal/nothing", headers=headers)).code == "not_found"
    other = await refused("PUT", path, headers=headers)
    assert (other.code, other.headers["allow"]) == ("method_not_allowed", "GET, POST")
    form = await refused("POST", path, content=b"name=a", headers={**headers, "content-type": "text/plain"})
    assert form.code == "unsupported_media_type"


async def test_the_request_id_is_ours(stack: Stack, somebody: Customer, door: Door) -> None:
    """Every answer has a request id of its own, whatever the client sent as one."""
    sent = {**bearer(somebody.token), "x-request-id": "mine"}
    answers = [await door.call("GetDatabase", {"name": "nowhere"}, **sent) for _ in range(2)]
    assert len({"mine", *(answer.request_id for answer in answers)}) == 3
    if isinstance(door, Rest):
        assert await stack.logged(answers[0].request_id)


async def test_a_storage_that_does_not_answer_in_time_is_504(timed: tuple[Stack, MovableClock]) -> None:
    """A write that waits for the storage longer than the edge does is answered with a timeout, and reads go on."""
    stack, _ = timed
    customer = await stack.customer()
    new = {"database": {**DATABASE, "name": "waits"}}
    async with _held(stack):
        assert (await Rest(stack.rest).call("CreateDatabase", new, **bearer(customer.token))).code == "timeout"
    await asyncio.sleep(0.1)  # the write goes on by itself: it is whole, or not at all
    assert (await customer.call("GET", "/api/portal/account")).status_code == 200


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)  # a SQLite file does not go down
async def test_a_storage_that_is_down_is_503(timed: tuple[Stack, MovableClock], postgres: EmbeddedPostgres) -> None:
    """While the storage is down, both doors say to retry; once it is back, they answer as before."""
    stack, _ = timed
    customer = await stack.customer()
    admin = await asyncpg.connect(postgres.admin_dsn)
    await admin.execute("ALTER ROLE timed CONNECTION LIMIT 0")
    await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'timed'")
    try:
        with structlog.testing.capture_logs():  # to print what fails meanwhile with all its variables takes seconds
            for door in (Native(stack.channel), Rest(stack.rest)):
                answer = await door.call("ListDatabases", **bearer(customer.token))
                assert (answer.code, answer.headers["retry-after"]) == ("unavailable", "1")
    finally:
        await admin.execute("ALTER ROLE timed CONNECTION LIMIT -1")
        await admin.close()
    async with asyncio.timeout(10):
        while (await customer.call("GET", "/api/portal/databases")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


@asynccontextmanager
async def _held(stack: Stack) -> AsyncIterator[None]:
    """Keep every write waiting."""
    url = make_url(stack.settings.storage_url)
    if stack.server.store.is_sqlite:
        with closing(sqlite3.connect(str(url.database), isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
    else:
        connection = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(False))
        await connection.execute("BEGIN; LOCK TABLE databases")
        yield
        await connection.close()
