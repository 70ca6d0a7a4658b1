"""The servicer of browser logins."""

from datetime import timedelta
from typing import Any

import grpc
from sqlalchemy import bindparam, delete
from sqlmodel import col, select

from controlplane.access.credentials import COOKIE
from controlplane.access.secrets import new_session_secret
from controlplane.accounts.model import Account
from controlplane.accounts.passwords import Passwords
from controlplane.api.v1 import sessions_pb2, sessions_pb2_grpc
from controlplane.clock import Clock
from controlplane.errors import BadLogin
from controlplane.ids import new_id
from controlplane.keys import Keys
from controlplane.rpc.call import current
from controlplane.rpc.times import stamp
from controlplane.sessions.model import Session
from controlplane.sql import Store

Context = grpc.aio.ServicerContext[Any, Any]

LASTS = timedelta(hours=12)
_ATTRIBUTES = "Path=/; Secure; HttpOnly; SameSite=Lax"

_ACCOUNT = select(Account).where(col(Account.email) == bindparam("email"), col(Account.disabled_at).is_(None))
_SESSION = (
    select(Session.id, Session.created_at, Session.expires_at, Account.email)
    .join(Account, col(Account.id) == col(Session.account_id))
    .where(col(Session.id) == bindparam("id"))
)


class SessionService(sessions_pb2_grpc.SessionServiceServicer):
    """Browser logins."""

    def __init__(self, *, store: Store, keys: Keys, clock: Clock, passwords: Passwords) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._passwords = passwords

    async def CreateSession(self, request: sessions_pb2.CreateSessionRequest, context: Context) -> sessions_pb2.Session:
        """Log in; the answer carries the cookie.

        Raises BadLogin, in the same time and words for an unknown address and a wrong password.
        """
        call, wanted = current(), request.session
        found = await self._store.fetch(_ACCOUNT, {"email": wanted.email.strip().lower()})
        account = found[0] if found else None
        # Before the transaction begins with its first statement: it would keep every other write waiting.
        if not await self._passwords.check(wanted.password, account.password_hash if account else None):
            raise BadLogin
        assert account is not None  # noqa: S101 - the check fails without one
        secret, now = new_session_secret(), self._clock.now()
        await call.session.execute(
            delete(Session).where(col(Session.account_id) == account.id, col(Session.expires_at) <= now)
        )
        session = Session(
            id=new_id("se"),
            account_id=account.id,
            secret_digest=self._keys.digest(secret),
            created_at=now,
            expires_at=now + LASTS,
        )
        call.session.add(session)
        await call.session.flush()
        call.headers.append(("set-cookie", f"{COOKIE}={secret}; Max-Age={int(LASTS.total_seconds())}; {_ATTRIBUTES}"))
        return _shown(session, email=account.email)

    async def GetSession(self, request: sessions_pb2.GetSessionRequest, context: Context) -> sessions_pb2.Session:
        """Show who is logged in."""
        row = (await self._store.fetch(_SESSION, {"id": current().caller.credential_id}))[0]
        return _shown(row, email=row.email)

    async def DeleteSession(self, request: sessions_pb2.DeleteSessionRequest, context: Context) -> sessions_pb2.Session:
        """Log out: the session is gone with the commit."""
        call = current()
        row = (await self._store.fetch(_SESSION, {"id": call.caller.credential_id}))[0]
        await call.session.execute(delete(Session).where(col(Session.id) == call.caller.credential_id))
        call.headers.append(("set-cookie", f"{COOKIE}=; Max-Age=0; {_ATTRIBUTES}"))
        return _shown(row, email=row.email)


def _shown(session: Session, *, email: str) -> sessions_pb2.Session:
    return sessions_pb2.Session(
        id=session.id, email=email, created_at=stamp(session.created_at), expires_at=stamp(session.expires_at)
    )
