"""When, from where and for what credentials were last used: noted in memory, written together every few seconds.

Nothing on the way of a request waits for it. What a killed server had noted and not written is lost: a few seconds.
"""

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import bindparam, text, update
from sqlmodel import col

from controlplane.clock import Clock
from controlplane.errors import PortalError
from controlplane.rpc.call import Call
from controlplane.sessions.model import Session
from controlplane.sql import Store, UtcDateTime

FLUSH_EVERY = 10.0  # seconds
_KNOWN_PERMISSIONS = 100_000

_TOKEN = text(
    "INSERT INTO token_uses (token_id, last_used_at, last_used_ip, secret_used_at, previous_used_at,"
    " refused_requests, last_refused_at)"
    " VALUES (:token_id, :last_used_at, :last_used_ip, :secret_used_at, :previous_used_at, :refused, :last_refused_at)"
    " ON CONFLICT (token_id) DO UPDATE SET"
    " last_used_at = coalesce(excluded.last_used_at, token_uses.last_used_at),"
    " last_used_ip = coalesce(excluded.last_used_ip, token_uses.last_used_ip),"
    " secret_used_at = coalesce(excluded.secret_used_at, token_uses.secret_used_at),"
    " previous_used_at = coalesce(excluded.previous_used_at, token_uses.previous_used_at),"
    " refused_requests = token_uses.refused_requests + excluded.refused_requests,"
    " last_refused_at = coalesce(excluded.last_refused_at, token_uses.last_refused_at)"
).bindparams(
    *(
        bindparam(name, type_=UtcDateTime())
        for name in ("last_used_at", "secret_used_at", "previous_used_at", "last_refused_at")
    )
)
_PERMISSION = text(
    "INSERT INTO token_permissions (token_id, permission) VALUES (:token_id, :permission) ON CONFLICT DO NOTHING"
)
_SESSION = (
    update(Session)
    .where(col(Session.id) == bindparam("session_id"))
    .values(last_used_at=bindparam("at"), last_used_ip=bindparam("ip"))
)


@dataclass(slots=True)
class _Use:
    """What was noted of a token since the last time it was written."""

    last_used_at: datetime | None = None
    last_used_ip: str | None = None
    secret_used_at: datetime | None = None
    previous_used_at: datetime | None = None
    refused: int = 0
    last_refused_at: datetime | None = None
    permissions: set[str] = field(default_factory=set)


class Uses:
    """The uses of tokens and logins in this process."""

    def __init__(self, *, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._tokens: dict[str, _Use] = defaultdict(_Use)
        self._sessions: dict[str, tuple[datetime, str]] = {}
        self._written: set[tuple[str, str]] = set()
        self._writing = asyncio.Lock()

    def used(self, call: Call) -> None:
        """Note a request that has passed every check."""
        caller = call.maybe_caller
        if caller is None:
            return
        now = self._clock.now()
        if caller.kind == "session":
            self._sessions[caller.credential_id] = (now, call.client_ip)
            return
        use = self._tokens[caller.credential_id]
        use.last_used_at, use.last_used_ip = now, call.client_ip
        if caller.is_previous:
            use.previous_used_at = now
        else:
            use.secret_used_at = now
        needed = call.rpc.access.permission
        if needed:
            use.permissions.add(needed)

    def refused(self, call: Call, error: PortalError) -> None:
        """Note a request that a check has refused: for the credential, the address, the permission or the rate."""
        if call.presented is not None and call.presented.kind == "token" and error.http in {401, 403, 429}:
            use = self._tokens[call.presented.credential_id]
            use.refused += 1
            use.last_refused_at = self._clock.now()

    async def flush(self) -> None:
        """Write what was noted since the last time; what cannot be written now is lost."""
        async with self._writing:
            tokens, self._tokens = self._tokens, defaultdict(_Use)
            sessions, self._sessions = self._sessions, {}
            if not (tokens or sessions):
                return
            permissions = {(token_id, each) for token_id, use in tokens.items() for each in use.permissions}
            new = permissions - self._written
            # All in one order, or two servers that write the same rows wait for each other.
            async with self._store.session() as session:
                if tokens:
                    await session.execute(_TOKEN, [_row(token_id, tokens[token_id]) for token_id in sorted(tokens)])
                if new:
                    await session.execute(
                        _PERMISSION, [{"token_id": token_id, "permission": each} for token_id, each in sorted(new)]
                    )
                if sessions:
                    connection = await session.connection()
                    await connection.execute(
                        _SESSION,
                        [{"session_id": key, "at": at, "ip": ip} for key, (at, ip) in sorted(sessions.items())],
                    )
                await session.commit()
            if len(self._written) > _KNOWN_PERMISSIONS:
                self._written.clear()
            self._written |= new


def _row(token_id: str, use: _Use) -> dict[str, object]:
    return {
        "token_id": token_id,
        "last_used_at": use.last_used_at,
        "last_used_ip": use.last_used_ip,
        "secret_used_at": use.secret_used_at,
        "previous_used_at": use.previous_used_at,
        "refused": use.refused,
        "last_refused_at": use.last_refused_at,
    }
