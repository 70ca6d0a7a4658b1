"""The way of a person from the portal to the provider's own login and back, through the real door."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from controlplane.accounts import admin
from controlplane.clock import SystemClock
from tests.doors import read_response
from tests.sessions.issuer import CLIENT_ID, SmallIssuer, running
from tests.stack import Stack

SESSION = "/api/portal/session"


class Portal:
    """A whole control plane with a login at an issuer, and the browser between them."""

    def __init__(self, stack: Stack, issuer: SmallIssuer) -> None:
        self.stack = stack
        self.issuer = issuer

    async def begin(self, return_to: str = "/") -> tuple[str, str]:
        """Follow the redirects to the issuer and back; return the callback's path and query, and the cookie for it."""
        begun = await self.stack.rest.get(f"{SESSION}/oidc", params={"return_to": return_to})
        assert begun.status_code == 303, begun.text
        async with httpx.AsyncClient() as browser:
            there = await browser.get(begun.headers["location"])
        assert there.status_code == 302, there.text
        callback = there.headers["location"].removeprefix("https://portal.example")
        return callback, self._cookie_of(begun, "__Host-htx_oidc")

    async def finish(self, callback: str, cookie: str | None) -> httpx.Response:
        """Come back, as a browser does that another site sends."""
        headers = {"sec-fetch-site": "cross-site"} | ({"cookie": cookie} if cookie else {})
        answer = await self.stack.rest.get(callback, headers=headers)
        self.stack.rest.cookies.clear()
        return answer

    async def log_in(self, return_to: str = "/") -> httpx.Response:
        """Go there and come back."""
        return await self.finish(*await self.begin(return_to))

    async def who_is(self, answer: httpx.Response) -> str:
        """Return the address of who is logged in with an answer's cookie."""
        assert answer.status_code == 303, answer.text
        cookie = self._cookie_of(answer, "__Host-htx_session")
        shown = await self.stack.rest.get(SESSION, headers={"cookie": cookie})
        email: str = shown.json()["email"]
        return email

    def _cookie_of(self, answer: httpx.Response, name: str) -> str:
        self.stack.rest.cookies.clear()
        cookies = [each for each in answer.headers.get_list("set-cookie") if each.startswith(f"{name}=")]
        assert len(cookies) == 1
        assert {"Path=/", "Secure", "HttpOnly", "SameSite=Lax"} <= set(cookies[0].split("; "))
        return cookies[0].partition(";")[0]


@pytest.fixture(scope="module")
async def portal(folder: Path, database_url: str, catalog: Path) -> AsyncIterator[Portal]:
    """A portal whose issuer is that of the module's tests, each of which has a person of its own."""
    clock = SystemClock()
    with running(clock) as issuer:
        settings = {
            "oidc_issuer": issuer.url,
            "oidc_client_id": CLIENT_ID,
            "oidc_client_secret": issuer.client_secret,
            "public_url": "https://portal.example/",
        }
        own = folder / f"oidc-{'pg' if database_url else 'lite'}"
        async with Stack(own, database_url=database_url, catalog=catalog, clock=clock, **settings) as stack:
            yield Portal(stack, issuer)


@pytest.fixture
async def person(portal: Portal) -> str:
    """A customer who is known to the issuer too, by this address."""
    customer = await portal.stack.customer()
    portal.issuer.person = {"sub": secrets.token_hex(), "email": customer.email.upper(), "email_verified": True}
    return customer.email


async def test_a_person_with_an_account_is_let_in(portal: Portal, person: str) -> None:
    """The way goes from the portal to the issuer and back to where it began, and ends with a session."""
    answer = await portal.log_in("/databases/ü?new=1%2F")
    assert answer.headers["location"] == "/databases/%C3%BC?new=1%2F"
    forgotten = [each for each in answer.headers.get_list("set-cookie") if each.startswith("__Host-htx_oidc=;")]
    assert "Max-Age=0" in forgotten[0]
    assert await portal.who_is(answer) == person


async def test_a_person_stays_who_he_was(portal: Portal, person: str) -> None:
    """After the first login it is the issuer's subject that counts, and no other gets the account by its address."""
    first = dict(portal.issuer.person)
    await portal.log_in()
    portal.issuer.person = {**first, "email": "new@example.com", "email_verified": False}
    assert await portal.who_is(await portal.log_in()) == person
    portal.issuer.person = {**first, "sub": "another"}
    assert (await portal.log_in()).status_code == 401


@pytest.mark.parametrize("changed", [{"email": "nobody@example.com"}, {"email_verified": False}])
async def test_a_person_without_an_account_is_refused(portal: Portal, person: str, changed: dict[str, Any]) -> None:
    """Only an address that the issuer has verified opens an account, and only one that is there."""
    assert person
    portal.issuer.person |= changed
    refused = read_response(await portal.log_in())
    assert (refused.code, "no account" in refused.sentence) == ("unauthenticated", True)


async def test_an_answer_of_the_issuer_counts_once_and_in_one_browser(portal: Portal, person: str) -> None:
    """Without the cookie of its beginning it is refused, then it works, then never again; no log has the code."""
    callback, cookie = await portal.begin()
    assert read_response(await portal.finish(callback, None)).code == "unauthenticated"
    assert await portal.who_is(await portal.finish(callback, cookie)) == person
    again = await portal.finish(callback, cookie)
    assert (read_response(again).code, "set-cookie" in again.headers) == ("unauthenticated", False)
    log = await portal.stack.logged(again.headers["x-request-id"])
    assert parse_qs(urlsplit(callback).query)["code"][0] not in log


@pytest.mark.parametrize(
    "return_to", ["//evil.example", "/\\evil.example", "/\t/evil.example", "https://evil.example", "evil", "/\r\nx: y"]
)
async def test_the_way_back_must_be_here(portal: Portal, return_to: str) -> None:
    """A link that would lead elsewhere after the login is refused before it; browsers take tabs out of addresses."""
    answer = await portal.stack.rest.get(f"{SESSION}/oidc", params={"return_to": return_to})
    assert read_response(answer).code == "invalid_field"


async def test_a_refusal_there_is_a_refusal_here(portal: Portal, person: str) -> None:
    """What the issuer refuses is a 401 that says so; an issuer that fails is a 503."""
    assert person
    for refusal, code in (("access_denied", "unauthenticated"), ("server_error", "unavailable")):
        portal.issuer.refusal = refusal
        answer = await portal.log_in()
        portal.issuer.refusal = ""
        assert read_response(answer).code == code


async def test_a_person_who_comes_twice_at_once_is_one(portal: Portal, person: str) -> None:
    """First logins in parallel get the same account, and each its own session."""
    begun = [await portal.begin() for _ in range(3)]
    answers = await asyncio.gather(*(portal.finish(*each) for each in begun))
    assert [await portal.who_is(answer) for answer in answers] == [person] * 3


@pytest.mark.parametrize("times", [0, 1])
async def test_a_disabled_account_lets_nobody_in(portal: Portal, person: str, times: int) -> None:
    """Whoever has a disabled account is refused as one who has none, whether he was here before or not."""
    for _ in range(times):
        assert (await portal.log_in()).status_code == 303
    server = portal.stack.server
    await admin.disable(server.store, portal.stack.clock, audit=server.audit, email=person)
    refused = read_response(await portal.log_in())
    assert (refused.code, "no account" in refused.sentence) == ("unauthenticated", True)
