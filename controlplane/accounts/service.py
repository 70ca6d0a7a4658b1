"""The servicer of accounts: who is calling, and how much of the plan is used."""

from datetime import datetime
from typing import Any

import grpc
from google.protobuf.struct_pb2 import NULL_VALUE, Value
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import bindparam
from sqlmodel import col, select

from controlplane.access.quota import QuotaUse
from controlplane.accounts.model import Account, to_proto
from controlplane.api.v1 import accounts_pb2, accounts_pb2_grpc
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.rpc.call import current
from controlplane.sql import Store
from controlplane.tokens.model import Token, status_of

Context = grpc.aio.ServicerContext[Any, Any]

_ACCOUNT = select(Account).where(col(Account.id) == bindparam("id"))
_TOKEN = select(Token).where(col(Token.id) == bindparam("id"))
_USES = select(QuotaUse).where(col(QuotaUse.account_id) == bindparam("id"))


class AccountService(accounts_pb2_grpc.AccountServiceServicer):
    """The account that is calling."""

    def __init__(self, *, store: Store, catalog: Catalog, clock: Clock) -> None:
        self._store = store
        self._catalog = catalog
        self._clock = clock

    async def GetAccount(self, request: accounts_pb2.GetAccountRequest, context: Context) -> accounts_pb2.Account:
        """Show the account, and of each quota the limit and the use."""
        caller = current().caller
        rows = await self._store.fetch(_ACCOUNT, {"id": caller.account_id})
        used = {row.kind: row.used for row in await self._store.fetch(_USES, {"id": caller.account_id})}
        account = to_proto(rows[0])
        for kind, limit in self._catalog.plan(caller.plan).quotas:
            account.quotas[kind].CopyFrom(accounts_pb2.Quota(limit=limit, used=used.get(kind, 0)))
        return account

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
            me.token.CopyFrom(
                accounts_pb2.MyToken(
                    name=token.name,
                    permissions=sorted(caller.permissions),
                    created_at=token.created_at,
                    last_used_at=_nullable(None),
                    expires_at=_nullable(_rfc3339(token.expires_at)),
                    is_expired=status_of(token, self._clock.now()) == "expired",
                )
            )
        return me


def _nullable(text: str | None) -> Value:
    """Return a text as a JSON value that says null, and not nothing, when there is none."""
    return Value(null_value=NULL_VALUE) if text is None else Value(string_value=text)


def _rfc3339(time: datetime | None) -> str | None:
    if time is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp.ToJsonString()
