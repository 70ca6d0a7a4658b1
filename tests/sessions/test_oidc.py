"""The provider's own login, at a real issuer that does right and wrong."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import secrets
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from joserfc.jwk import ECKey, OKPKey, RSAKey

from controlplane.errors import BadLogin, PortalError, Unavailable
from controlplane.keys import Keys
from controlplane.sessions import issuer as issuer_module
from controlplane.sessions.oidc import Identity, OidcLogin, Redirect
from tests.clock import ManualClock
from tests.sessions.issuer import CALLBACK, CLIENT_ID, Reply, SmallIssuer, forged, running

DISCOVERY, JWKS = "/.well-known/openid-configuration", "/jwks"
KEYS = Keys(**{each: {"k1": base64.b64encode(secrets.token_bytes(32)).decode()} for each in ("mac", "seal")})


@pytest.fixture
def clock() -> ManualClock:
    """A clock for both sides."""
    return ManualClock()


@pytest.fixture
def issuer(clock: ManualClock) -> Iterator[SmallIssuer]:
    """An issuer of the test's own."""
    with running(clock) as answering:
        yield answering


@pytest.fixture
async def login(issuer: SmallIssuer, clock: ManualClock) -> AsyncIterator[OidcLogin]:
    """Our side of it."""
    ours = new_login(issuer, clock)
    yield ours
    await ours.close()


def new_login(issuer: SmallIssuer, clock: ManualClock, **changed: str) -> OidcLogin:
    """Return our side, as the settings would have it."""
    wanted = {
        "issuer": issuer.url,
        "client_id": CLIENT_ID,
        "client_secret": issuer.client_secret,
        "redirect_uri": CALLBACK,
        **changed,
    }
    return OidcLogin(keys=KEYS, clock=clock, **wanted)


async def come_back(login: OidcLogin, begun: Redirect, back: dict[str, str], **changed: str | None) -> Identity:
    """Finish with what the issuer gave the browser."""
    parameters: dict[str, Any] = {"code": "", "error": "", "iss": "", "cookie": begun.cookie, **back, **changed}
    return await login.finish(**parameters)


async def log_in(login: OidcLogin, issuer: SmallIssuer, return_to: str = "/") -> Identity:
    """Go there and come back."""
    begun = await login.begin(return_to)
    return await come_back(login, begun, issuer.log_in(begun.location))


async def refusal(login: OidcLogin, issuer: SmallIssuer) -> str:
    """Try to log in; return why it failed, as the log has it."""
    with pytest.raises(BadLogin) as caught:
        await log_in(login, issuer)
    assert str(caught.value) == (
        "The login at the provider cannot be completed: begin again at /api/portal/session/oidc."
    )
    return str(caught.value.__cause__)


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
    ("claims", "why"),
    [
        ({"nonce": "another"}, "'nonce'"),
        ({"nonce": None}, "'nonce'"),
        ({"aud": "another"}, "'aud'"),
        ({"aud": None}, "'aud'"),
        ({"aud": []}, "'aud'"),
        ({"aud": ["another", "third"], "azp": CLIENT_ID}, "'aud'"),
        ({"aud": [CLIENT_ID, "another"]}, "'azp'"),
        ({"azp": "another"}, "'azp'"),
        ({"iss": "https://another.example"}, "'iss'"),
        ({"iss": None}, "'iss'"),
        ({"exp": 1}, "expired"),
        ({"exp": None}, "'exp'"),
        ({"exp": "tomorrow"}, "'exp'"),
        ({"iat": None}, "'iat'"),
        ({"iat": 2**40}, "future"),
        ({"sub": None}, "sub: Field required"),
        ({"sub": ""}, "sub"),
        ({"sub": "x" * 256}, "sub"),
        ({"sub": "a\0b"}, "sub"),
        ({"email": "a\0b@example.com"}, "email"),
        ({"email": ["jane@example.com"]}, "email"),
    ],
)
async def test_an_id_token_for_others_is_refused(
    login: OidcLogin, issuer: SmallIssuer, claims: dict[str, Any], why: str
) -> None:
    """Issuer, audience, party, times, nonce and subject must all hold, and the log says which does not."""
    issuer.claims = claims
    assert why in await refusal(login, issuer)


async def test_an_id_token_may_be_a_little_off(login: OidcLogin, issuer: SmallIssuer, clock: ManualClock) -> None:
    """A minute between the clocks does no harm, nor do further audiences if the token is for us."""
    now = int(clock.now().timestamp())
    issuer.claims = {"exp": now - 30, "iat": now + 30, "aud": [CLIENT_ID, "another"], "azp": CLIENT_ID}
    assert (await log_in(login, issuer)).email == "jane@example.com"


def _unsigned(_: SmallIssuer) -> Callable[[dict[str, Any]], str]:
    return lambda claims: forged({"alg": "none"}, claims, lambda _: b"")


def _by_public_key(issuer: SmallIssuer) -> Callable[[dict[str, Any]], str]:
    """The key is public, so anybody could make this one; a check that believes the header takes it."""
    public = issuer.key.as_pem(private=False)  # type: ignore[union-attr]
    header = {"alg": "HS256", "kid": issuer.key.kid}
    return lambda claims: forged(header, claims, lambda text: hmac.digest(public, text, hashlib.sha256))


def _by_another_key(issuer: SmallIssuer) -> Callable[[dict[str, Any]], str]:
    published = issuer.published
    issuer.use(ECKey.generate_key("P-256", {"kid": "first"}), "ES256")
    issuer.published = published
    return issuer.signed


def _changed_later(issuer: SmallIssuer) -> Callable[[dict[str, Any]], str]:
    def sign(claims: dict[str, Any]) -> str:
        head, _, signature = issuer.signed({**claims, "sub": "another"}).split(".")
        return f"{head}.{issuer.signed(claims).split('.')[1]}.{signature}"

    return sign


@pytest.mark.parametrize(
    ("sign", "why"),
    [
        (_unsigned, "'none' is not allowed"),
        (_by_public_key, "'HS256' is not allowed"),
        (_by_another_key, "bad_signature"),
        (_changed_later, "bad_signature"),
        (lambda _: lambda _claims: "not.a.token", "ID token"),
        (lambda _: lambda _claims: "", "ID token"),
        (lambda _: lambda claims: forged(["alg"], claims, bytes), "ID token"),  # type: ignore[arg-type]
        (lambda _: lambda claims: forged({"alg": ["ES256"]}, claims, bytes), "ID token"),
        (lambda _: lambda claims: forged({"alg": "ES256", "kid": {}}, claims, bytes), "ID token"),
    ],
)
async def test_an_id_token_that_the_issuer_has_not_signed_is_refused(
    login: OidcLogin, issuer: SmallIssuer, sign: Callable[[SmallIssuer], Callable[[dict[str, Any]], str]], why: str
) -> None:
    """Only a signature by a private key of the issuer's counts, whatever the token says of itself."""
    issuer.sign = sign(issuer)
    assert why in await refusal(login, issuer)


async def test_new_keys_are_found(login: OidcLogin, issuer: SmallIssuer, clock: ManualClock) -> None:
    """A key that we do not know makes us ask for the keys again, but no more than once a minute."""
    await log_in(login, issuer)
    issuer.use(ECKey.generate_key("P-256", {"kid": "second"}), "ES256")
    assert "a key that the issuer does not have" in await refusal(login, issuer)
    assert issuer.asked.count(JWKS) == 1
    clock.advance(60)
    await log_in(login, issuer)
    assert issuer.asked.count(JWKS) == 2


async def test_keys_that_are_of_no_use_are_ignored(login: OidcLogin, issuer: SmallIssuer, clock: ManualClock) -> None:
    """Keys of unknown kinds and broken ones stand in nobody's way; one that is too weak is as good as none."""
    good = issuer.published
    issuer.published = [{"kty": "future"}, {"kty": "EC", "crv": "P-256"}, {"kty": 5}, {}, *good]
    await log_in(login, issuer)
    other = new_login(issuer, clock)
    with pytest.warns(match="2048"):
        issuer.use(RSAKey.generate_key(1024, {"kid": "weak"}), "RS256")
    assert "a key that the issuer does not have" in await refusal(other, issuer)
    await other.close()


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


@pytest.mark.parametrize("trouble", ["server_error", "temporarily_unavailable"])
async def test_an_issuer_in_trouble_is_unavailable(login: OidcLogin, issuer: SmallIssuer, trouble: str) -> None:
    """Where the issuer says that the fault is its own, the same login may be tried again."""
    issuer.refusal = trouble
    with pytest.raises(Unavailable):
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
