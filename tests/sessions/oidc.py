"""Our side of a login at the small issuer: there, back, and why it failed."""

import base64
import secrets
from typing import Any

import pytest

from controlplane.errors import BadLogin
from controlplane.keys import Keys
from controlplane.sessions.oidc import Identity, OidcLogin, Redirect
from tests.clock import ManualClock
from tests.sessions.issuer import CALLBACK, CLIENT_ID, SmallIssuer

DISCOVERY, JWKS = "/.well-known/openid-configuration", "/jwks"
KEYS = Keys(**{each: {"k1": base64.b64encode(secrets.token_bytes(32)).decode()} for each in ("mac", "seal")})


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
