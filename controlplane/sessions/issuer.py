"""The issuer behind the provider's own login: what it says of itself, and who a code or a token of its stands for.

No message here holds a code, a token or our secret: they go to the log.
"""

import asyncio
import warnings
from contextlib import suppress
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import ip_address
from typing import Annotated, Any, TypeVar
from urllib.parse import quote_plus, urlsplit

import httpx2
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError, SecurityWarning
from joserfc.jwk import Key, KeySet, import_key
from joserfc.jws import JWSRegistry
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from controlplane.clock import Clock
from controlplane.sessions.oidc_failures import Broken, Refused

# Only signatures that the public key cannot make: never HS256 and its like, nor none.
_ALGORITHMS = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "Ed25519", "EdDSA"}
)
_KEPT = 3600.0  # seconds for which we believe what the issuer said of itself
_KEPT_AT_LEAST = 60.0  # also when a token has a key that we do not know
_TIMEOUT = 5.0  # seconds, for one answer as a whole
_LARGEST = 256 * 1024  # bytes of an answer; large key sets have 30 KiB
_LEEWAY = 60  # seconds by which the issuer's clock may be off ours

_Model = TypeVar("_Model", bound=BaseModel)


def _checked(url: str) -> str:
    """Return an address where nobody on the way can read along or answer: https, or this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    with suppress(ValueError):
        if parts.scheme == "http" and (host == "localhost" or ip_address(host).is_loopback):
            return url
    if parts.scheme != "https" or not host:
        raise ValueError(f"{url} must begin with https://")
    return url


Address = Annotated[str, AfterValidator(_checked)]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)


class Document(_Answer):
    """What an issuer says of itself (OpenID Connect Discovery 1.0, section 3; the last: RFC 9207, section 3)."""

    issuer: str
    authorization_endpoint: Address
    token_endpoint: Address
    jwks_uri: Address
    userinfo_endpoint: Address | None = None
    id_token_signing_alg_values_supported: list[str] = ["RS256"]
    token_endpoint_auth_methods_supported: list[str] = ["client_secret_basic"]
    authorization_response_iss_parameter_supported: bool = False


class Tokens(_Answer):
    """What a code is worth. The access token is fit for a header: the error about one that is not would show it."""

    id_token: str = Field(repr=False)
    access_token: str = Field(default="", repr=False, pattern=r"^[\x21-\x7e]*$")


class Person(_Answer):
    """Whom an ID token or the userinfo endpoint is about; some issuers write `"true"` for true."""

    sub: Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]{1,255}$")]
    email: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]{0,254}$")] | None = None
    email_verified: bool | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What we know of the issuer, and since when, in seconds of the clock that nobody sets."""

    document: Document
    algorithms: list[str]
    keys: KeySet
    since: float


class Issuer:
    """One issuer, asked as one client of its. All that it answers wrongly or too late is a Broken."""

    def __init__(self, url: str, *, client_id: str, client_secret: str, redirect_uri: str, clock: Clock) -> None:
        self._url = _checked(url)
        self._client_id = client_id
        self._client_secret = client_secret
        self._redirect_uri = redirect_uri
        self._clock = clock
        self._known: Known | None = None
        self._learning = asyncio.Lock()
        self._http = httpx2.AsyncClient(
            headers={"accept": "application/json", "accept-encoding": "identity"},
            follow_redirects=False,  # our secret is for the address that the issuer gave, and for no other
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # one person's would go along with the next
            timeout=None,  # its timeouts are for each piece; ours is for the whole
        )

    async def known(self, *, within: float = _KEPT) -> Known:
        """Return what the issuer said of itself within so many seconds; it is asked when that is not known."""
        try:
            async with asyncio.timeout(_TIMEOUT), self._learning:  # those who wait for others wait no longer either
                if self._known is None or self._clock.monotonic() - self._known.since >= within:
                    self._known = await self._learn()
                return self._known
        except TimeoutError:
            raise Broken("the issuer takes too long to say who it is") from None

    async def trade(self, code: str, *, verifier: str) -> Tokens:
        """Return the tokens for a code. Raises Refused if the issuer does not take it."""
        document = (await self.known()).document
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._redirect_uri,
            "code_verifier": verifier,
        }
        methods = document.token_endpoint_auth_methods_supported
        basic = None
        if not self._client_secret:
            form["client_id"] = self._client_id
        elif "client_secret_post" in methods and "client_secret_basic" not in methods:
            form |= {"client_id": self._client_id, "client_secret": self._client_secret}
        else:  # RFC 6749, section 2.3.1: encoded as in a form first
            basic = (quote_plus(self._client_id), quote_plus(self._client_secret))
        status, body = await self._send("POST", document.token_endpoint, data=form, auth=basic)
        if status == httpx2.codes.OK:
            return _read(Tokens, body, document.token_endpoint)
        reason = _reason(body)
        if reason == "invalid_grant":
            raise Refused("the issuer does not take the code")
        raise Broken(f"{document.token_endpoint} answered {status}: {reason}")

    async def identify(self, tokens: Tokens, *, nonce: str) -> Person:
        """Return whom the tokens are about. Raises Refused for an ID token that does not hold, or not for this login.

        Userinfo is asked where the ID token has no address.
        """
        known = await self.known()
        try:
            claims = self._verify(tokens.id_token, known, nonce)
        except InvalidKeyIdError:  # the keys may be new
            known = await self.known(within=_KEPT_AT_LEAST)
            try:
                claims = self._verify(tokens.id_token, known, nonce)
            except InvalidKeyIdError:
                raise Refused("the ID token is signed with a key that the issuer does not have") from None
        try:
            person = Person.model_validate(claims)
        except ValidationError as error:
            raise Refused(f"the ID token names nobody: {_problems(error)}") from None
        endpoint = known.document.userinfo_endpoint
        if person.email or endpoint is None:
            return person
        status, body = await self._send("GET", endpoint, headers={"authorization": f"Bearer {tokens.access_token}"})
        if status != httpx2.codes.OK:
            raise Broken(f"{endpoint} answered {status}")
        told = _read(Person, body, endpoint)
        if told.sub != person.sub:
            raise Refused(f"{endpoint} answered about somebody else")
        return told

    async def close(self) -> None:
        """End the connections."""
        await self._http.aclose()

    async def _learn(self) -> Known:
        where = f"{self._url.rstrip('/')}/.well-known/openid-configuration"
        document = await self._get(Document, where)
        if document.issuer != self._url:
            raise Broken(f"{where} is about the issuer {document.issuer!r}, and HTX_OIDC_ISSUER is {self._url!r}")
        algorithms = [each for each in document.id_token_signing_alg_values_supported if each in _ALGORITHMS]
        if not algorithms:  # and to joserfc, an empty list means its own, HS256 among them
            raise Broken(f"{where} offers no signature that we take: {', '.join(sorted(_ALGORITHMS))}")
        keys = _usable((await self._get(_JwkSet, document.jwks_uri)).keys)
        return Known(document=document, algorithms=algorithms, keys=keys, since=self._clock.monotonic())

    async def _get(self, model: type[_Model], url: str) -> _Model:
        status, body = await self._send("GET", url)
        if status != httpx2.codes.OK:
            raise Broken(f"{url} answered {status}")
        return _read(model, body, url)

    async def _send(self, method: str, url: str, **request: Any) -> tuple[int, bytes]:
        body = bytearray()
        try:
            async with asyncio.timeout(_TIMEOUT), self._http.stream(method, url, **request) as answer:
                async for piece in answer.aiter_raw():  # not unpacked: what is small must not become large
                    body += piece
                    if len(body) > _LARGEST:
                        raise Broken(f"{url} answered with more than {_LARGEST} bytes")
                return answer.status_code, bytes(body)
        except TimeoutError:
            raise Broken(f"{url} did not answer in {_TIMEOUT:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise Broken(f"{url} cannot be asked: {type(error).__name__}: {error}") from None

    def _verify(self, id_token: str, known: Known, nonce: str) -> dict[str, Any]:
        """Return an ID token's claims (OpenID Connect Core 1.0, section 3.1.3.7).

        Raises Refused; InvalidKeyIdError when its key is not among the known ones.
        """
        registry = JWSRegistry(algorithms=known.algorithms, strict_check_header=False)  # unknown fields do no harm
        try:
            with warnings.catch_warnings(action="ignore", category=SecurityWarning):  # EdDSA, an old name of Ed25519
                claims = jwt.decode(id_token, known.keys, registry=registry).claims
            ours, audience = self._client_id, claims.get("aud")
            jwt.JWTClaimsRegistry(
                now=int(self._clock.now().timestamp()),
                leeway=_LEEWAY,
                iss={"essential": True, "value": self._url},
                aud={"essential": True, "value": ours},
                azp={"essential": isinstance(audience, list) and len(audience) > 1, "value": ours},
                exp={"essential": True},
                iat={"essential": True},
                nonce={"essential": True, "value": nonce},
            ).validate(claims)
        except InvalidKeyIdError:
            raise
        except JoseError as error:
            raise Refused(f"the ID token does not hold: {error}") from None
        except (ValueError, TypeError, AttributeError, LookupError) as error:  # joserfc's, at a header of no sense
            raise Refused(f"the ID token cannot be read: {type(error).__name__}") from None
        return claims


class _JwkSet(_Answer):
    keys: list[dict[str, Any]]


class _Problem(_Answer):
    error: Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}$")]


def _usable(jwks: list[dict[str, Any]]) -> KeySet:
    """Return those keys that we understand and that are strong enough; RFC 7517, section 5, has the others ignored."""
    keys: list[Key] = []
    with warnings.catch_warnings(action="error", category=SecurityWarning):  # at RSA of less than 2048 bits
        for jwk in jwks:
            with suppress(JoseError, SecurityWarning, ValueError, TypeError, LookupError):
                keys.append(import_key(jwk))
    return KeySet(keys)


def _read(model: type[_Model], body: bytes, url: str) -> _Model:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise Broken(f"{url} answered what is not OpenID Connect: {_problems(error)}") from None


def _reason(body: bytes) -> str:
    """Return the error that the issuer names, where it can be one: it must not bring back what we have sent."""
    try:
        return _Problem.model_validate_json(body).error
    except ValidationError:
        return "no reason given"


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_input=False))
