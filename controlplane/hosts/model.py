"""The table of hosts, and the sequences of what they are to hold."""

from datetime import datetime, timedelta

from sqlalchemy import JSON, BigInteger, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import Field, SQLModel, col, select

from controlplane.clock import Clock
from controlplane.reconcile.model import Reconciled
from controlplane.sql import Store, UtcDateTime

# A host asks at least every five seconds; one that has not for so long is away, and nobody waits for it.
LIVE_FOR = timedelta(seconds=15)
# As a rule a host has taken an order over before that; it is not asked about sooner.
_PATIENCE = timedelta(seconds=1)

_ADVANCE = text(
    "INSERT INTO host_sequences (scope, sequence) VALUES (:scope, 1)"
    " ON CONFLICT (scope) DO UPDATE SET sequence = host_sequences.sequence + 1 RETURNING sequence"
)


class Host(SQLModel, table=True):
    """A data plane's process, which proves who it is by a secret of its own.

    `address` is where it is reached: by customers as `host:port` if it carries proxies, by us and the edge as
    `unix:PATH` or `host:port` if it runs functions. `capacity` is how many proxies it takes. `instance` names its
    present start; everything up to the place `applied` in its sequence is in force there.
    """

    __tablename__ = "hosts"

    id: str = Field(primary_key=True)
    kind: str
    name: str = Field(unique=True)
    region: str
    address: str = ""
    capacity: int = 0
    used: int = 0
    runtimes: list[str] = Field(default_factory=list, sa_type=JSON)
    network: bool = False
    secret_digest: str = Field(unique=True, repr=False)
    instance: str | None = None
    applied: int = Field(default=0, sa_type=BigInteger)
    last_seen_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    created_at: datetime = Field(sa_type=UtcDateTime)


class HostSequence(SQLModel, table=True):
    """The last place that was given away of a sequence that hosts follow."""

    __tablename__ = "host_sequences"

    scope: str = Field(primary_key=True)
    sequence: int = Field(default=0, sa_type=BigInteger)


class Hosted(Reconciled):
    """What the hosts that follow a sequence are to hold; `host_sequence` is the place of its last change there."""

    host_sequence: int = Field(default=0, sa_type=BigInteger, index=True)

    async def hand_over(self, session: AsyncSession, scope: str, *, now: datetime) -> None:
        """Let the hosts that follow a sequence take the row over as it is now.

        The sequence stays locked until the commit: so places are committed in their order, and a host that has seen
        one has seen all before it. Call it as the last thing but for the record and the feed.
        """
        self.host_sequence = (await session.execute(_ADVANCE, {"scope": scope})).scalar_one()
        self.next_attempt_at = now + _PATIENCE


async def live_hosts(store: Store, clock: Clock, *, kind: str, region: str) -> list[Host]:
    """Return the hosts of a region that have asked lately, as rows of columns."""
    seen = col(Host.last_seen_at) > clock.now() - LIVE_FOR
    rows = select(Host).where(col(Host.kind) == kind, col(Host.region) == region, seen, col(Host.instance).is_not(None))
    return list(await store.fetch(rows.order_by(col(Host.id))))
