"""A small OpenID provider on loopback, as real as its clients can tell, which does wrong whatever it is told to."""

import base64
import hashlib
import json
import secrets
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote_plus, urlencode, urlsplit

from joserfc import jwt
from joserfc.errors import SecurityWarning
from joserfc.jwk import ECKey, Key

from controlplane.clock import Clock

CLIENT_ID = "the portal"
CALLBACK = "https://portal.example/api/portal/session/oidc/callback"


@dataclass(slots=True)
class Reply:
    """What is answered in place of what is right: the pieces of the body go out as they come."""

    status: int = 200
    body: Callable[[], Iterator[bytes]] = lambda: iter((b"{}",))
    location: str = ""


class SmallIssuer:
    """Everybody who comes is `person`, without being asked.

    `claims` go over those of the ID token (None takes one out), `document` over what discovery says; `replies` stand in
    for the answer at a path; `refusal` is why nobody is let in. `asked` has the paths that our side asked for.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.client_secret = f"+ {secrets.token_urlsafe()}"  # so that its encoding matters
        self.person: dict[str, Any] = {"sub": "248289761001", "email": "jane@example.com", "email_verified": True}
        self.claims: dict[str, Any] = {}
        self.document: dict[str, Any] = {}
        self.replies: dict[str, Reply] = {}
        self.refusal = ""
        self.redirect_uri = CALLBACK
        self.published: list[Any] = []
        self.use(ECKey.generate_key("P-256", {"kid": "first"}), "ES256")
        self.sign: Callable[[dict[str, Any]], str] = self.signed
        self.asked: list[str] = []
        self.cookies: list[str] = []
        self.issued: list[str] = []  # codes and tokens, which nobody else may see
        self._codes: dict[str, dict[str, str]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def use(self, key: Key, algorithm: str) -> None:
        """Sign with another key from now on, and publish only that."""
        self.key, self.algorithm = key, algorithm
        self.published = [key.as_dict(private=False)]

    def signed(self, claims: dict[str, Any]) -> str:
        """Return an ID token as it should be."""
        header = {"alg": self.algorithm} | ({"kid": self.key.kid} if self.key.kid else {})
        with warnings.catch_warnings(action="ignore", category=SecurityWarning):  # EdDSA, an old name of Ed25519
            return jwt.encode(header, claims, self.key, algorithms=[self.algorithm])

    def log_in(self, location: str) -> dict[str, str]:
        """Come with a browser that was sent here; return the parameters that it goes back with."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(location).query).items()}
        assert (asked["client_id"], asked["redirect_uri"]) == (CLIENT_ID, self.redirect_uri)
        assert (asked["response_type"], asked["code_challenge_method"]) == ("code", "S256")
        if self.refusal:
            return {"error": self.refusal, "state": asked["state"]}
        code = self._new_secret()
        self._codes[code] = asked
        return {"code": code, "state": asked["state"], "iss": self.url}

    def discovery(self, _: "_Request") -> tuple[int, Any]:
        """Say what is where."""
        paths = ("authorization_endpoint", "token_endpoint", "userinfo_endpoint", "jwks_uri")
        said: dict[str, Any] = {path: f"{self.url}/{path.partition('_')[0]}" for path in paths}
        said |= {"issuer": self.url, "id_token_signing_alg_values_supported": [self.algorithm, "HS256", "none"]}
        return 200, _changed(said, self.document)

    def jwks(self, _: "_Request") -> tuple[int, Any]:
        """Show the keys."""
        return 200, {"keys": self.published}

    def token(self, request: "_Request") -> tuple[int, Any]:
        """Give tokens for a code, once, to whom it was given."""
        if not self._is_client(request):
            return 401, {"error": "invalid_client", "error_description": f"not {request.headers['authorization']}"}
        begun = self._codes.pop(request.form.get("code", ""), None)
        challenge = hashlib.sha256(request.form["code_verifier"].encode()).digest()
        if (
            begun is None
            or begun["code_challenge"] != _base64url(challenge)
            or begun["redirect_uri"] != request.form["redirect_uri"]
            or request.form["grant_type"] != "authorization_code"
        ):
            return 400, {"error": "invalid_grant", "error_description": str(request.form)}
        now = int(self.clock.now().timestamp())
        claims = {"iss": self.url, "aud": CLIENT_ID, "iat": now, "exp": now + 300, "nonce": begun["nonce"]}
        id_token = self.sign(_changed({**claims, **self.person}, self.claims))
        self.issued.append(id_token)
        self._access_token = self._new_secret()
        return 200, {"id_token": id_token, "access_token": self._access_token, "token_type": "Bearer"}

    def userinfo(self, request: "_Request") -> tuple[int, Any]:
        """Tell about the person whose token it is."""
        if request.headers["authorization"] != f"Bearer {self._access_token}":
            return 401, {}
        return 200, self.person

    def _is_client(self, request: "_Request") -> bool:
        """Tell whether it shows its secret in a way that we offer; a public client has none to show."""
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        if scheme == "Basic":
            method = "client_secret_basic"
            name, _, secret = base64.b64decode(text).decode().partition(":")
            shown = unquote_plus(name), unquote_plus(secret)
        else:
            method = "client_secret_post" if self.client_secret else "none"
            shown = request.form.get("client_id", ""), request.form.get("client_secret", "")
        offered = self.document.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        return method in offered and shown == (CLIENT_ID, self.client_secret)

    def _new_secret(self) -> str:
        self.issued.append(secrets.token_urlsafe())
        return self.issued[-1]

    def stop(self) -> None:
        """Be gone."""
        self._server.shutdown()
        self._server.server_close()

    def serve(self) -> None:
        """Answer until the end."""
        self._server.serve_forever(poll_interval=0.01)


@contextmanager
def running(clock: Clock) -> Iterator[SmallIssuer]:
    """Run an issuer in threads of its own."""
    issuer = SmallIssuer(clock)
    thread = threading.Thread(target=issuer.serve)
    thread.start()
    yield issuer
    issuer.stop()
    thread.join()


def forged(header: dict[str, Any], claims: dict[str, Any], sign: Callable[[bytes], bytes]) -> str:
    """Return a token made by hand, as no library would make it."""
    head = ".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
    return f"{head}.{_base64url(sign(head.encode()))}"


@dataclass(slots=True)
class _Request:
    headers: dict[str, str]
    form: dict[str, str]


def _handler(issuer: SmallIssuer) -> type[BaseHTTPRequestHandler]:
    answers = {
        "/.well-known/openid-configuration": issuer.discovery,
        "/jwks": issuer.jwks,
        "/token": issuer.token,
        "/userinfo": issuer.userinfo,
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            headers = {name.lower(): value for name, value in self.headers.items()}
            if path == "/authorization":
                back = urlencode(issuer.log_in(self.path))
                self._send(Reply(302, lambda: iter(()), f"{issuer.redirect_uri}?{back}"))
                return
            issuer.asked.append(path)
            issuer.cookies += [headers["cookie"]] if "cookie" in headers else []
            body = self.rfile.read(int(headers.get("content-length", "0"))).decode()
            if path in issuer.replies:
                self._send(issuer.replies[path])
                return
            form = {name: each[0] for name, each in parse_qs(body).items()}
            status, said = answers[path](_Request(headers, form)) if path in answers else (404, {})
            self._send(Reply(status, lambda: iter((json.dumps(said).encode(),))))

        do_POST = do_GET  # noqa: N815 - the library's name

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            self.send_header("set-cookie", "visitor=jane; Path=/")
            if reply.location:
                self.send_header("location", reply.location)
            self.end_headers()
            try:
                for piece in reply.body():
                    self.wfile.write(piece)
            except OSError:
                pass  # whoever asked has gone

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
            """Keep the tests' output clean."""

    return Handler


def _changed(said: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**said, **by}.items() if value is not None}


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
