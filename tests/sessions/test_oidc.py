"""The provider's own login, at a real issuer: who comes back is known, and what belongs to no login is refused."""

import base64
import logging
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from joserfc.jwk import ECKey, OKPKey, RSAKey

from controlplane.errors import BadLogin, PortalError
from controlplane.sessions.oidc import Identity, OidcLogin
from tests.clock import ManualClock
from tests.sessions.issuer import CALLBACK, Reply, SmallIssuer
from tests.sessions.oidc import DISCOVERY, JWKS, KEYS, come_back, log_in, new_login, refusal


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (ECKey.generate_key("P-256", {"kid": "one"}), "ES256"),
        (RSAKey.generate_key(2048, {"kid": "one", "use": "sig"}), "RS256"),
        (RSAKey.generate_key(2048, {"kid": "one", "alg": "PS256"}), "PS256"),
        (OKPKey.generate_key("Ed25519", {"kid": "one"}), "Ed25519"),
        (OKPKey.generate_key("Ed25519", {"kid": "one"}), "EdDSA"),
        (ECKey.generate_key("P-256"), "ES256"),
    ],
)
async def test_who_comes_back_is_known(login: OidcLogin, issuer: SmallIssuer, key: Any, algorithm: str) -> None:
    """A login ends with the issuer, its subject, the address and the way back, whatever kind of key it signs with."""
    issuer.use(key, algorithm)
    assert await log_in(login, issuer, "/databases?q=1#top") == Identity(
        subject=f"{issuer.url}|248289761001",
        email="jane@example.com",
        email_verified=True,
        return_to="/databases?q=1#top",
    )


async def test_what_is_fetched_is_remembered(login: OidcLogin, issuer: SmallIssuer, clock: ManualClock) -> None:
    """Discovery and keys are asked for once an hour, and no cookie of the issuer goes along with the next login."""
    for _ in range(2):
        await log_in(login, issuer)
    assert issuer.asked == [DISCOVERY, JWKS, "/token", "/token"]
    clock.advance(3600)
    await log_in(login, issuer)
    assert issuer.asked[4:] == [DISCOVERY, JWKS, "/token"]
    assert issuer.cookies == []


async def test_nobody_can_foresee_or_read_what_a_login_is_bound_to(login: OidcLogin, issuer: SmallIssuer) -> None:
    """State, nonce and challenge are new each time, and the cookie tells nothing of them."""
    issuer.document["authorization_endpoint"] = f"{issuer.url}/authorization?tenant=1"
    begun = [await login.begin("/") for _ in range(2)]
    queries = [parse_qs(urlsplit(each.location).query) for each in begun]
    assert [query["tenant"] for query in queries] == [["1"], ["1"]]
    for name in ("state", "nonce", "code_challenge"):
        first, second = (query[name][0] for query in queries)
        assert (len(first), first == second) == (43, False)
        assert first.encode() not in base64.b64decode(begun[0].cookie.partition(":")[2])
    assert set(queries[0]["scope"][0].split()) == {"openid", "email"}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"cookie": None}, "cookie"),
        ({"cookie": ""}, "cookie"),
        ({"cookie": "k1:AAAA"}, "cookie"),
        ({"cookie": "k9:AAAA"}, "cookie"),
        ({"cookie": "k1:ü"}, "cookie"),
        ({"cookie": KEYS.encrypt(b"{}", bound_to="oidc")}, "cookie"),
        ({"cookie": KEYS.encrypt(b"{}", bound_to="another")}, "cookie"),
        ({"state": ""}, "another login"),
        ({"state": "ü"}, "another login"),
        ({"iss": "https://another.example"}, "another issuer"),
        ({"code": ""}, "no code"),
        ({"code": "wrong"}, "does not take the code"),
        ({"error": "login_required"}, "'login_required'"),
    ],
)
async def test_an_answer_that_does_not_belong_to_the_login_is_refused(
    login: OidcLogin, issuer: SmallIssuer, changed: dict[str, str | None], why: str
) -> None:
    """Cookie, state, issuer and code must be those of one login."""
    begun = await login.begin("/")
    with pytest.raises(BadLogin) as caught:
        await come_back(login, begun, issuer.log_in(begun.location), **changed)
    assert why in str(caught.value.__cause__)


async def test_another_browser_cannot_finish_a_login(login: OidcLogin, issuer: SmallIssuer) -> None:
    """A link with somebody's own code logs nobody else in, and a code does not work in another login of the same."""
    mine, theirs = await login.begin("/"), await login.begin("/")
    back = issuer.log_in(mine.location)
    with pytest.raises(BadLogin):
        await come_back(login, theirs, back)
    state = parse_qs(urlsplit(theirs.location).query)["state"][0]
    with pytest.raises(BadLogin) as caught:
        await come_back(login, theirs, back, state=state)
    assert "does not take the code" in str(caught.value.__cause__)


async def test_a_login_works_once(login: OidcLogin, issuer: SmallIssuer) -> None:
    """The same answer with the same cookie is refused the second time."""
    begun = await login.begin("/")
    back = issuer.log_in(begun.location)
    await come_back(login, begun, back)
    with pytest.raises(BadLogin):
        await come_back(login, begun, back)


async def test_a_login_may_take_ten_minutes(login: OidcLogin, issuer: SmallIssuer, clock: ManualClock) -> None:
    """After that it has to be begun again."""
    begun = await login.begin("/")
    back = issuer.log_in(begun.location)
    clock.advance(600)
    with pytest.raises(BadLogin) as caught:
        await come_back(login, begun, back)
    assert "too long ago" in str(caught.value.__cause__)


async def test_an_issuer_that_says_its_name_must_say_it(issuer: SmallIssuer, clock: ManualClock) -> None:
    """An answer without `iss` is refused where the issuer has announced one, and taken where it has not."""
    for announced in (False, True):
        issuer.document["authorization_response_iss_parameter_supported"] = announced
        ours = new_login(issuer, clock)
        begun = await ours.begin("/")
        back = issuer.log_in(begun.location)
        if announced:
            with pytest.raises(BadLogin):
                await come_back(ours, begun, back, iss="")
        else:
            await come_back(ours, begun, back, iss="")
        await ours.close()


async def test_who_is_refused_there_is_told_so(login: OidcLogin, issuer: SmallIssuer) -> None:
    """An issuer that lets somebody not in is not the same as a login that went wrong."""
    issuer.refusal = "access_denied"
    with pytest.raises(match=r"^The login at the provider was refused there: begin again at /api"):
        await log_in(login, issuer)


@pytest.mark.parametrize("told", [True, "true", False, "false", None])
async def test_userinfo_is_asked_for_the_address(login: OidcLogin, issuer: SmallIssuer, told: object) -> None:
    """Where the ID token has no address, userinfo has the last word on it."""
    issuer.claims = {"email": None, "email_verified": None}
    issuer.person["email_verified"] = told
    who = await log_in(login, issuer)
    assert (who.email, who.email_verified) == ("jane@example.com", told in (True, "true"))
    assert issuer.asked.count("/userinfo") == 1


async def test_userinfo_about_somebody_else_is_refused(login: OidcLogin, issuer: SmallIssuer) -> None:
    """What it says counts only for the subject of the ID token."""
    issuer.claims = {"email": None, "sub": "another"}
    assert "somebody else" in await refusal(login, issuer)


async def test_somebody_may_have_no_address(login: OidcLogin, issuer: SmallIssuer) -> None:
    """Without an address there is none to be verified."""
    issuer.person.pop("email")
    issuer.document["userinfo_endpoint"] = None
    who = await log_in(login, issuer)
    assert (who.email, who.email_verified) == (None, False)


@pytest.mark.parametrize("methods", [["client_secret_post"], ["client_secret_post", "client_secret_basic"]])
async def test_we_show_our_secret_as_the_issuer_wants_it(
    login: OidcLogin, issuer: SmallIssuer, methods: list[str]
) -> None:
    """It goes in the header, as a rule, and in the form where only that is taken."""
    issuer.document["token_endpoint_auth_methods_supported"] = methods
    await log_in(login, issuer)


async def test_a_client_may_have_no_secret(issuer: SmallIssuer, clock: ManualClock) -> None:
    """A public client says who it is, and PKCE is what protects it."""
    issuer.client_secret = ""
    issuer.document["token_endpoint_auth_methods_supported"] = ["none"]
    login = new_login(issuer, clock)
    await log_in(login, issuer)
    await login.close()


def behind(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and all that led to it, also what a traceback leaves out."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


async def test_nothing_secret_is_said(
    issuer: SmallIssuer, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """No code, token, verifier or secret is in an error, in what it was caused by, or in a log of any level."""
    caplog.set_level(logging.DEBUG)
    said: list[str] = []

    async def fail(**wrong: Any) -> None:
        ours = new_login(issuer, clock, **wrong)
        with suppress(PortalError):
            begun = await ours.begin("/")
            back = issuer.log_in(begun.location)
            issuer.issued += [back["state"], begun.cookie]
            try:
                await come_back(ours, begun, back)
            except PortalError as error:
                said.append("".join(traceback.format_exception(error)))
                said.extend(str(each) for each in behind(error))
        await ours.close()

    await fail(client_secret="the wrong secret")
    await fail(redirect_uri=CALLBACK)
    issuer.issued.append("the wrong secret")
    for broken in ({"claims": {"nonce": "x"}}, {"sign": lambda claims: f"{issuer.signed(claims)}x"}):
        for name, value in broken.items():
            setattr(issuer, name, value)
        await fail()
    for reply in (Reply(400), Reply(body=lambda: iter((f'{{"id_token": ["{issuer.issued[0]}"]}}'.encode(),)))):
        issuer.replies["/token"] = reply
        await fail()
    issuer.replies["/token"] = Reply(400, lambda: iter((f'{{"error": "{issuer.issued[0]}"}}'.encode(),)))
    await fail()
    assert len(said) > 6
    everything = "\n".join([*said, caplog.text])
    assert "/token" in caplog.text
    secret = [*issuer.issued, issuer.client_secret]
    assert [each for each in secret if each in everything] == []


def test_a_server_without_such_a_login_does_not_pay_for_it() -> None:
    """Its libraries are loaded only where an issuer is configured."""
    check = "import sys, controlplane.server; print([m for m in ('httpx2', 'joserfc') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert told.stdout.strip() == "[]"
