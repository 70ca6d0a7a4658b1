"""The table of accounts."""

from datetime import datetime

from sqlalchemy import Index
from sqlmodel import Field, SQLModel

from controlplane.api.v1 import accounts_pb2
from controlplane.rpc.times import stamp
from controlplane.sql import UtcDateTime


class Account(SQLModel, table=True):
    """A customer's account.

    The address is kept in lower case; the password only as an argon2id hash, which is empty where there is none.
    `oidc_subject` is who it is at the provider's own login, as `ISSUER|SUBJECT`, once somebody came from there.
    """

    __tablename__ = "accounts"
    __table_args__ = (Index("ix_accounts_oidc_subject", "oidc_subject", unique=True),)

    id: str = Field(primary_key=True)
    email: str = Field(unique=True)
    password_hash: str = Field(repr=False)
    plan: str
    first_name: str | None = None
    last_name: str | None = None
    company_name: str | None = None
    created_at: datetime = Field(sa_type=UtcDateTime)
    disabled_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    oidc_subject: str | None = None


def to_proto(account: Account) -> accounts_pb2.Account:
    """Return the account as the API shows it, without its quotas."""
    return accounts_pb2.Account(
        id=account.id,
        email=account.email,
        first_name=account.first_name,
        last_name=account.last_name,
        company_name=account.company_name,
        plan=account.plan,
        created_at=stamp(account.created_at),
    )
