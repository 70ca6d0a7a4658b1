"""Which cluster a new database goes to: the one with the most room, never beyond its capacity."""

import structlog
from sqlalchemy import CursorResult, text
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.catalog.model import Catalog, Cluster
from controlplane.errors import Conflict

_log = structlog.get_logger("placement")

_USES = text("SELECT cluster, used FROM cluster_uses")
_OPEN = text("INSERT INTO cluster_uses (cluster, used) VALUES (:cluster, 0) ON CONFLICT DO NOTHING")
_TAKE = text("UPDATE cluster_uses SET used = used + 1 WHERE cluster = :cluster AND used < :capacity")
_LEAVE = text("UPDATE cluster_uses SET used = used - 1 WHERE cluster = :cluster")


async def place(session: AsyncSession, catalog: Catalog, *, engine: str, region: str) -> Cluster:
    """Choose a cluster and take a place on it, in the transaction of the create.

    Raises Conflict when there is no cluster for it, or none with room.
    """
    there = catalog.clusters_for(engine=engine, region=region)
    clusters = [cluster for cluster in there if not cluster.drained]
    if not clusters:
        has = ", ".join(catalog.engines_in(region)) or "nothing yet"
        raise Conflict(
            f"The region '{region}' has no {engine}, it has {has}: /api/portal/regions shows what can be ordered where."
        )
    counted: dict[str, int] = {row.cluster: row.used for row in await session.execute(_USES)}
    uses = dict.fromkeys((cluster.name for cluster in clusters), 0) | counted
    for cluster in sorted(clusters, key=lambda cluster: uses[cluster.name] - cluster.capacity):
        if cluster.name not in counted:
            await session.execute(_OPEN, {"cluster": cluster.name})
        # The condition decides, not the numbers read above: they may be old by now.
        taken = await session.execute(_TAKE, {"cluster": cluster.name, "capacity": cluster.capacity})
        if isinstance(taken, CursorResult) and taken.rowcount:
            _log.info(
                "placed",
                cluster=cluster.name,
                engine=engine,
                region=region,
                candidates={entry.name: f"{uses[entry.name]} of {entry.capacity} used" for entry in clusters},
                drained=[entry.name for entry in there if entry.drained],
            )
            return cluster
    raise Conflict(f"The region '{region}' has no room for another {engine} database right now. Try another region.")


async def leave(session: AsyncSession, cluster: str) -> None:
    """Give a place back, in the transaction that removes the database's row."""
    await session.execute(_LEAVE, {"cluster": cluster})
