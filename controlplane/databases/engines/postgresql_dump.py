"""Dumps of PostgreSQL databases: pg_dump and pg_restore as streams, and what is in them."""

import asyncio
import os
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import asyncpg

from controlplane.databases.engines.engine import ClusterUnavailable, Contents, EngineError, Table
from controlplane.databases.engines.postgresql_errors import in_our_terms

_CONNECT_TIMEOUT = 3
# Before it starts we have all the locks: it can wait only for somebody who waits for us, and all wait for nothing.
_LOCK_TIMEOUT = 5.0
_END_TIMEOUT = 5.0
_CHUNK = 256 * 1024
_MOST_ERRORS = 64 * 1024  # of what a program says

# What a later try may mend: libpq's words, and the server's if it speaks English.
_LATER = (
    "connection to server",  # is refused, or it is starting; that the password is right was tried before
    "server closed the connection",
    "data from server",
    "data to server",
    "SSL SYSCALL error",
    "terminating connection",
    "statement timeout",
    "too many connections",
    "read-only transaction",
    "No space left on device",
)

# The columns by name, as their order may be another once an inherited table is restored.
_TABLES = """
SELECT format('%I.%I', n.nspname, c.relname) AS name, c.relkind = 'r' AS has_rows,
  (SELECT string_agg(format('r.%I', attname), ', ' ORDER BY attname) FROM pg_attribute
    WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS columns
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_t'
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')
ORDER BY 1
"""
# By format() and not by a cast to text: a tenant can make such a cast for a table of his, and it would run as us.
_SUM = "SELECT count(*), coalesce(sum(hashtextextended(format('%s', ROW({})), 0)::numeric), 0)::text FROM ONLY {} AS r"
# Without the zeros that a restore fills holes with. Only a superuser may read the pages.
_LARGE_OBJECTS = """
SELECT coalesce(sum(hashtextextended(format('%s %s %s', loid, pageno, rtrim(data, '\\x00')), 0)::numeric), 0)::text
FROM pg_largeobject WHERE rtrim(data, '\\x00') <> ''
"""


@dataclass(frozen=True, slots=True)
class _Locked:
    """A table that cannot be altered now, its columns, and whether it has rows: a partitioned one has none."""

    name: str
    columns: str
    has_rows: bool


class PostgreSQLDump:
    """A dump by pg_dump, of the very snapshot in which its contents are counted.

    `admin` is a connection to the database in a read-only transaction, which holds the snapshot.
    """

    def __init__(self, admin: asyncpg.Connection, *, program: Path, dsn: str, name: str) -> None:
        self._admin = admin
        self._program = program
        self._dsn = dsn
        self._name = name
        self._process: Process | None = None
        self._contents: Contents | None = None

    async def chunks(self) -> AsyncIterator[bytes]:
        """Return the dump, in pieces."""
        with in_our_terms():
            snapshot = await self._admin.fetchval("SELECT pg_export_snapshot()")
            # First, so that nobody truncates a table between our counting and pg_dump's reading it.
            tables = await lock_tables(self._admin)
            self._process = process = await self._start(snapshot)
            assert process.stdout is not None  # noqa: S101 - it is a pipe
            errors = asyncio.create_task(_read_errors(process))
            try:
                self._contents = await count_contents(self._admin, tables)
                while chunk := await process.stdout.read(_CHUNK):
                    yield chunk
                said = await errors
                await process.wait()
            finally:
                errors.cancel()
        _check(process, said, "The database could not be dumped; try again, or contact support.")

    def contents(self) -> Contents:
        """Return what is in the dump."""
        if self._contents is None:
            raise RuntimeError("the dump was not read")
        return self._contents

    async def close(self) -> None:
        """End pg_dump, should it still run."""
        if self._process is not None:
            await _end(self._process)

    async def _start(self, snapshot: str) -> Process:
        url, password = _for_database(self._dsn, self._name)
        # Without --role, as a tenant may lack rights on his own tables, and forced row-level security would make the
        # dump fail.
        return await _start(
            self._program,
            "--format=custom",
            "--compress=0",  # whoever keeps it compresses better
            f"--snapshot={snapshot}",
            f"--lock-wait-timeout={_LOCK_TIMEOUT * 1000:.0f}",
            f"--dbname={url}",
            password=password,
        )


async def run_pg_restore(program: Path, *, dsn: str, password: str, chunks: AsyncIterator[bytes]) -> None:
    """Feed a dump to pg_restore, in one transaction; `dsn` is the tenant's.

    Raises EngineError if it does not fit.
    """
    process = await _start(
        program,
        "--exit-on-error",
        "--single-transaction",
        "--no-owner",  # everything becomes the new tenant's
        "--no-privileges",
        f"--dbname={dsn}",
        password=password,
    )
    assert process.stdin is not None  # noqa: S101 - it is a pipe
    errors = asyncio.create_task(_read_errors(process))
    try:
        # When it ends early the pipe breaks; why it did is in what it says.
        async for chunk in chunks:
            try:
                process.stdin.write(chunk)
                await process.stdin.drain()
            except (BrokenPipeError, ConnectionResetError):
                break
        process.stdin.close()
        with suppress(BrokenPipeError, ConnectionResetError):
            await process.stdin.wait_closed()
        said = await errors
        await process.wait()
    finally:
        errors.cancel()
        await _end(process)
    _check(process, said, "The database refused what is in the backup.")


async def lock_tables(connection: asyncpg.Connection) -> list[_Locked]:
    """Keep all tables as they are until the end of this connection's transaction: rows may change, and nothing else."""
    found = await connection.fetch(_TABLES)
    tables = [_Locked(name=row["name"], columns=row["columns"] or "", has_rows=row["has_rows"]) for row in found]
    if tables:
        await connection.execute(f"LOCK TABLE {', '.join(f'ONLY {t.name}' for t in tables)} IN ACCESS SHARE MODE")
    return tables


async def count_contents(connection: asyncpg.Connection, tables: list[_Locked]) -> Contents:
    """Return what is in these tables and in large objects, as the transaction of this connection sees it."""
    found = {}
    for table in tables:
        if table.has_rows:
            count, total = await connection.fetchrow(_SUM.format(table.columns, table.name))
            found[table.name] = Table(rows=count, checksum=total)
    if objects := await connection.fetchval("SELECT count(*) FROM pg_largeobject_metadata"):
        readable = await connection.fetchval("SELECT has_table_privilege('pg_largeobject', 'SELECT')")
        total = await connection.fetchval(_LARGE_OBJECTS) if readable else ""
        found["pg_largeobject"] = Table(rows=objects, checksum=total)
    return Contents(found)


async def _start(program: Path, *arguments: str, password: str) -> Process:
    try:
        return await asyncio.create_subprocess_exec(
            program,
            *arguments,
            "--no-password",
            stdin=PIPE if program.name == "pg_restore" else DEVNULL,
            stdout=DEVNULL if program.name == "pg_restore" else PIPE,
            stderr=PIPE,
            env={
                **os.environ,
                "LC_ALL": "C",
                "PGCONNECT_TIMEOUT": str(_CONNECT_TIMEOUT),
                "PGOPTIONS": "-c role=none",  # which the database's owner may have set otherwise
                **({"PGPASSWORD": password} if password else {}),
            },
        )
    except OSError as error:  # not the cluster's fault
        raise EngineError("The provider's tools for dumps do not start; contact support.") from error


async def _read_errors(process: Process) -> str:
    """Return the beginning of what a program says, and read the rest, or it would stand still."""
    assert process.stderr is not None  # noqa: S101 - it is a pipe
    said = b""
    while piece := await process.stderr.read(_CHUNK):
        said += piece[: _MOST_ERRORS - len(said)]
    return said.decode(errors="replace")


async def _end(process: Process) -> None:
    """End a program; on SIGTERM it first cancels what the server does for it."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _END_TIMEOUT)
        except TimeoutError:
            process.kill()
    await process.wait()
    if process.stdout is not None:  # or uvloop keeps a pipe open for as long as there is something to read
        while await process.stdout.read(_CHUNK):
            pass


def _check(process: Process, said: str, sentence: str) -> None:
    """Raise EngineError with this sentence if the program has failed."""
    if process.returncode:
        reason = next((line for line in said.splitlines() if "error:" in line), f"exit status {process.returncode}")
        later = any(words in said for words in _LATER)
        raise (ClusterUnavailable if later else EngineError)(sentence) from RuntimeError(reason)


def _for_database(dsn: str, database: str) -> tuple[str, str]:
    """Return the DSN for another database and without its password, which other users could read in a command line."""
    url = urlsplit(dsn)
    user, at, hosts = url.netloc.rpartition("@")
    user, _, password = user.partition(":")
    query = dict(parse_qsl(url.query))
    password = query.pop("password", unquote(password))
    return url._replace(
        netloc=f"{user}{at}{hosts}", path=f"/{database}", query=urlencode(query, quote_via=quote)
    ).geturl(), password
