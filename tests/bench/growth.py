"""What a longer table costs: a page of the list, the server's memory, and the reconciler when it has nothing to do."""

import asyncio
import base64
import sqlite3
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg
from sqlalchemy import bindparam, text

from controlplane.accounts.model import Account
from controlplane.keys import Keys
from controlplane.migrations import migrate
from controlplane.settings import Settings
from controlplane.sql import Store, UtcDateTime
from tests.bench.clusters import Cluster, new_storage
from tests.bench.ours import Caller, Ours, new_settings, serving
from tests.bench.report import Aim, percentile
from tests.bench.seed import token_of

SIZES = (10, 1_000, 100_000)
_FULL = 1_000  # the least size with pages that are full
_PAGE = 100
_OTHERS = 100  # accounts, which have as many databases together as ours has alone
_WARM = 20
_SECONDS_TO_COUNT = 10  # after so long without work a session of PostgreSQL tells how busy it was (pgstat.c)
_NO_LOOK = timedelta(days=1)  # what looks cost, the backlog shows
# Times; a page must cost what it shows. A long table has more of its rows outside the database's own cache, no more.
_MOST_GROWTH = 1.3
_MOST_IDLE_GROWTH = 1.5  # times; the CPU time is counted in hundredths of a second, of which there are about ten

# Ids in their order, dealt out in turn: the rows of one account lie apart, as they do when customers come and go.
_FILL = text(
    "INSERT INTO databases (id, account_id, name, object_name, engine, sku, region, cluster_target, tags, state,"
    " generation, observed_generation, attempts, deletion_protection, stopped, password_sealed, created_at,"
    " updated_at, next_attempt_at)"
    " WITH RECURSIVE numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < :rows)"
    " SELECT 'db_06fq2v9n7ke4w0xg' || CAST(1000000000 + n AS VARCHAR),"
    " 'ac_' || CAST(CASE WHEN n % 2 = 0 THEN 0 ELSE 1 + n / 2 % :others END AS VARCHAR),"
    " 'analytics-' || CAST(n AS VARCHAR), 'h_' || CAST(n AS VARCHAR), 'postgresql', 'db-s-1vcpu-2gb', 'local',"
    " 'local-postgresql', '{\"env\": \"production\"}', 'ready', 1, 1, 0, false, false,"
    " 'k1:2Vtq0bq8yC3Qk1Z7m5R9x4uWJd6sLhNf0aGeTzPiXoYvBcKrMwUnAj8l', :at, :at, :later FROM numbers"
).bindparams(bindparam("at", type_=UtcDateTime), bindparam("later", type_=UtcDateTime))
_PLACE = text("SELECT id FROM databases WHERE account_id = :account_id ORDER BY id LIMIT 1 OFFSET :place")


@dataclass(slots=True)
class Pages:
    """An account whose list was read page by page: its rows, all rows of the table, and the ms of each page."""

    storage: str
    rows: int
    table: int
    took: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Idle:
    """A server with settled rows that nobody asks: its memory after the pages, and CPU seconds a minute.

    `database_cpu` is the time that PostgreSQL was busy for it; SQLite's is in the server's.
    """

    storage: str
    table: int
    process_mb: float
    cpu: float
    database_cpu: float


class Growth:
    """The results, as a part of the report."""

    name = "growth"

    def __init__(self, pages: Sequence[Pages], idle: Sequence[Idle], *, seconds: int) -> None:
        self._pages = pages
        self._idle = idle
        self._seconds = seconds

    def text(self) -> list[str]:
        """Return it for a person to read."""
        row = "{:<12} {:>12} {:>12} {:>8} {:>8} {:>26}"
        idle = "{:<12} {:>12} {:>12} {:>18} {:>18}"
        rounds = len(self._pages[0].took)
        return [
            f"GET /api/portal/databases?page_size={_PAGE} through Envoy: the first page, one in the middle and the",
            f"last in turn, {rounds} of each account, the order rotating; ms. Half of a table is one account's, the",
            f"other half belongs to {_OTHERS} others.",
            "",
            row.format("", "own rows", "all rows", "p50", "p99", f"÷ {_FULL:,} of {2 * _FULL:,}"),
            *(row.format(*self._cells(pages)) for pages in self._pages),
            "",
            "The ratios are those of the first page, one in the middle and the last, each by its tenth percentile. On",
            "SQLite something is committed before each request, so that no answer is one remembered from before.",
            "",
            idle.format("", "settled rows", "MB (RSS)", "CPU s a minute", "of PostgreSQL"),
            *(
                idle.format(one.storage, f"{one.table:,}", f"{one.process_mb:.0f}", f"{one.cpu:.2f}", _of(one))
                for one in self._idle
            ),
            "",
            "Memory after those pages; CPU while nobody asks and nothing is due, all servers side by side for",
            f"{self._seconds} s: the reconciler's search, the readiness and a server's other small tasks together.",
        ]

    def aims(self) -> list[Aim]:
        """Return what is aimed at and what was reached."""
        aims = []
        for storage in dict.fromkeys(pages.storage for pages in self._pages):
            own, others = self._ratios(self._find(storage, SIZES[-1])), self._ratios(self._find_among_others(storage))
            for words, ratios in (("rows of one's own", own), ("rows of others", others)):
                page = f"{storage}: a page no dearer with {SIZES[-1]:,} {words}"
                aims.append(Aim(page, _listed(ratios), max(ratios) <= _MOST_GROWTH))
            least, *_, most = (one.cpu + one.database_cpu for one in self._idle if one.storage == storage)
            idle = f"{storage}: an idle server no dearer with {2 * SIZES[-1]:,} rows"
            aims.append(Aim(idle, f"{most / least:.2f}", most / least <= _MOST_IDLE_GROWTH))
        return aims

    def facts(self) -> dict[str, Any]:
        """Return it for programs."""
        return {
            "pages": [{**asdict(pages), "ratios": self._ratios(pages)} for pages in self._pages],
            "idle": [asdict(one) for one in self._idle],
        }

    def _cells(self, pages: Pages) -> tuple[str, ...]:
        ratios = "" if pages.rows < _PAGE else "1" if pages.table == 2 * _FULL else _listed(self._ratios(pages))
        p50, p99 = f"{median(pages.took):.1f}", f"{percentile(pages.took, 99):.1f}"
        return pages.storage, f"{pages.rows:,}", f"{pages.table:,}", p50, p99, ratios

    def _ratios(self, pages: Pages) -> list[float]:
        """Return how many times as long as in the small table the first page took, one in the middle, and the last.

        By the tenth percentile of each: what is slower was slowed by something else on the machine.
        """
        small = self._find(pages.storage, _FULL)
        return [percentile(pages.took[place::3], 10) / percentile(small.took[place::3], 10) for place in range(3)]

    def _find(self, storage: str, rows: int) -> Pages:
        return next(pages for pages in self._pages if (pages.storage, pages.rows) == (storage, rows))

    def _find_among_others(self, storage: str) -> Pages:
        wanted = (storage, _FULL, 2 * SIZES[-1])
        return next(pages for pages in self._pages if (pages.storage, pages.rows, pages.table) == wanted)


async def measure_growth(
    folder: Path, catalog: Path, postgres: Cluster, *, rounds: int = 100, seconds: int = 20
) -> Growth:
    """Fill storages of each size on SQLite and on this PostgreSQL, and ask a server over each of them."""
    with ExitStack() as stack:
        servers = []
        for storage, rows in product(("SQLite", "PostgreSQL"), SIZES):
            url = "" if storage == "SQLite" else await new_storage(postgres, f"storage_{rows}")
            settings = new_settings(folder / f"{storage}-{rows}", catalog, database_url=url)
            servers.append(await _server(stack, settings, storage, rows, postgres.admin_url))
        readers = [reader for server in servers for reader in server.readers]
        for number in range(-_WARM, rounds):
            for place in range(len(readers)):
                readers[(number + place) % len(readers)].read(number)
        await asyncio.sleep(_SECONDS_TO_COUNT)
        before = [await server.busy() for server in servers]
        await asyncio.sleep(seconds)
        after = [await server.busy() for server in servers]
        idle = [
            server.idle([60 * (late - early) / seconds for early, late in zip(*pair, strict=True)])
            for server, *pair in zip(servers, before, after, strict=True)
        ]
        return Growth([reader.pages for reader in readers], idle, seconds=seconds)


async def _server(stack: ExitStack, settings: Settings, storage: str, rows: int, admin_url: str) -> "_Server":
    """Fill a storage and start a server over it."""
    store, keys = Store(settings.storage_url), Keys.load(settings.keys_path)
    try:
        tokens = await _fill(store, keys, rows)
        # Each of the others has a hundredth of the rows: in the largest storage as many as the account of the middle.
        wanted = {0: rows} if rows != SIZES[-1] else {0: rows, 1: rows // _OTHERS}
        places = {account: await _places(store, account, own) for account, own in wanted.items()}
    finally:
        await store.close()
    ours = stack.enter_context(serving(settings))
    readers = [
        _Reader(stack, ours, Pages(storage, own, 2 * rows), tokens[account], places[account])
        for account, own in wanted.items()
    ]
    return _Server(ours, storage, 2 * rows, admin_url, readers)


class _Server:
    """A running server, with those who read from it."""

    def __init__(self, ours: Ours, storage: str, table: int, admin_url: str, readers: "list[_Reader]") -> None:
        self.readers = readers
        self._ours = ours
        self._storage = storage
        self._table = table
        self._admin_url = admin_url

    async def busy(self) -> tuple[float, float]:
        """Return the CPU seconds of the server so far, and those that PostgreSQL was busy in its storage."""
        database = 0.0
        if self._storage == "PostgreSQL":
            admin = await asyncpg.connect(self._admin_url)
            name = f"storage_{self._table // 2}"
            database = await admin.fetchval("SELECT active_time FROM pg_stat_database WHERE datname = $1", name)
            await admin.close()
        return self._ours.server.cpu_seconds(), database / 1000

    def idle(self, a_minute: Sequence[float]) -> Idle:
        """Return what it takes while nobody asks."""
        cpu, database = a_minute
        return Idle(self._storage, self._table, self._ours.server.memory()[0], cpu, database)


class _Reader:
    """Reads the pages of one account."""

    def __init__(self, stack: ExitStack, ours: Ours, pages: Pages, token: str, places: Sequence[str]) -> None:
        self.pages = pages
        self._caller = stack.enter_context(closing(Caller(ours, token)))
        self._places = places
        self._file = None
        if pages.storage == "SQLite":
            path = ours.settings.data_dir / "controlplane.db"
            self._file = stack.enter_context(closing(sqlite3.connect(path, timeout=10, isolation_level=None)))

    def read(self, number: int) -> None:
        """Read a page; before the first round only to warm up."""
        if self._file is not None:
            self._file.execute("INSERT OR REPLACE INTO cluster_uses VALUES ('of-the-benchmark', 0)")
        place = self._places[number % len(self._places)]
        _, took = self._caller.ask("GET", f"/api/portal/databases?page_size={_PAGE}{place}")
        if number >= 0:
            self.pages.took.append(took)


async def _fill(store: Store, keys: Keys, rows: int) -> list[str]:
    """Make the accounts and their databases; return a token of each account."""
    await migrate(store)
    now = datetime.now(UTC)
    accounts = [
        Account(id=f"ac_{n}", email=f"{n}@example.com", password_hash="", plan="bench", created_at=now)
        for n in range(_OTHERS + 1)
    ]
    tokens = [token_of(keys, account.id) for account in accounts]
    async with store.session() as session:
        session.add_all(accounts)
        await session.flush()
        session.add_all([row for _, row in tokens])
        await session.flush()
        await session.execute(_FILL, {"rows": 2 * rows, "others": _OTHERS, "at": now, "later": now + _NO_LOOK})
        await session.commit()
        if not store.is_sqlite:
            await session.execute(text("ANALYZE"))  # as autovacuum does, but not while we measure
            await session.commit()
    return [secret for secret, _ in tokens]


async def _places(store: Store, account: int, rows: int) -> list[str]:
    """Return what to ask for the first page, one in the middle, and the last."""
    places = [""]
    for offset in (rows // 2, rows - _PAGE) if rows > _PAGE else ():
        found = await store.fetch(_PLACE, {"account_id": f"ac_{account}", "place": offset - 1})
        token = base64.urlsafe_b64encode(found[0].id.encode()).decode().rstrip("=")
        places.append(f"&page_token={token}")
    return places


def _listed(ratios: Sequence[float]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def _of(one: Idle) -> str:
    return f"{one.database_cpu:.2f}" if one.storage == "PostgreSQL" else ""
