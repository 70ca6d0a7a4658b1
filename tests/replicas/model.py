"""What an account's tokens, quotas and idempotency keys ought to do, in a few lines of plain Python."""

from dataclasses import dataclass, field
from typing import Any

LIMIT = 3  # of tokens and of databases, in the plan `small`
READ, ALL = frozenset({"list"}), frozenset({"list", "create", "delete"})
# What a new token may do to databases, by how it was ordered.
REACHES = {"full": ALL, "databases": ALL, "read": READ, "functions": READ, "databases:create": frozenset({"create"})}


@dataclass(slots=True)
class Token:
    """A token. Times are in seconds since the account was opened; `counts` is whether it has a place in the quota."""

    id: str
    reach: frozenset[str]
    secret: str
    expires_at: float | None
    previous: str | None = None
    previous_until: float = 0
    is_revoked: bool = False
    is_elsewhere: bool = False
    counts: bool = True

    def status(self, now: float) -> str:
        """Return what it is listed as."""
        if self.is_revoked:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"

    def takes(self, secret: str, now: float) -> bool:
        """Tell whether one can come in with this secret."""
        holds = secret == self.secret or (secret == self.previous and now < self.previous_until)
        return holds and self.status(now) == "active"


@dataclass(frozen=True, slots=True)
class Request:
    """A request by the name of its RPC, and the idempotency key that comes with it."""

    rpc: str
    message: dict[str, Any] = field(default_factory=dict)
    key: str | None = None

    @property
    def name(self) -> tuple[str, str | None]:
        """What it is remembered by."""
        return self.rpc, self.key


@dataclass(slots=True)
class Model:
    """An account. Each method returns the code of the answer that is due, and changes nothing unless that is `ok`."""

    tokens: list[Token]
    now: float = 0
    is_disabled: bool = False
    databases: set[str] = field(default_factory=set)
    changes: list[str] = field(default_factory=list)
    # Requests that have a key, by their names, and what they were answered with.
    answered: dict[tuple[str, str | None], tuple[Request, dict[str, Any]]] = field(default_factory=dict)

    @property
    def used(self) -> dict[str, int]:
        """How much of the quotas is used."""
        return {"tokens": sum(token.counts for token in self.tokens), "databases": len(self.databases)}

    def let_pass(self, seconds: float) -> None:
        """Let time go by, until expired tokens have given their places back."""
        self.now += seconds
        for token in self.tokens:
            token.counts = token.counts and token.status(self.now) == "active"

    def repeats(self, request: Request) -> str | None:
        """Return what is due to a request whose key was used before: `replay` or a mismatch; None if it was not."""
        if request.name not in self.answered:
            return None
        return "replay" if self.answered[request.name][0] == request else "idempotency_mismatch"

    def manage(self) -> str:
        """Call what only a login may."""
        return "unauthenticated" if self.is_disabled else "ok"

    def use(self, token: Token, secret: str, action: str) -> str:
        """Do something to databases with a secret that the token has, or had."""
        if self.is_disabled or not token.takes(secret, self.now):
            return "unauthenticated"
        if token.is_elsewhere:
            return "ip_denied"
        return "ok" if action in token.reach else "scope_denied"

    def create_token(self, expires_at: float | None) -> str:
        """Make a token; the caller adds it with the secret that the answer shows."""
        if expires_at is not None and expires_at <= self.now:
            return "invalid_field"
        return "quota_exceeded" if self.used["tokens"] >= LIMIT else "ok"

    def rotate(self, token: Token) -> str:
        """Rotate a token; the caller puts the new secret in."""
        return "ok" if token.status(self.now) == "active" else "conflict"

    def revoke(self, token: Token) -> str:
        """Revoke a token."""
        token.is_revoked, token.counts = True, False
        return "ok"

    def move(self, token: Token, *, elsewhere: bool) -> str:
        """Change from where a token may be used."""
        if token.is_revoked:
            return "conflict"
        token.is_elsewhere = elsewhere
        return "ok"

    def prolong(self, token: Token, expires_at: float | None) -> str:
        """Change when a token expires; one that has given its place back needs another."""
        if token.is_revoked:
            return "conflict"
        if expires_at is not None and expires_at <= self.now:
            return "invalid_field"
        if not token.counts and self.used["tokens"] >= LIMIT:
            return "quota_exceeded"
        token.expires_at, token.counts = expires_at, True
        return "ok"

    def create_database(self, name: str) -> str:
        """Order a database."""
        if name in self.databases:
            return "already_exists"
        if self.used["databases"] >= LIMIT:
            return "quota_exceeded"
        self.databases.add(name)
        return "ok"
