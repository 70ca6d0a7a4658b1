"""The servicer of accounts: who is calling, how much of the plan is used, and the password."""

from datetime import datetime
from typing import Any

import grpc
from google.protobuf.struct_pb2 import NULL_VALUE, Value
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import bindparam, update
from sqlmodel import col, select

from controlplane.access.credentials import COOKIE
from controlplane.access.quota import QuotaUse
from controlplane.access.secrets import new_session_secret
from controlplane.accounts.model import Account, to_proto
from controlplane.accounts.passwords import Passwords
from controlplane.api.v1 import accounts_pb2, accounts_pb2_grpc
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.errors import BrokenRule, Conflict, InvalidField, Unauthenticated
from controlplane.keys import Keys
from controlplane.rpc.call import Call, current
from controlplane.sessions.cookies import set_cookie
from controlplane.sessions.model import lock_all
from controlplane.sessions.throttle import LoginThrottle
from controlplane.sql import Store
from controlplane.tokens.model import Token, TokenUse, status_of

Context = grpc.aio.ServicerContext[Any, Any]

_ACCOUNT = select(Account).where(col(Account.id) == bindparam("id"))
_TOKEN = select(Token).where(col(Token.id) == bindparam("id"))
_USE = select(TokenUse).where(col(TokenUse.token_id) == bindparam("id"))
_QUOTAS = select(QuotaUse).where(col(QuotaUse.account_id) == bindparam("id"))


class AccountService(accounts_pb2_grpc.AccountServiceServicer):
    """The account that is calling."""

    def __init__(
        self,
        *,
        store: Store,
        catalog: Catalog,
        keys: Keys,
        clock: Clock,
        passwords: Passwords,
        throttle: LoginThrottle,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._keys = keys
        self._clock = clock
        self._passwords = passwords
        self._throttle = throttle

    async def GetAccount(self, request: accounts_pb2.GetAccountRequest, context: Context) -> accounts_pb2.Account:
        """Show the account, and of each quota the limit and the use."""
        call = current()
        rows = await self._store.fetch(_ACCOUNT, {"id": call.caller.account_id})
        return await self._shown(call, rows[0])

    async def ChangePassword(
        self, request: accounts_pb2.ChangePasswordRequest, context: Context
    ) -> accounts_pb2.Account:
        """Give the account another password; every other login of it is over with the commit.

        Raises InvalidField for a wrong current password and for a new one that is the same; RateLimited and Unavailable
        as a login does; Conflict for an account without a password, and for the later of two changes at once.
        """
        call, wanted = current(), request.password
        if wanted.new_password == wanted.current_password:
            raise InvalidField(BrokenRule("new_password", "must be another than the current one"))
        account = (await self._store.fetch(_ACCOUNT, {"id": call.caller.account_id}))[0]
        if not account.password_hash:
            raise Conflict("The account has no password to change: it is logged in to at the provider's own login.")
        # What takes long comes before the transaction begins with its first statement.
        if not await self._throttle.guess(
            account.email,
            call.client_ip,
            lambda: self._passwords.check(wanted.current_password, account.password_hash),
        ):
            raise InvalidField(BrokenRule("current_password", "is not the account's password"))
        password_hash = await self._passwords.hash(wanted.new_password)
        changed = await call.session.execute(
            update(Account)
            .where(col(Account.id) == account.id, col(Account.password_hash) == account.password_hash)
            .values(password_hash=password_hash)
            .returning(col(Account.id))
        )
        if changed.one_or_none() is None:
            raise Conflict("The password was changed by another request at the same time: log in with that one.")
        await self._end_other_logins(call, validate_only=request.validate_only)
        return await self._shown(call, account)

    async def GetMe(self, request: accounts_pb2.GetMeRequest, context: Context) -> accounts_pb2.Me:
        """Show the account and the token of this request."""
        caller = current().caller
        account = (await self._store.fetch(_ACCOUNT, {"id": caller.account_id}))[0]
        me = accounts_pb2.Me(
            account=accounts_pb2.MyAccount(
                email=account.email,
                first_name=_nullable(account.first_name),
                last_name=_nullable(account.last_name),
                company_name=_nullable(account.company_name),
                created_at=account.created_at.date().isoformat(),
            )
        )
        if caller.kind == "token":
            token = (await self._store.fetch(_TOKEN, {"id": caller.credential_id}))[0]
            uses = await self._store.fetch(_USE, {"id": caller.credential_id})
            me.token.CopyFrom(
                accounts_pb2.MyToken(
                    name=token.name,
                    permissions=sorted(caller.permissions),
                    created_at=token.created_at,
                    last_used_at=_nullable(_rfc3339(uses[0].last_used_at if uses else None)),
                    expires_at=_nullable(_rfc3339(token.expires_at)),
                    is_expired=status_of(token, self._clock.now()) == "expired",
                )
            )
        return me

    async def _end_other_logins(self, call: Call, *, validate_only: bool) -> None:
        """End the account's logins but for this one, which gets another cookie: somebody may have a copy of the old.

        Raises Unauthenticated if this one has been ended in the meantime.
        """
        logins = {login.id: login for login in await lock_all(call.session, call.caller.account_id)}
        mine = logins.pop(call.caller.credential_id, None)
        if mine is None:
            raise Unauthenticated
        for other in logins.values():
            await call.session.delete(other)
        secret = new_session_secret()
        mine.secret_digest = self._keys.digest(secret)
        if not validate_only:
            left = mine.expires_at - self._clock.now()
            set_cookie(call, COOKIE, secret, seconds=int(left.total_seconds()))

    async def _shown(self, call: Call, account: Account) -> accounts_pb2.Account:
        used = {row.kind: row.used for row in await self._store.fetch(_QUOTAS, {"id": account.id})}
        shown = to_proto(account)
        for kind, limit in self._catalog.plan(call.caller.plan).quotas:
            shown.quotas[kind].CopyFrom(accounts_pb2.Quota(limit=limit, used=used.get(kind, 0)))
        return shown


def _nullable(text: str | None) -> Value:
    """Return a text as a JSON value that says null, and not nothing, when there is none."""
    return Value(null_value=NULL_VALUE) if text is None else Value(string_value=text)


def _rfc3339(time: datetime | None) -> str | None:
    if time is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp.ToJsonString()
