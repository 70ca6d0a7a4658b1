"""The servicer of browser logins."""

from typing import Any
from urllib.parse import quote

import grpc
from google.api.httpbody_pb2 import HttpBody
from sqlalchemy import bindparam
from sqlmodel import col, select

from controlplane.access.credentials import COOKIE
from controlplane.access.secrets import new_session_secret
from controlplane.accounts.model import Account
from controlplane.accounts.passwords import Passwords
from controlplane.api.v1 import sessions_pb2, sessions_pb2_grpc
from controlplane.clock import Clock
from controlplane.errors import BadLogin, NoProviderLogin, NotFound, Unauthenticated
from controlplane.ids import new_id
from controlplane.keys import Keys
from controlplane.rpc import paging
from controlplane.rpc.call import Call, current
from controlplane.sessions.cookies import clear_cookie, find_cookie, set_cookie
from controlplane.sessions.model import IDLE, LASTS, Session, idle_end, lock_all, to_proto
from controlplane.sessions.oidc import LASTS as OIDC_LASTS
from controlplane.sessions.oidc import Identity, OidcLogin
from controlplane.sessions.throttle import LoginThrottle
from controlplane.sql import Store

Context = grpc.aio.ServicerContext[Any, Any]

OIDC_COOKIE = "__Host-htx_oidc"
_MOST = 50  # logins of one account: a program that never logs out must not fill the table
_LONGEST_USER_AGENT = 200
_KEPT_IN_A_PATH = "/?#&=+,;:@!$'()*~%"  # RFC 3986, and what is encoded already

_ACCOUNT = select(Account).where(col(Account.email) == bindparam("email"), col(Account.disabled_at).is_(None))
_EMAIL = select(Account.email).where(col(Account.id) == bindparam("id"))
_LIVE = select(Session).where(
    col(Session.account_id) == bindparam("account_id"),
    col(Session.expires_at) > bindparam("now"),
    col(Session.last_used_at) > bindparam("idle_since"),
)
_BY_ID = _LIVE.where(col(Session.id) == bindparam("id"))
_LIST = _LIVE.where(col(Session.id) > bindparam("after")).order_by(col(Session.id)).limit(bindparam("limit"))
# Logins and changes of a password take turns; a resource that refers to the account need not wait for them.
_LOCKED = select(Account).with_for_update(key_share=True)


class SessionService(sessions_pb2_grpc.SessionServiceServicer):
    """Browser logins. `oidc` is the provider's own login, if there is one."""

    def __init__(
        self,
        *,
        store: Store,
        keys: Keys,
        clock: Clock,
        passwords: Passwords,
        throttle: LoginThrottle,
        oidc: OidcLogin | None,
    ) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._passwords = passwords
        self._throttle = throttle
        self._oidc = oidc

    async def CreateSession(self, request: sessions_pb2.CreateSessionRequest, context: Context) -> sessions_pb2.Session:
        """Log in; the answer carries the cookie.

        Raises BadLogin, RateLimited or Unavailable, in the same time and words for an unknown address and a wrong
        password.
        """
        call, wanted = current(), request.session
        email = wanted.email.strip().lower()
        found = await self._store.fetch(_ACCOUNT, {"email": email})
        password_hash = found[0].password_hash if found else None
        call.concerns = found[0].id if found else None
        # Before the transaction begins with its first statement: it would keep every other write waiting.
        if not await self._throttle.guess(
            email, call.client_ip, lambda: self._passwords.check(wanted.password, password_hash)
        ):
            raise BadLogin
        # The account may have been disabled, or its password changed, in the meantime.
        unchanged = _LOCKED.where(
            col(Account.id) == call.concerns,
            col(Account.password_hash) == password_hash,
            col(Account.disabled_at).is_(None),
        )
        account = (await call.session.scalars(unchanged)).one_or_none()
        if account is None:
            raise BadLogin
        return await self._begin(call, account, validate_only=request.validate_only)

    async def GetSession(self, request: sessions_pb2.GetSessionRequest, context: Context) -> sessions_pb2.Session:
        """Show who is logged in."""
        call = current()
        rows = await self._store.fetch(_BY_ID, {**self._live(call), "id": call.caller.credential_id})
        if not rows:
            raise Unauthenticated  # it has ended since the credential was looked up
        return _shown(call, rows[0], email=await self._email(call))

    async def DeleteSession(self, request: sessions_pb2.DeleteSessionRequest, context: Context) -> sessions_pb2.Session:
        """Log out: the login is gone with the commit."""
        call = current()
        return await self._end(call, call.caller.credential_id, validate_only=request.validate_only)

    async def ListSessions(
        self, request: sessions_pb2.ListSessionsRequest, context: Context
    ) -> sessions_pb2.ListSessionsResponse:
        """List the account's logins that still hold."""
        call = current()
        rows = await self._store.fetch(_LIST, {**self._live(call), **paging.bounds(request)})
        page, next_page = paging.cut(rows, request, call)
        email = await self._email(call)
        return sessions_pb2.ListSessionsResponse(
            sessions=[_shown(call, row, email=email) for row in page], next_page_token=next_page
        )

    async def RevokeSession(self, request: sessions_pb2.RevokeSessionRequest, context: Context) -> sessions_pb2.Session:
        """End one of the account's logins: it is gone with the commit.

        Raises NotFound.
        """
        return await self._end(current(), request.id, validate_only=request.validate_only)

    async def BeginSession(self, request: sessions_pb2.BeginSessionRequest, context: Context) -> HttpBody:
        """Send the browser to the provider's own login, with a cookie that it has to bring back.

        Raises NoProviderLogin, or Unavailable.
        """
        call = current()
        if self._oidc is None:
            raise NoProviderLogin
        redirect = await self._oidc.begin(request.return_to or "/")
        set_cookie(call, OIDC_COOKIE, redirect.cookie, seconds=int(OIDC_LASTS.total_seconds()))
        return _sent_to(call, redirect.location)

    async def FinishSession(self, request: sessions_pb2.FinishSessionRequest, context: Context) -> HttpBody:
        """Log in whoever comes back from the provider's own login, and send him on to where he wanted to go.

        Raises NoProviderLogin; BadLogin, for a login that cannot be completed and for a person without an account; or
        Unavailable.
        """
        call = current()
        if self._oidc is None:
            raise NoProviderLogin
        # It asks the issuer: before the transaction begins with its first statement.
        identity = await self._oidc.finish(
            code=request.code,
            state=request.state,
            error=request.error,
            iss=request.iss,
            cookie=find_cookie(call.metadata, OIDC_COOKIE),
        )
        account = await self._find_account(call, identity)
        call.concerns = account.id if account else None
        if account is None or account.disabled_at is not None:
            raise BadLogin("You are logged in at the provider, but there is no account here for you: ask for one.")
        call.target = (await self._begin(call, account)).id
        clear_cookie(call, OIDC_COOKIE)
        # A header takes ASCII only, and browsers drop tabs from it: "/<tab>/evil.example" would be another site.
        return _sent_to(call, quote(identity.return_to, safe=_KEPT_IN_A_PATH))

    async def _find_account(self, call: Call, identity: Identity) -> Account | None:
        """Return the account of a person, locked.

        It is the one that this person had before; else the one with his address, if he has proved that it is his and
        nobody else has come for it: it is his from then on.
        """
        known = await call.session.scalars(_LOCKED.where(col(Account.oidc_subject) == identity.subject))
        account = known.one_or_none()
        if account is not None or not identity.email or not identity.email_verified:
            return account
        email = identity.email.strip().lower()
        account = (await call.session.scalars(_LOCKED.where(col(Account.email) == email))).one_or_none()
        if account is None or account.oidc_subject not in {None, identity.subject}:
            return None
        account.oidc_subject = identity.subject
        return account

    async def _begin(self, call: Call, account: Account, *, validate_only: bool = False) -> sessions_pb2.Session:
        """Make a login for an account that this transaction has locked, and give the browser its cookie."""
        secret, now = new_session_secret(), self._clock.now()
        before = await lock_all(call.session, account.id)
        staying = [session.id for session in before if now < idle_end(session)][1 - _MOST :]
        for session in before:
            if session.id not in staying:
                await call.session.delete(session)
        session = Session(
            id=new_id("se"),
            account_id=account.id,
            secret_digest=self._keys.digest(secret),
            created_at=now,
            expires_at=now + LASTS,
            last_used_at=now,
            last_used_ip=call.client_ip,
            user_agent=call.metadata.get("user-agent", "")[:_LONGEST_USER_AGENT],
        )
        call.session.add(session)
        await call.session.flush()
        if not validate_only:
            set_cookie(call, COOKIE, secret, seconds=int(LASTS.total_seconds()))
        return to_proto(session, email=account.email, current=True)

    async def _end(self, call: Call, session_id: str, *, validate_only: bool) -> sessions_pb2.Session:
        """End a login of the caller's account.

        Raises NotFound; Unauthenticated if it is the one that asks, which something else has just ended.
        """
        is_mine = session_id == call.caller.credential_id
        found = await call.session.scalars(_BY_ID.with_for_update(), {**self._live(call), "id": session_id})
        session = found.one_or_none()
        if session is None:
            raise Unauthenticated if is_mine else NotFound("login", session_id)
        await call.session.delete(session)
        if is_mine and not validate_only:
            clear_cookie(call, COOKIE)
        return _shown(call, session, email=await self._email(call))

    def _live(self, call: Call) -> dict[str, Any]:
        """Return the parameters that say which logins of the caller's account still hold."""
        now = self._clock.now()
        return {"account_id": call.caller.account_id, "now": now, "idle_since": now - IDLE}

    async def _email(self, call: Call) -> str:
        email: str = (await self._store.fetch(_EMAIL, {"id": call.caller.account_id}))[0].email
        return email


def _shown(call: Call, session: Session, *, email: str) -> sessions_pb2.Session:
    return to_proto(session, email=email, current=session.id == call.caller.credential_id)


def _sent_to(call: Call, location: str) -> HttpBody:
    call.headers.append(("location", location))
    return HttpBody(content_type="text/plain")
