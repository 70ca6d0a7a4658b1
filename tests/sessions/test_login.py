"""Browser logins: who gets one, what it may do, how it ends."""

import asyncio
import time
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from controlplane.accounts import admin
from tests.clock import MovableClock
from tests.doors import Door, read_response
from tests.stack import PASSWORD, Customer, Stack

SESSION = "/api/portal/session"


async def log_in(stack: Stack, email: str, password: str = PASSWORD, **headers: str) -> httpx.Response:
    """Try to log in."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await stack.rest.post(SESSION, json={"email": email, "password": password}, headers=named)
    stack.rest.cookies.clear()
    return answer


async def open_account(stack: Stack, email: str) -> None:
    """Open an account whose password takes as long to check as everybody's."""
    server = stack.server
    await admin.create_account(
        server.store, server.catalog, stack.clock, audit=server.audit, email=email, password=PASSWORD
    )


async def test_a_login_sets_a_cookie_that_only_the_browser_sees(stack: Stack, somebody: Customer) -> None:
    """The cookie is bound to this host, to HTTPS and to 12 hours, and no script can read it."""
    answer = await log_in(stack, f"  {somebody.email.upper()} ")
    assert answer.status_code == 200
    name_and_value, *attributes = answer.headers["set-cookie"].split("; ")
    assert name_and_value.startswith("__Host-htx_session=")
    assert set(attributes) == {"Max-Age=43200", "Path=/", "Secure", "HttpOnly", "SameSite=Lax"}
    assert name_and_value.partition("=")[2] not in answer.text
    shown = answer.json()
    times = {"created_at", "expires_at", "idle_expires_at", "last_used_at"}
    assert set(shown) == {"id", "email", "current", "user_agent", "last_used_ip", *times}
    assert (shown["email"], shown["current"], shown["last_used_ip"]) == (somebody.email, True, "127.0.0.1")
    who = await stack.rest.get(SESSION, headers={"cookie": name_and_value})
    assert who.json() == shown


async def test_nothing_tells_an_unknown_address_from_a_wrong_password(stack: Stack) -> None:
    """Both are refused in the same bytes and with the same work."""
    known = "known@example.com"
    await open_account(stack, known)

    async def refused(email: str) -> tuple[str, list[str], float]:
        began = time.process_time()
        answer = await log_in(stack, email, "the wrong password")
        spent = time.process_time() - began
        error = read_response(answer)
        assert error.code == "unauthenticated"
        return answer.text.replace(error.request_id, ""), sorted(answer.headers), spent

    unknown = [await refused("nobody@example.com") for _ in range(3)]
    wrong = [await refused(known) for _ in range(3)]
    assert len({(text, str(headers)) for text, headers, _ in unknown + wrong}) == 1
    fastest = [min(spent for _, _, spent in each) for each in (unknown, wrong)]
    assert min(fastest) > 0.02
    assert max(fastest) < 2.5 * min(fastest)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, ["email", "password"]),
        ({"email": "", "password": ""}, ["email", "password"]),
        ({"email": "a@example.com", "password": "x" * 1025}, ["password"]),
        ({"email": "a" * 250 + "@example.com", "password": "x"}, ["email"]),
    ],
)
async def test_a_login_that_cannot_be(stack: Stack, body: dict[str, str], fields: list[str]) -> None:
    """What is missing or too long is refused before any work is done."""
    answer = read_response(await stack.rest.post(SESSION, json=body))
    assert (answer.code, list(answer.fields)) == ("invalid_field", fields)


async def test_a_logout_holds_at_once(customer: Customer, door: Door) -> None:
    """The cookie is refused once the answer to the logout is there, and the browser is told to forget it."""
    other = await log_in(customer.stack, customer.email)
    mine = {"cookie": customer.cookie, "sec_fetch_site": "same-origin"}
    assert (await door.call("GetSession", None, **mine)).result["email"] == customer.email
    out = await door.call("DeleteSession", None, **mine)
    assert out.code == "ok"
    assert out.headers["set-cookie"].startswith("__Host-htx_session=; Max-Age=0; ")
    for rpc in ("GetSession", "ListDatabases", "DeleteSession"):
        assert (await door.call(rpc, None, **mine)).code == "unauthenticated"
    still = await door.call("GetSession", None, cookie=other.headers["set-cookie"].partition(";")[0])
    assert still.code == "ok"
    assert (await customer.call("GET", "/api/portal/account")).status_code == 200


async def test_a_login_ends_after_twelve_hours(timed: tuple[Stack, MovableClock]) -> None:
    """A cookie is refused from the moment that the login's end has come, however much it was used."""
    stack, clock = timed
    customer = await stack.customer()
    for _ in range(11):
        clock.let_pass(hours=1)
        assert (await customer.by_login("GET", SESSION)).status_code == 200
        await stack.server.uses.flush()
    clock.let_pass(minutes=59)
    shown = (await customer.by_login("GET", SESSION)).json()
    assert shown["idle_expires_at"] == shown["expires_at"]
    clock.let_pass(minutes=1)
    for path in (SESSION, "/api/portal/databases"):
        assert (await customer.by_login("GET", path)).status_code == 401
    await customer.log_in()
    shown = (await customer.by_login("GET", SESSION)).json()
    ends = clock.now() + timedelta(hours=12)
    assert shown["expires_at"][:13] == ends.isoformat()[:13]


async def test_a_login_that_nobody_uses_ends_after_two_hours(timed: tuple[Stack, MovableClock]) -> None:
    """Each use puts the end off, and is shown with its address; two hours without one are the end."""
    stack, clock = timed
    customer = await stack.customer()
    for _ in range(2):
        clock.let_pass(hours=1, minutes=59)
        assert (await customer.by_login("GET", SESSION)).status_code == 200
        await stack.server.uses.flush()
    used, now = (await customer.by_login("GET", SESSION)).json(), clock.now()
    assert now - timedelta(minutes=1) < datetime.fromisoformat(used["last_used_at"]) <= now
    idle = datetime.fromisoformat(used["idle_expires_at"]) - datetime.fromisoformat(used["last_used_at"])
    assert (idle, used["last_used_ip"]) == (timedelta(hours=2), "127.0.0.1")
    await stack.server.uses.flush()
    clock.let_pass(hours=2)
    for path in (SESSION, "/api/portal/databases"):
        assert (await customer.by_login("GET", path)).status_code == 401


async def test_a_disabled_account_is_refused_at_once(stack: Stack, door: Door) -> None:
    """Its token, its cookie and its password stop working while others' go on."""
    customer, other = await stack.customer(), await stack.customer()
    token, cookie = f"Bearer {customer.token}", customer.cookie
    assert (await door.call("ListDatabases", authorization=token)).code == "ok"
    server = stack.server
    await admin.disable(server.store, stack.clock, audit=server.audit, email=customer.email)
    assert (await door.call("ListDatabases", authorization=token)).code == "unauthenticated"
    assert (await door.call("ListDatabases", cookie=cookie)).code == "unauthenticated"
    credentials = {"session": {"email": customer.email, "password": PASSWORD}}
    assert (await door.call("CreateSession", credentials)).code == "unauthenticated"
    assert (await door.call("ListDatabases", authorization=f"Bearer {other.token}")).code == "ok"


WRITES: dict[str, dict[str, Any]] = {
    "DeleteToken": {"id": "tk_none"},
    "CreateDatabase": {"database": {"name": "a", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}},
    "UpdateDatabase": {"name": "a", "database": {}},
    "DeleteDatabase": {"name": "a"},
    "CreateToken": {"token": {"name": "a"}},
    "DeleteSession": {},
}


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "none"},
        {"sec_fetch_site": ""},
        {"sec_fetch_site": "cross-site", "origin": "http://127.0.0.1"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "https://evil.example", "x_htx_host": "evil.example"},
        {"origin": "https://evil.example", "x_forwarded_host": "evil.example"},
        {"referer": "http://127.0.0.1/"},
    ],
)
async def test_a_write_by_cookie_comes_from_our_own_page(customer: Customer, door: Door, sent: dict[str, str]) -> None:
    """A cookie that comes along from another page, or from nobody knows where, writes nothing; it may read."""
    host = {} if "host" not in sent or door.name == "native" else {"host": sent["host"]}
    headers = {name: value for name, value in sent.items() if name != "host"} | host
    if host:
        pytest.skip("a page cannot choose the Host header, and whoever can has no need of a page")
    for rpc, request in WRITES.items():
        answer = await door.call(rpc, request, cookie=customer.cookie, **headers)
        assert answer.code == "cross_site", rpc
    assert (await door.call("ListTokens", None, cookie=customer.cookie, **headers)).code == "ok"
    assert (await door.call("ListDatabases", None, cookie=customer.cookie)).result == []


async def test_our_own_page_writes(stack: Stack, somebody: Customer) -> None:
    """A browser that says `same-origin`, or an older one whose Origin is this host, writes."""
    name = {"name": "mine"}
    said = await somebody.by_login("POST", "/api/portal/tokens", json=name)
    assert said.status_code == 201
    headers = {"cookie": somebody.cookie, "origin": f"http://127.0.0.1:{stack.settings.http_port}"}
    older = await stack.rest.post("/api/portal/tokens", json=name, headers=headers)
    assert older.status_code == 201, older.text


async def test_a_login_from_another_page_is_refused(stack: Stack, somebody: Customer) -> None:
    """Another page cannot log its visitor into an account of its own choice; a program without a page can log in."""
    for headers in ({"sec_fetch_site": "cross-site"}, {"origin": "https://evil.example"}):
        answer = await log_in(stack, somebody.email, **headers)
        assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
        assert read_response(answer).code == "cross_site"
    assert (await log_in(stack, somebody.email, sec_fetch_site="same-origin")).status_code == 200


async def test_a_token_needs_no_page(customer: Customer, door: Door) -> None:
    """A bearer token writes from anywhere, also where a cookie comes along: no page can send one by itself."""
    new = {"database": {"name": "by-token", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}}
    headers = {"authorization": f"Bearer {customer.token}", "cookie": customer.cookie, "sec_fetch_site": "cross-site"}
    assert (await door.call("CreateDatabase", new, **headers)).code == "ok"


async def test_many_logins_at_once_do_not_stop_the_others(stack: Stack, somebody: Customer) -> None:
    """While passwords are checked, requests of tokens are answered."""
    email = "busy@example.com"
    await open_account(stack, email)
    logins = [asyncio.create_task(log_in(stack, email)) for _ in range(4)]
    answered = 0
    while not all(login.done() for login in logins):
        assert (await somebody.call("GET", "/api/portal/databases")).status_code == 200
        answered += 1
    assert {(await login).status_code for login in logins} == {200}
    assert answered >= 4
