"""ID tokens of a real issuer, and its keys: which are taken, and which are refused."""

import hashlib
import hmac
from collections.abc import Callable
from typing import Any

import pytest
from joserfc.jwk import ECKey, RSAKey

from controlplane.sessions.oidc import OidcLogin
from tests.clock import ManualClock
from tests.sessions.issuer import CLIENT_ID, SmallIssuer, forged
from tests.sessions.oidc import JWKS, log_in, new_login, refusal


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
