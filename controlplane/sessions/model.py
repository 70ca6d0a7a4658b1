"""The table of browser logins."""

from datetime import datetime

from sqlmodel import Field, SQLModel

from controlplane.sql import UtcDateTime


class Session(SQLModel, table=True):
    """A browser login. Of the cookie only a keyed digest is kept."""

    __tablename__ = "sessions"

    id: str = Field(primary_key=True)
    account_id: str = Field(foreign_key="accounts.id", index=True)
    secret_digest: str = Field(unique=True, repr=False)
    created_at: datetime = Field(sa_type=UtcDateTime)
    expires_at: datetime = Field(sa_type=UtcDateTime)
