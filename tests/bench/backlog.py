"""How fast the reconciler works off a backlog: databases that are all at once to be made, looked at, and removed."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from sqlalchemy import Executable, bindparam, func, update
from sqlmodel import col, select

from controlplane.access.quota import QuotaCharge, QuotaUse
from controlplane.databases.model import DEADLINES, PROVISIONING, ClusterUse, Database, password_binding
from controlplane.databases.names import prefix_of_ours
from controlplane.events.model import Event
from controlplane.ids import new_id
from controlplane.keys import Keys
from controlplane.reconcile.model import DELETING
from controlplane.settings import Settings
from controlplane.sql import Store
from tests.bench.bare import Work, record
from tests.bench.clusters import Cluster, new_storage, new_target
from tests.bench.ours import SERVE, CallError, Ours, new_settings, serving
from tests.bench.report import Aim
from tests.bench.seed import open_account
from tests.stack import eventually

Order = Callable[[], Awaitable[datetime]]

FAKED = ("-m", "tests.bench.faked")
_AT_ONCE = 8  # as many as the reconciler takes
_MANY = 10_000
_FIRST = 300
_MOST_GROWTH = 1.3  # times
_SECONDS = 300.0
_NEVER_LOOKED_AT = select(func.count()).where(col(Database.connections).is_(None))
_READY, _DELETED = (
    select(func.count(), func.min(Event.created_at), func.max(Event.created_at)).where(
        col(Event.type) == type_, col(Event.created_at) > bindparam("since")
    )
    for type_ in ("database.ready", "database.deleted")
)
_LOOKED_AT = select(func.count(), func.min(Database.observed_at), func.max(Database.observed_at)).where(
    col(Database.observed_at) > bindparam("since")
)


@dataclass(frozen=True, slots=True)
class Rate:
    """How many databases a second were made, looked at and removed; the server's CPU in ms for each, its MB after."""

    title: str
    databases: int
    made: float
    looked_at: float | None = None
    removed: float | None = None
    cpu: tuple[float, ...] = ()
    process_mb: float | None = None


class Backlog:
    """The rates, as a part of the report."""

    name = "backlog"

    def __init__(self, rates: Sequence[Rate]) -> None:
        self._rates = rates

    def text(self) -> list[str]:
        """Return it for a person to read."""
        row = "{:<46} {:>9} {:>8} {:>11} {:>10} {:>24} {:>7}"
        head = ("", "databases", "made/s", "looked at/s", "removed/s", "CPU ms of each", "MB")
        return [
            "The reconciler on a backlog: all databases ordered at once, all due for a look, all ordered away.",
            "",
            row.format(*head),
            *(row.format(*_cells(rate)) for rate in self._rates),
            "",
            "From the first to the last, as the server itself dates them. CPU ms: of the server, for each one made,",
            "looked at, removed. Without a cluster it shows what the reconciler itself can do. SQLite waits for the",
            "disk at each commit; the PostgreSQL of this run does not (fsync = off).",
        ]

    def aims(self) -> list[Aim]:
        """Return what is aimed at and what was reached."""
        *_, few, many, _ = self._rates
        growth = many.cpu[0] / few.cpu[0]
        text = f"making one of {many.databases:,} takes the CPU of one of {few.databases:,}"
        return [Aim(text, f"{growth:.2f}", growth <= _MOST_GROWTH)]

    def facts(self) -> dict[str, Any]:
        """Return it for programs."""
        return {"rates": [asdict(rate) for rate in self._rates]}


async def measure_backlog(
    folder: Path, catalog: Path, cluster: Cluster, *, databases: int = 200, faked: int = 1_000
) -> Backlog:
    """Make and remove so many databases on a PostgreSQL, and so many on a cluster that does nothing.

    Raises CallError if one does not come to its end.
    """
    real = new_settings(folder / "backlog", catalog)
    on_sqlite = new_settings(folder / "faked", catalog)
    many = new_settings(folder / "many", catalog)
    url = await new_storage(cluster, "faked")
    on_postgresql = new_settings(folder / "faked-postgresql", catalog, database_url=url)
    return Backlog(
        [
            await _by_hand(cluster, databases),
            await _ours("PostgreSQL, the reconciler, over SQLite", real, databases),
            await _ours("no cluster, the reconciler, over SQLite", on_sqlite, faked, program=FAKED),
            await _first_of_many("the same, the first of many", many, _MANY),
            await _ours("no cluster, the reconciler, over PostgreSQL", on_postgresql, faked, program=FAKED),
        ]
    )


async def _by_hand(cluster: Cluster, databases: int) -> Rate:
    names = [new_target().name for _ in range(databases)]
    make, remove = await record(cluster)
    made = await _all_at_once([make(name) for name in names])
    removed = await _all_at_once([remove(name) for name in names])
    return Rate(f"PostgreSQL, the statements by hand, {_AT_ONCE} at once", databases, made, None, removed)


async def _ours(title: str, settings: Settings, databases: int, *, program: Sequence[str] = SERVE) -> Rate:
    """Have a server with these settings make and remove so many databases."""
    store, keys = Store(settings.storage_url), Keys.load(settings.keys_path)
    try:
        account_id, _ = await open_account(store, keys)
        with serving(settings, program=program) as ours:
            works = (
                (partial(_order, store, keys, account_id, databases), _READY),
                (partial(_order_looks, store), _LOOKED_AT),
                (partial(_order_away, store), _DELETED),
            )
            done = [await _work_off(ours, store, order, ends, databases) for order, ends in works]
            made, looked_at, removed = (rate for rate, _ in done)
            memory, _ = ours.server.memory()
            return Rate(title, databases, made, looked_at, removed, tuple(cpu for _, cpu in done), memory)
    finally:
        await store.close()


async def _first_of_many(title: str, settings: Settings, databases: int) -> Rate:
    """Have a server make the first of so many databases, to see what the others cost that wait."""
    store, keys = Store(settings.storage_url), Keys.load(settings.keys_path)
    try:
        account_id, _ = await open_account(store, keys)
        with serving(settings, program=FAKED) as ours:
            order = partial(_order, store, keys, account_id, databases)
            made, cpu = await _work_off(ours, store, order, _READY, _FIRST)
            return Rate(title, databases, made, cpu=(cpu,), process_mb=ours.server.memory()[0])
    finally:
        await store.close()


async def _work_off(ours: Ours, store: Store, order: Order, ends: Executable, databases: int) -> tuple[float, float]:
    """Return how many a second were worked off until so many were, and the server's CPU in ms for each.

    `order` returns when it ordered them; `ends` counts those that came to their end since, and says when the first and
    the last did. Raises CallError if too few do.
    """
    since = await order()
    cpu = ours.server.cpu_seconds()
    count, until = 0, perf_counter() + _SECONDS
    while count < databases:
        if perf_counter() > until:
            raise CallError(f"Of {databases} databases {count} came to their end in {_SECONDS:.0f} s: {ends}")
        await asyncio.sleep(0.05)
        count, first, last = (await store.fetch(ends, {"since": since}))[0]
    cpu = ours.server.cpu_seconds() - cpu
    return (count - 1) / (last - first).total_seconds(), cpu * 1000 / count


async def _order(store: Store, keys: Keys, account_id: str, number: int) -> datetime:
    """Put orders there as the servicer would, all in one transaction."""
    now, prefix = datetime.now(UTC), await prefix_of_ours(store)
    async with store.session() as session:
        for place in range(number):
            database_id = new_id("db")
            row = Database(
                id=database_id,
                account_id=account_id,
                name=f"backlog-{place}",
                object_name=prefix + database_id.partition("_")[2],
                engine="postgresql",
                sku="db-s-1vcpu-2gb",
                region="local",
                cluster_target="local-postgresql",
                state=PROVISIONING,
                generation=0,
                observed_generation=0,
                password_sealed="",
                created_at=now,
                updated_at=now,
            )
            row.password_sealed = keys.encrypt(b"correct horse battery staple", bound_to=password_binding(row))
            row.order_real(PROVISIONING, now=now)
            session.add_all([row, QuotaCharge(resource_id=row.id, account_id=account_id, kind="databases")])
        session.add(QuotaUse(account_id=account_id, kind="databases", used=number))
        session.add(ClusterUse(cluster="local-postgresql", used=number))
        await session.commit()
    return now


async def _order_looks(store: Store) -> datetime:
    """Let all be due for a look, as after a night in which no server ran."""

    async def no_look_is_under_way() -> bool:
        return not (await store.fetch(_NEVER_LOOKED_AT))[0][0]

    # The first look comes soon after a database was made. One that ended after the order would undo it.
    await eventually(no_look_is_under_way, seconds=_SECONDS)
    now = datetime.now(UTC)
    async with store.session() as session:
        await session.execute(update(Database).values(next_attempt_at=now))
        await session.commit()
    return now


async def _order_away(store: Store) -> datetime:
    now = datetime.now(UTC)
    async with store.session() as session:
        for row in await session.scalars(select(Database)):
            row.order(DELETING, now=now, within=DEADLINES[DELETING], waiting_on="cluster local-postgresql")
        await session.commit()
    return now


async def _all_at_once(works: Sequence[Work]) -> float:
    """Return how many of these were done a second."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def do(work: Work) -> None:
        async with room:
            await work()

    began = perf_counter()
    await asyncio.gather(*map(do, works))
    return len(works) / (perf_counter() - began)


def _cells(rate: Rate) -> tuple[str, ...]:
    rates = [f"{each:.1f}" if each is not None else "" for each in (rate.made, rate.looked_at, rate.removed)]
    cpu = ", ".join(f"{each:.1f}" for each in rate.cpu)
    return rate.title, f"{rate.databases:,}", *rates, cpu, f"{rate.process_mb:.0f}" if rate.process_mb else ""
