"""Dumps of ClickHouse databases: each table's statement and its rows in RowBinary, in one stream of frames.

A dump is a line of text and then frames: a letter, the length of what follows in four bytes, big-endian, and that.
`T` is JSON about a table or view, `D` a piece of the rows of the table before it, cut anywhere, and `E` JSON with the
counts and checksums of all tables: a dump without it is not whole.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from controlplane.databases.engines.clickhouse_http import Refused, Session
from controlplane.databases.engines.engine import Contents, EngineError, Table

# Engines that keep data in the database itself. A Buffer writes into any database, past all rights; Merge, Distributed
# and the rest reach out; Replicated ones name their place in Keeper, which may be another tenant's.
ENGINES = (
    "MergeTree",
    "ReplacingMergeTree",
    "SummingMergeTree",
    "AggregatingMergeTree",
    "CollapsingMergeTree",
    "VersionedCollapsingMergeTree",
    "CoalescingMergeTree",
    "Log",
    "TinyLog",
    "StripeLog",
    "Memory",
    "Null",
    "Join",
)

_MAGIC = b"ClickHouse dump 1\n"
_HEAD = 5
_MEGABYTE = 1 << 20
_PIECE = _MEGABYTE - _HEAD
_MAX_STATEMENT = 4 * _MEGABYTE
_UNFIT = "The dump cannot be read into this database: it is damaged, or not one of ClickHouse."

_TABLES = """\
SELECT name, engine, create_table_query AS statement, toString(uuid) AS uuid FROM system.tables
WHERE database = {name:String} ORDER BY name FORMAT JSONEachRow"""

_COLUMNS = """\
SELECT table, groupArray(name) AS columns FROM
    (SELECT table, name FROM system.columns WHERE database = {name:String}
        AND default_kind NOT IN ('ALIAS', 'EPHEMERAL') ORDER BY table, position)
GROUP BY table FORMAT JSONEachRow"""

_STATEMENT = re.compile(
    rf"CREATE (?:TABLE\s.*\bENGINE = (?:{'|'.join(ENGINES)})\b|(?:MATERIALIZED )?VIEW\s).*", re.DOTALL
)
_DEFINER = re.compile(r" DEFINER = \S+ SQL SECURITY (?:DEFINER|INVOKER)")


@dataclass(frozen=True, slots=True)
class StoredTable:
    """A table or view. Of one that keeps rows: its columns, where they are read from, whether merges change them."""

    name: str
    statement: str
    columns: tuple[str, ...] = ()
    source: str = ""
    merges: bool = False

    def lines(self, database: str) -> str:
        """Return the query for its rows, each as one string: RowBinary takes all types, to the last bit.

        Rows that a merge will make one, at whatever time, count as one already.
        """
        columns = ", ".join(_quoted(column) for column in self.columns)
        final = " FINAL SETTINGS do_not_merge_across_partitions_select_final = 1" if self.merges else ""
        return (
            f"SELECT formatRow('RowBinary', {columns}) AS line"  # noqa: S608 - all quoted
            f" FROM {database}.{_quoted(self.source)}{final}"
        )


async def tables_of(admin: Session, name: str) -> list[StoredTable]:
    """Return what is in a database, in the order in which it can be made again."""
    rows = {row["name"]: row for row in await _rows_of(admin, _TABLES, name)}
    columns = {row["table"]: row["columns"] for row in await _rows_of(admin, _COLUMNS, name)}
    tables, views = [], []
    for row in rows.values():
        if row["name"].startswith(".inner"):
            continue
        # The name of the database goes, where it stands before another: what is dumped here is restored elsewhere.
        statement = _DEFINER.sub("", re.sub(rf"`?\b{name}\b`?\.", "", row["statement"]))
        inner = f".inner_id.{row['uuid']}"
        if row["engine"] in ENGINES:
            tables.append(_stored(row["name"], statement, columns[row["name"]], row))
        elif row["engine"] == "MaterializedView" and inner in rows:
            views.append(_stored(row["name"], statement, columns[inner], rows[inner]))
        elif row["engine"] in {"View", "MaterializedView"}:
            views.append(StoredTable(row["name"], statement))
        else:
            raise EngineError(f"A table has the engine {row['engine']}, which a dump cannot take along: drop it first.")
    return tables + views


async def _rows_of(admin: Session, sql: str, name: str) -> list[dict[str, Any]]:
    answer = await admin.run(sql, param_name=name, database=name)
    return [json.loads(line) for line in answer.splitlines()]


def _stored(name: str, statement: str, columns: list[str], source: dict[str, str]) -> StoredTable:
    merges = source["engine"].endswith("MergeTree") and source["engine"] != "MergeTree"
    return StoredTable(name, statement, tuple(columns), source["name"], merges)


class ClickHouseDump:
    """A dump that is being read; see `engine.Dump`.

    ClickHouse knows no moment that is the same for two tables: each is as of when its turn came, and its count and
    checksum are of the very rows that are in the dump.
    """

    def __init__(self, admin: Session, name: str, tables: list[StoredTable]) -> None:
        self._admin = admin
        self._name = name
        self._tables = tables
        self._contents: dict[str, Table] | None = None
        self._chunks: AsyncGenerator[bytes, None] | None = None

    def chunks(self) -> AsyncIterator[bytes]:
        """Return the dump in pieces."""
        self._chunks = self._frames()
        return self._chunks

    def contents(self) -> Contents:
        """Return what is in the dump; it must have been read to its end."""
        if self._contents is None:
            raise EngineError("The dump was not read to its end.")
        return Contents(tables=self._contents)

    async def close(self) -> None:
        """End the query that is under way."""
        if self._chunks is not None:
            await self._chunks.aclose()

    async def _frames(self) -> AsyncGenerator[bytes, None]:
        found = {}
        yield _MAGIC
        for table in self._tables:
            yield _frame(b"T", {"name": table.name, "statement": table.statement, "columns": table.columns})
            if not table.columns:
                continue
            rows = _Rows()
            lines = table.lines(self._name)
            sql = f"SELECT sipHash64(line), line FROM ({lines}) FORMAT RowBinary"  # noqa: S608
            answer = self._admin.stream(sql, database=self._name)
            try:
                async for chunk in answer:
                    data = await asyncio.to_thread(rows.take, chunk)
                    for start in range(0, len(data), _PIECE):
                        piece = data[start : start + _PIECE]
                        yield b"D" + len(piece).to_bytes(4, "big") + piece
            finally:
                await answer.aclose()
            found[table.name] = rows.total()
        yield _frame(b"E", {name: [table.rows, table.checksum] for name, table in found.items()})
        self._contents = found


class _Rows:
    """Takes the answer apart: of each row a hash in 8 bytes, its length, and the row; and adds up the hashes."""

    def __init__(self) -> None:
        self._rest = b""
        self._count = 0
        self._sum = 0

    def take(self, data: bytes) -> bytes:
        """Return the rows that are whole by now, one after the other."""
        data = self._rest + data
        rows = []
        position = 0
        while (row := _row_at(data, position)) is not None:
            start, end = row
            self._sum += int.from_bytes(data[position : position + 8], "little")
            rows.append(data[start:end])
            position = end
        self._rest = data[position:]
        self._count += len(rows)
        return b"".join(rows)

    def total(self) -> Table:
        """Return the count and the sum of all. Raises EngineError if the answer was cut short."""
        if self._rest:
            raise EngineError("The database could not be dumped; try again, or contact support.") from Refused(
                "", 0, repr(self._rest[:2000])
            )
        return Table(rows=self._count, checksum=f"{self._sum % 2**64:016x}")


def _row_at(data: bytes, position: int) -> tuple[int, int] | None:
    """Return where the row begins and ends whose hash is at this position; None if it is not all there."""
    # Until version 25.11, an error that comes later than the first rows just follows them.
    if data.startswith((b"Code: ", b"\r\n__exce"), position):
        return None
    start = position + 8
    length = shift = 0
    while start < len(data):
        byte = data[start]
        start += 1
        length |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - the last byte of a number
            return (start, start + length) if start + length <= len(data) else None
        shift += 7
    return None


async def restore_dump(tenant: Session, name: str, chunks: AsyncIterator[bytes]) -> None:
    """Make the tables of a dump and fill them, with no rights but the tenant's."""
    frames = _Frames(chunks)
    await frames.start()
    views: list[str] = []
    while frames.kind == b"T":
        table = frames.table()
        is_view = not table.statement.startswith("CREATE TABLE")
        views += [table.statement] * is_view
        if is_view and table.columns:
            await _make_views(tenant, name, views)
        elif not is_view:
            await tenant.run(table.statement, database=name)
        await frames.next()
        if table.columns:
            columns = ", ".join(_quoted(column) for column in table.columns)
            await tenant.insert(
                f"INSERT INTO {_quoted(table.name)} ({columns}) FORMAT RowBinary", frames.data(), **_insert(name)
            )
    await _make_views(tenant, name, views)
    await frames.end()


async def _make_views(tenant: Session, name: str, views: list[str]) -> None:
    """Make what can be made until all are there, as one may read another; and forget them."""
    while views:
        failed: list[str] = []
        for view in views:
            try:
                await tenant.run(view, database=name)
            except Refused as error:
                failed.append(view)
                reason = error
        if len(failed) == len(views):
            raise reason
        views[:] = failed


class _Frames:
    """Reads frames out of chunks that were cut anywhere. Whatever does not fit raises EngineError."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = b""
        self.kind = b""
        self._payload = b""

    async def start(self) -> None:
        """Read the line at the top and the first frame."""
        if await self._read(len(_MAGIC)) != _MAGIC:
            raise EngineError(_UNFIT)
        await self.next()

    async def next(self) -> None:
        """Read a frame."""
        head = await self._read(_HEAD)
        self.kind, length = head[:1], int.from_bytes(head[1:], "big")
        if self.kind not in {b"T", b"D", b"E"} or length > _MAX_STATEMENT:
            raise EngineError(_UNFIT)
        self._payload = await self._read(length)

    def table(self) -> StoredTable:
        """Return the table that this frame is about, if its statement is one of a dump."""
        try:
            found = json.loads(self._payload)
            table = StoredTable(str(found["name"]), str(found["statement"]), tuple(map(str, found["columns"])))
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(_UNFIT) from error
        if not _STATEMENT.fullmatch(table.statement):
            raise EngineError(_UNFIT)
        return table

    async def data(self) -> AsyncGenerator[bytes, None]:
        """Yield the rows from here on, up to the frame that is something else."""
        while self.kind == b"D":
            yield self._payload
            await self.next()

    async def end(self) -> None:
        """Make sure that this is the last frame, and nothing follows."""
        if self.kind != b"E" or self._buffer or [chunk async for chunk in self._chunks if chunk]:
            raise EngineError(_UNFIT)

    async def _read(self, size: int) -> bytes:
        pieces = [self._buffer]
        missing = size - len(self._buffer)
        while missing > 0:
            try:
                pieces.append(await anext(self._chunks))
            except StopAsyncIteration:
                raise EngineError(_UNFIT) from None
            missing -= len(pieces[-1])
        data = b"".join(pieces)
        self._buffer = data[size:]
        return data[:size]


def _frame(kind: bytes, payload: object) -> bytes:
    data = json.dumps(payload).encode()
    return kind + len(data).to_bytes(4, "big") + data


def _insert(name: str) -> dict[str, str]:
    """Return settings for an INSERT that changes no row and takes little memory, however long it is."""
    return {
        "database": name,
        "optimize_on_insert": "0",
        "insert_allow_materialized_columns": "1",
        "async_insert": "0",
        "max_partitions_per_insert_block": "0",
        "max_insert_block_size": "65536",
        "min_insert_block_size_rows": "0",
        "min_insert_block_size_bytes": str(64 * _MEGABYTE),
        "max_execution_time": "0",
    }


def _quoted(identifier: str) -> str:
    return "`" + identifier.replace("\\", "\\\\").replace("`", "\\`") + "`"
