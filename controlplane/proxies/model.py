"""The tables of proxies and of what went through them, and which states a proxy has."""

from datetime import date, datetime, timedelta

from sqlalchemy import JSON, BigInteger, Index, UniqueConstraint
from sqlmodel import Field, SQLModel

from controlplane.api.v1 import proxies_pb2
from controlplane.hosts.model import Hosted
from controlplane.reconcile.due import due_indexes
from controlplane.reconcile.model import DELETING, progress_of
from controlplane.rpc.times import stamp
from controlplane.sql import UtcDateTime

# Each state that is not settled, and how long it may last before the proxy has failed, or its deletion is late.
PROVISIONING = "provisioning"
READY = "ready"
UPDATING = "updating"
EXPIRED = "expired"
DEADLINES = {
    PROVISIONING: timedelta(hours=1),
    UPDATING: timedelta(hours=1),
    DELETING: timedelta(hours=1),
}


class Proxy(Hosted, table=True):
    """A SOCKS5 proxy: one credential at one host.

    Of the password only a salted digest is kept. The limits are those of the plan when it was ordered or changed last.
    """

    __tablename__ = "proxies"
    __table_args__ = (
        UniqueConstraint("account_id", "name"),
        Index("ix_proxies_list", "account_id", "id"),
        *due_indexes("proxies"),
    )

    name: str
    region: str
    host_id: str = Field(index=True)
    address: str  # where its host takes connections, as host:port
    salt: bytes = Field(repr=False)
    password_digest: bytes = Field(repr=False)
    allowed_ips: list[str] = Field(default_factory=list, sa_type=JSON)
    max_connections: int
    bytes_per_second: int = Field(sa_type=BigInteger)  # 0: no limit
    expires_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    created_at: datetime = Field(sa_type=UtcDateTime)
    updated_at: datetime = Field(sa_type=UtcDateTime)

    def order_real(self, state: str, *, now: datetime) -> None:
        """Want what the row says to be in force at its host, `state` until it is."""
        if self.observed_generation == 0 and state != DELETING:
            state = PROVISIONING
        self.order(state, now=now, within=DEADLINES[state], waiting_on="the proxy's host")
        self.updated_at = now


class Traffic(SQLModel):
    """What went through a proxy: bytes of payload, and connections that were opened."""

    bytes_up: int = Field(default=0, sa_type=BigInteger)
    bytes_down: int = Field(default=0, sa_type=BigInteger)
    connections: int = Field(default=0, sa_type=BigInteger)


class ProxyUsage(Traffic, table=True):
    """What went through a proxy on one day (UTC)."""

    __tablename__ = "proxy_usage"

    proxy_id: str = Field(primary_key=True, foreign_key="proxies.id", ondelete="CASCADE")
    day: date = Field(primary_key=True)


class ProxyCounter(Traffic, table=True):
    """How far a host's process had counted when it was last added up, so that a report can be repeated."""

    __tablename__ = "proxy_counters"

    proxy_id: str = Field(primary_key=True, foreign_key="proxies.id", ondelete="CASCADE")
    process: str = Field(primary_key=True)


def to_proto(proxy: Proxy, *, password: str | None = None) -> proxies_pb2.Proxy:
    """Return the proxy as the API shows it; the password only where it has just been made."""
    host, _, port = proxy.address.rpartition(":")
    return proxies_pb2.Proxy(
        id=proxy.id,
        name=proxy.name,
        status=proxy.state,
        region=proxy.region,
        host=host.strip("[]"),
        port=int(port),
        username=proxy.id,
        password=password,
        allowed_ips=proxy.allowed_ips,
        max_connections=proxy.max_connections,
        bytes_per_second=proxy.bytes_per_second or None,
        expires_at=stamp(proxy.expires_at),
        created_at=stamp(proxy.created_at),
        updated_at=stamp(proxy.updated_at),
        generation=proxy.generation,
        observed_generation=proxy.observed_generation,
        progress=progress_of(proxy),
    )


def sequence_of(host_id: str) -> str:
    """Return the name of the sequence that a host of proxies follows."""
    return f"proxies/{host_id}"
