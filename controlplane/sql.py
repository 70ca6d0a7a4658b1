"""The control plane's own database: SQLite for one process, PostgreSQL for several."""

import mmap
import os
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, DateTime, Dialect, Executable, TypeDecorator, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

# PostgreSQL's classes of errors that no statement has earned: the connection, the server's resources, its operator.
_OUTAGES = ("08", "53", "57P")

_LONGEST_PAUSE = 10  # seconds between two statements of a transaction, in none of which anything takes long

T = TypeVar("T")
_WAL_INDEX_HEADER = 48  # bytes


class UtcDateTime(TypeDecorator[datetime]):
    """A time in UTC; SQLite forgets the zone, this puts it back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the stored time with its zone."""
        del dialect
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class Store:
    """Sessions for writes, and a short way for the few reads that every request makes."""

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._engine = _sqlite_engine(url) if self.is_sqlite else _postgresql_engine(url, pool_pre_ping=True)
        # Connections of their own: a transaction that reads something beside itself must not wait for those that wait
        # for it. On SQLite, reads have another way (see fetch).
        self._reads = (self._engine if self.is_sqlite else _postgresql_engine(url)).execution_options(
            isolation_level="AUTOCOMMIT"
        )
        self._reader: Connection | None = None
        self._wal_index: mmap.mmap | None = None

    @property
    def engine(self) -> AsyncEngine:
        """The engine, for migrations."""
        return self._engine

    def session(self) -> AsyncSession:
        """Return a session; its transaction begins with its first statement.

        Rows stay readable after the commit, and nothing is loaded behind the reader's back.
        """
        return AsyncSession(self._engine, expire_on_commit=False)

    async def fetch(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Any]:
        """Return all rows of a SELECT, read outside any transaction; the columns are their attributes.

        On SQLite this runs on the calling thread over a connection that is held open: such a read takes microseconds
        and never waits for a writer, while a thread switch alone costs more.
        """
        if self.is_sqlite:
            return self._held_reader().execute(statement, parameters).all()
        try:
            return await self._read(statement, parameters)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
        return await self._read(statement, parameters)  # the pool has noticed, and holds new connections only

    async def _read(self, statement: Executable, parameters: Mapping[str, Any] | None) -> Sequence[Any]:
        async with self._reads.connect() as connection:
            return (await connection.execute(statement, parameters)).all()

    def version(self) -> bytes | None:
        """Return what is another whenever anything was committed, by whomever, or None where there is no such thing.

        It is what lets an answer be remembered and still be exact. On SQLite it is the header of the WAL-index, which
        every commit rewrites in memory that all connections share, before the commit returns (SQLite's WAL-mode file
        format, 2.1). `PRAGMA data_version` says the same from the same place, but SQLite's driver lets go of Python's
        lock for it, and to get that back from gRPC's threads took 90 microseconds of a busy server. PostgreSQL has
        nothing as cheap.
        """
        if not self.is_sqlite:
            return None
        if self._wal_index is None:
            self._held_reader()  # which keeps the file there
            with Path(f"{self.url.database}-shm").open("rb") as file:
                self._wal_index = mmap.mmap(file.fileno(), _WAL_INDEX_HEADER, prot=mmap.PROT_READ)
        return self._wal_index[:]

    async def check(self) -> None:
        """Raise if the database does not answer."""
        async with self._reads.connect() as connection:
            await connection.exec_driver_sql("SELECT 1")

    async def close(self) -> None:
        """Close every connection."""
        if self._wal_index is not None:
            self._wal_index.close()
            self._wal_index = None
        if self._reader is not None:
            self._reader.close()
            self._reader.engine.dispose()
            self._reader = None
        await self._engine.dispose()
        await self._reads.dispose()

    def _held_reader(self) -> Connection:
        if self._reader is None:
            engine = create_engine(f"sqlite:///{self.url.database}", isolation_level="AUTOCOMMIT", hide_parameters=True)
            event.listen(engine, "connect", _prepare_reader)
            self._reader = engine.connect()
        return self._reader


class Remembered(Generic[T]):
    """Values that were read from a store and stay true for as long as nothing is committed there, by anybody.

    At most `most` of them. Where the store has no version (PostgreSQL), nothing is remembered.
    """

    def __init__(self, store: Store, *, most: int) -> None:
        self._store = store
        self._most = most
        self._values: dict[Hashable, T] = {}
        self._version: bytes | None = None

    async def get(self, key: Hashable, read: Callable[[], Awaitable[T | None]]) -> T | None:
        """Return the value of `key`, read now unless it is remembered; None is never remembered."""
        version = self._store.version()
        if version is None:
            return await read()
        if version != self._version or len(self._values) >= self._most:
            self._values.clear()
            self._version = version
        value = self._values.get(key)
        if value is None:
            value = await read()
            if value is not None and self._version == version:
                self._values[key] = value
        return value


def _postgresql_engine(url: str, *, pool_pre_ping: bool = False) -> AsyncEngine:
    """Return an engine of a PostgreSQL database.

    With `pool_pre_ping` a connection is tried before it is used, so that a write does not fail by one that has died;
    reads are repeated instead.
    """
    # hide_parameters, here and below: an error's text has no values of its statement, such as hashes, for a log.
    return create_async_engine(
        url,
        pool_size=10,
        hide_parameters=True,
        pool_pre_ping=pool_pre_ping,
        # Of a process that is paused amid a transaction, or whose machine has gone, the locks would stay.
        connect_args={"server_settings": {"idle_in_transaction_session_timeout": f"{_LONGEST_PAUSE}s"}},
    )


def _sqlite_engine(url: str) -> AsyncEngine:
    """Return the engine of a SQLite file.

    One connection: SQLite has one writer anyway, and waiting for it in the pool's queue is fair and wakes at once,
    where SQLite's own busy handler sleeps and lets the lucky pass. Every transaction takes the write lock as it begins;
    the driver's own habit of beginning late loses updates.
    """
    path = Path(str(make_url(url).database))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    engine = create_async_engine(
        url,
        pool_size=1,
        max_overflow=0,
        pool_timeout=30,
        connect_args={"isolation_level": None},
        hide_parameters=True,
    )
    event.listen(engine.sync_engine, "connect", _prepare_writer)
    event.listen(engine.sync_engine, "begin", _begin_immediate)
    return engine


def _prepare_writer(connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
    del entry
    cursor = connection.cursor()
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",  # committed means on disk, also after a power cut
        "busy_timeout = 10000",  # another program, such as a backup of this file, may hold the lock
        "foreign_keys = ON",
        "secure_delete = ON",  # what was deleted is not left in the file
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _prepare_reader(connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
    del entry
    cursor = connection.cursor()
    for statement in (
        "PRAGMA busy_timeout = 10000",
        "PRAGMA journal_mode = WAL",
        "PRAGMA query_only = ON",
        "SELECT count(*) FROM sqlite_schema",  # a first read maps the WAL-index
    ):
        cursor.execute(statement)
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def is_outage(error: BaseException) -> bool:
    """Tell whether an error means that the database does not answer, rather than that a statement was wrong."""
    if isinstance(error, DBAPIError):
        # SQLAlchemy knows no OperationalError of asyncpg's: what went wrong there is in the SQLSTATE.
        sqlstate = getattr(error.orig, "sqlstate", None) or ""
        return (
            error.connection_invalidated
            or isinstance(error, OperationalError | InterfaceError)
            or sqlstate.startswith(_OUTAGES)
        )
    # OSError: a refused connection, a host or a socket that is not there, a time-out.
    return isinstance(error, PoolTimeoutError | OSError)
