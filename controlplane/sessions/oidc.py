"""The provider's own login, by OpenID Connect: the Authorization Code flow with PKCE, and nothing of it stored here."""

import hmac
import secrets
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from urllib.parse import urlencode

from cryptography.exceptions import InvalidTag
from pydantic import BaseModel

from controlplane.clock import Clock
from controlplane.errors import BadLogin, Unavailable
from controlplane.keys import Keys
from controlplane.sessions.oidc_failures import Broken, Refused

LASTS = timedelta(minutes=10)

_BOUND_TO = "oidc"
_RANDOM = 32  # bytes: 43 characters, the fewest that RFC 7636 takes for a verifier
_AGAIN = "begin again at /api/portal/session/oidc."
_ITS_OWN_TROUBLE = ("server_error", "temporarily_unavailable")


@dataclass(frozen=True, slots=True)
class Redirect:
    """Where the browser goes to log in, and the value of the cookie `__Host-htx_oidc` that it has to bring back."""

    location: str
    cookie: str


@dataclass(frozen=True, slots=True)
class Identity:
    """Who came back: `subject` is `ISSUER|SUB`, `return_to` what `begin` was given."""

    subject: str
    email: str | None
    email_verified: bool
    return_to: str


class OidcLogin:
    """Logins at one issuer.

    What must be remembered while somebody is there is in the browser's cookie, sealed: so any server may finish what
    another has begun, and nobody else's browser can (login CSRF). It is the issuer that sees to it that a code works
    only once.

    `redirect_uri` is where it sends the browser back to. An empty `client_secret` is that of a public client. An
    `issuer` that is neither https nor on loopback is a ValueError.
    """

    def __init__(
        self, *, issuer: str, client_id: str, client_secret: str, redirect_uri: str, keys: Keys, clock: Clock
    ) -> None:
        # Only here: its libraries take 9 MiB, which a server without such a login need not spend.
        from controlplane.sessions.issuer import Issuer  # noqa: PLC0415

        self._name = issuer
        self._client_id = client_id
        self._redirect_uri = redirect_uri
        self._keys = keys
        self._clock = clock
        self._issuer = Issuer(
            issuer, client_id=client_id, client_secret=client_secret, redirect_uri=redirect_uri, clock=clock
        )

    async def begin(self, return_to: str) -> Redirect:
        """Return where to send the browser, which goes on to `return_to` afterwards.

        Raises Unavailable.
        """
        try:
            endpoint = (await self._issuer.known()).document.authorization_endpoint
        except Broken as error:
            raise Unavailable from error
        begun = _Begun(
            state=secrets.token_urlsafe(_RANDOM),
            nonce=secrets.token_urlsafe(_RANDOM),
            verifier=secrets.token_urlsafe(_RANDOM),
            return_to=return_to,
            until=(self._clock.now() + LASTS).timestamp(),
        )
        query = {
            "response_type": "code",
            "scope": "openid email",
            "client_id": self._client_id,
            "redirect_uri": self._redirect_uri,
            "state": begun.state,
            "nonce": begun.nonce,
            "code_challenge": urlsafe_b64encode(sha256(begun.verifier.encode()).digest()).decode().rstrip("="),
            "code_challenge_method": "S256",
        }
        return Redirect(
            location=f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(query)}",
            cookie=self._keys.encrypt(begun.model_dump_json().encode(), bound_to=_BOUND_TO),
        )

    async def finish(self, *, code: str, state: str, error: str, iss: str, cookie: str | None) -> Identity:
        """Return who came back from the issuer with these parameters, `""` for each that is missing, and this cookie.

        Raises BadLogin, or Unavailable when it is the issuer that fails.
        """
        try:
            begun = self._find_begun(cookie, state)
            await self._check_answer(code, error, iss)
            tokens = await self._issuer.trade(code, verifier=begun.verifier)
            person = await self._issuer.identify(tokens, nonce=begun.nonce)
        except Refused as why:
            raise BadLogin(f"The login at the provider cannot be completed: {_AGAIN}") from why
        except Broken as why:
            raise Unavailable from why
        return Identity(
            subject=f"{self._name}|{person.sub}",
            email=person.email or None,
            email_verified=bool(person.email and person.email_verified),
            return_to=begun.return_to,
        )

    async def close(self) -> None:
        """End the connections to the issuer."""
        await self._issuer.close()

    def _find_begun(self, cookie: str | None, state: str) -> "_Begun":
        """Return what this browser began. Raises Refused if it did not, or if that was another login, or long ago."""
        try:
            begun = _Begun.model_validate_json(self._keys.decrypt(cookie or "", bound_to=_BOUND_TO))
        except (InvalidTag, LookupError, ValueError):
            raise Refused("the cookie of the login is missing or is not ours") from None
        if not hmac.compare_digest(begun.state.encode(), state.encode()):
            raise Refused("the state is that of another login")
        if begun.until <= self._clock.now().timestamp():
            raise Refused("the login was begun too long ago")
        return begun

    async def _check_answer(self, code: str, error: str, iss: str) -> None:
        """Raise unless the issuer says that somebody has logged in, and it is the issuer that says so (RFC 9207)."""
        names_itself = (await self._issuer.known()).document.authorization_response_iss_parameter_supported
        if (iss or names_itself) and iss != self._name:
            raise Refused("the answer names another issuer")
        if error == "access_denied":
            raise BadLogin(f"The login at the provider was refused there: {_AGAIN}")
        if error in _ITS_OWN_TROUBLE:
            raise Broken(f"the issuer answered {error}")
        if error:
            raise Refused(f"the issuer answered {error!r}")
        if not code:
            raise Refused("there is no code")


class _Begun(BaseModel):
    """What is in the cookie; `until` in seconds since 1970."""

    state: str
    nonce: str
    verifier: str
    return_to: str
    until: float
