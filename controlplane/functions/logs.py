"""The logs of functions: kept as hosts report them, read or awaited by their owners.

A line's place is taken by moving the function's head, which locks it until the commit: a reader who has seen a line has
seen all before it. The head is there from the function's order to its end, so that what comes too late is dropped.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, Index, Select, bindparam, delete, func, insert, text, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import Field, SQLModel, col, select

from controlplane.api.hosts.v1 import hosts_pb2
from controlplane.api.v1 import functions_pb2
from controlplane.functions.model import Function
from controlplane.hosts.model import Host
from controlplane.rpc.times import stamp
from controlplane.sql import Store, UtcDateTime
from controlplane.waiting import Waiting

_KEPT = 10_000  # lines of each version
_TRIM_EVERY = 1_000  # lines that a function logs


class FunctionLogLine(SQLModel, table=True):
    """A line, at its place in the function's log."""

    __tablename__ = "function_log_lines"
    __table_args__ = (Index("ix_function_log_lines_version", "function_id", "version", "sequence"),)

    function_id: str = Field(primary_key=True)
    sequence: int = Field(primary_key=True, sa_type=BigInteger)
    version: int
    time: datetime = Field(sa_type=UtcDateTime)
    stream: str
    text: str
    request_id: str | None = None
    outcome: str | None = None
    duration_ms: float | None = None
    memory_mb: float | None = None


class FunctionLogHead(SQLModel, table=True):
    """The last place in a function's log, which whoever adds lines locks."""

    __tablename__ = "function_log_heads"

    function_id: str = Field(primary_key=True)
    sequence: int = Field(default=0, sa_type=BigInteger)


class FunctionLogBatch(SQLModel, table=True):
    """The last batch of lines that was kept of a host's present start."""

    __tablename__ = "function_log_batches"

    host_id: str = Field(primary_key=True)
    instance: str
    batch: int = Field(sa_type=BigInteger)


# A host sends its batches one after the other, so that the last one tells about all before.
_TAKE = text(
    "INSERT INTO function_log_batches (host_id, instance, batch) VALUES (:host_id, :instance, :batch)"
    " ON CONFLICT (host_id) DO UPDATE SET instance = excluded.instance, batch = excluded.batch"
    " WHERE function_log_batches.instance <> excluded.instance OR function_log_batches.batch < excluded.batch"
    " RETURNING batch"
)
_AFTER = select(FunctionLogLine).where(
    col(FunctionLogLine.function_id) == bindparam("function_id"), col(FunctionLogLine.sequence) > bindparam("after")
)
_HEADS: Any = select(col(FunctionLogHead.function_id).label("key"), FunctionLogHead.sequence).where(
    col(FunctionLogHead.function_id).in_(bindparam("keys", expanding=True))
)


class FunctionLogs:
    """The logs of all functions."""

    def __init__(self, *, store: Store) -> None:
        self._store = store
        self._waiting = Waiting(store, _HEADS)

    async def keep(
        self, session: AsyncSession, lines: Iterable[hosts_pb2.FunctionLog], *, host: Host, batch: int
    ) -> Sequence[str]:
        """Add a batch of a host's, unless it is known; return the ids of the functions that have new lines."""
        given = {"host_id": host.id, "instance": host.instance, "batch": batch}
        if (await session.execute(_TAKE, given)).first() is None:
            return []
        of = defaultdict[str, list[hosts_pb2.FunctionLog]](list)
        for line in lines:
            of[line.function_id].append(line)
        # In one order, or the batches of two hosts wait for each other's heads.
        of_region = select(Function.id).where(col(Function.region) == host.region)
        return [each for each in sorted(of) if await _add(session, each, of[each], if_in=of_region)]

    async def read(
        self, function_id: str, *, after: int, version: int | None, limit: int, wait: float
    ) -> Sequence[FunctionLogLine]:
        """Return the lines after a place, or the newest after -1, oldest first; wait for one for so many seconds."""
        newest = after < 0
        place = col(FunctionLogLine.sequence)
        statement = _AFTER.order_by(place.desc() if newest else place).limit(limit)
        if version is not None:
            statement = statement.where(col(FunctionLogLine.version) == version)

        async def read() -> Sequence[FunctionLogLine]:
            rows = await self._store.fetch(statement, {"function_id": function_id, "after": after})
            return rows[::-1] if newest else rows

        return await self._waiting.until(function_id, read, wait=wait)

    def announce(self, function_ids: Iterable[str]) -> None:
        """Wake whoever waits in this process for a line of one of these functions; they have been committed."""
        for function_id in function_ids:
            self._waiting.announce(function_id)

    def close(self) -> None:
        """Send everybody who waits away with what there is."""
        self._waiting.close()


async def begin_log(session: AsyncSession, function_id: str) -> None:
    """Let a new function have a log."""
    session.add(FunctionLogHead(function_id=function_id))


async def end_log(session: AsyncSession, function_id: str) -> None:
    """Remove the log of a function that is gone; the head first, which waits for whoever is adding lines."""
    await session.execute(delete(FunctionLogHead).where(col(FunctionLogHead.function_id) == function_id))
    await session.execute(delete(FunctionLogLine).where(col(FunctionLogLine.function_id) == function_id))


def to_proto(line: FunctionLogLine) -> functions_pb2.FunctionLogLine:
    """Return the line as the API shows it."""
    return functions_pb2.FunctionLogLine(
        sequence=line.sequence,
        time=stamp(line.time),
        version=line.version,
        stream=line.stream,
        text=line.text,
        request_id=line.request_id,
        outcome=line.outcome,
        duration_ms=line.duration_ms,
        memory_mb=line.memory_mb,
    )


async def _add(
    session: AsyncSession, function_id: str, lines: Sequence[hosts_pb2.FunctionLog], *, if_in: Select[str]
) -> bool:
    """Add lines to a function's log; False if it is gone, or none of those that the host may write to."""
    head = (
        update(FunctionLogHead)
        .where(col(FunctionLogHead.function_id) == function_id, col(FunctionLogHead.function_id).in_(if_in))
        .values(sequence=col(FunctionLogHead.sequence) + len(lines))
        .returning(col(FunctionLogHead.sequence))
        .execution_options(synchronize_session=False)
    )
    last = (await session.execute(head)).scalar_one_or_none()
    if last is None:
        return False
    first = last - len(lines) + 1
    rows = [{"sequence": place, **_row(line)} for place, line in enumerate(lines, start=first)]
    await session.execute(insert(FunctionLogLine), rows)
    if last // _TRIM_EVERY != (first - 1) // _TRIM_EVERY:
        for version in sorted({line.version for line in lines}):
            await _trim(session, function_id, version)
    return True


async def _trim(session: AsyncSession, function_id: str, version: int) -> None:
    """Remove all but the newest lines of a version."""
    of_version = col(FunctionLogLine.function_id) == function_id, col(FunctionLogLine.version) == version
    place = col(FunctionLogLine.sequence)
    newest_too_old = select(place).where(*of_version).order_by(place.desc()).offset(_KEPT).limit(1).scalar_subquery()
    await session.execute(
        delete(FunctionLogLine)
        .where(*of_version, place <= func.coalesce(newest_too_old, 0))
        .execution_options(synchronize_session=False)
    )


def _row(line: hosts_pb2.FunctionLog) -> dict[str, object]:
    is_request = line.stream == "request"
    return {
        "function_id": line.function_id,
        "version": line.version,
        "time": line.time.ToDatetime(tzinfo=UTC),
        "stream": line.stream,
        "text": line.text.replace("\0", "\N{REPLACEMENT CHARACTER}"),  # PostgreSQL keeps no U+0000
        "request_id": line.request_id or None,
        "outcome": line.outcome if is_request else None,
        "duration_ms": line.duration_ms if is_request else None,
        "memory_mb": line.memory_mb if is_request else None,
    }
