"""An issuer that is in trouble, broken, slow or gone, or that we cannot trust: no login there, and no harm here."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from controlplane.errors import Unavailable
from controlplane.sessions import issuer as issuer_module
from controlplane.sessions.oidc import OidcLogin
from tests.clock import ManualClock
from tests.sessions.issuer import CALLBACK, Reply, SmallIssuer
from tests.sessions.oidc import DISCOVERY, JWKS, KEYS, come_back, log_in, new_login


@pytest.mark.parametrize("trouble", ["server_error", "temporarily_unavailable"])
async def test_an_issuer_in_trouble_is_unavailable(login: OidcLogin, issuer: SmallIssuer, trouble: str) -> None:
    """Where the issuer says that the fault is its own, the same login may be tried again."""
    issuer.refusal = trouble
    with pytest.raises(Unavailable):
        await log_in(login, issuer)


def _drip() -> Iterator[bytes]:
    while True:
        yield b" "
        threading.Event().wait(0.01)


BROKEN: dict[str, Reply] = {
    "answered 500": Reply(500),
    "answered 302": Reply(302, location="/elsewhere"),
    "Invalid JSON": Reply(body=lambda: iter((b"<html>",))),
    "should be an object": Reply(body=lambda: iter((b"[]",))),
    "Field required": Reply(),
    "more than 262144 bytes": Reply(body=lambda: iter((b" " * 1024,) * 257)),
    "recursion limit": Reply(body=lambda: iter((b"[" * 200_000,))),
}


@pytest.mark.parametrize("path", [DISCOVERY, JWKS, "/token", "/userinfo"])
@pytest.mark.parametrize("broken", BROKEN)
async def test_a_broken_issuer_is_unavailable(login: OidcLogin, issuer: SmallIssuer, path: str, broken: str) -> None:
    """Whatever it answers, it is asked nothing further, the caller may retry, and the cause says what was wrong."""
    issuer.claims = {"email": None}
    issuer.replies[path] = BROKEN[broken]
    with pytest.raises(Unavailable) as caught:
        await log_in(login, issuer)
    why = str(caught.value.__cause__)
    assert (path in why, broken in why, issuer.asked[-1]) == (True, True, path)
    del issuer.replies[path]
    assert (await log_in(login, issuer)).email == "jane@example.com"


@pytest.mark.parametrize("access_token", ["top\nsecret", "top sëcret"])
async def test_an_access_token_must_fit_into_a_header(login: OidcLogin, issuer: SmallIssuer, access_token: str) -> None:
    """One that does not is the issuer's fault, and is not shown."""
    body = json.dumps({"id_token": "x", "access_token": access_token}).encode()
    issuer.replies["/token"] = Reply(body=lambda: iter((body,)))
    with pytest.raises(Unavailable) as caught:
        await log_in(login, issuer)
    why = str(caught.value.__cause__)
    assert ("access_token: String should match" in why, "top" in why) == (True, False)


@pytest.mark.parametrize("path", [DISCOVERY, JWKS, "/token", "/userinfo"])
async def test_a_slow_issuer_is_unavailable(
    login: OidcLogin, issuer: SmallIssuer, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer has to be there as a whole in its time, also when it never stops coming."""
    issuer.claims = {"email": None}
    begun = await login.begin("/") if path in ("/token", "/userinfo") else None
    monkeypatch.setattr(issuer_module, "_TIMEOUT", 0.3)
    issuer.replies[path] = Reply(body=_drip)
    async with asyncio.timeout(4):
        with pytest.raises(Unavailable):
            await (come_back(login, begun, issuer.log_in(begun.location)) if begun else log_in(login, issuer))


async def test_an_issuer_that_is_gone_is_unavailable(issuer: SmallIssuer, clock: ManualClock) -> None:
    """A login can neither begin nor end without it."""
    login, other = new_login(issuer, clock), new_login(issuer, clock)
    begun = await login.begin("/")
    back = issuer.log_in(begun.location)
    issuer.stop()
    for trying in (other.begin("/"), come_back(login, begun, back)):
        with pytest.raises(Unavailable) as caught:
            await trying
        assert "cannot be asked" in str(caught.value.__cause__)
    await login.close()
    await other.close()


@pytest.mark.parametrize(
    "document",
    [
        {"issuer": "https://another.example"},
        {"token_endpoint": "http://portal.example/token"},
        {"jwks_uri": "ftp://127.0.0.1/jwks"},
        {"authorization_endpoint": "javascript:alert(1)"},
        {"authorization_endpoint": None},
        {"id_token_signing_alg_values_supported": ["HS256", "none"]},
    ],
)
async def test_an_issuer_that_we_cannot_trust_is_not_used(
    login: OidcLogin, issuer: SmallIssuer, document: dict[str, Any]
) -> None:
    """It must name itself as we do, be reached by https or on loopback, and sign with a private key."""
    issuer.document = document
    with pytest.raises(Unavailable):
        await login.begin("/")


@pytest.mark.parametrize(
    "url", ["http://id.example", "https://", "id.example", "", "http://127.0.0.1.example", "http://["]
)
def test_an_issuer_must_be_safe_to_reach(clock: ManualClock, url: str) -> None:
    """An address where others could read along is refused at the start."""
    with pytest.raises(ValueError, match=r"https|IPv6"):
        OidcLogin(issuer=url, client_id="x", client_secret="y", redirect_uri=CALLBACK, keys=KEYS, clock=clock)
