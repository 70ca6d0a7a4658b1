"""Reads and writes the MySQL driver's dumps, as a program of its own: rows by the million are not for the event loop.

    mysql_dump_program.py dump|contents|restore

The first line of the input is how to log in, as JSON for `pymysql.connect`; the dump to restore follows it. A dump goes
to the output. What is in it, or why it failed, goes as JSON to the error output.

Why not mariadb-dump: it rounds FLOAT to six digits; nobody else can look at the moment that it sees, so its rows
could not be counted; and the client that reads its dumps has commands of its own (`system`, `source`). Here each
statement goes to the server as it is, from a connection that has no right but the tenant's and offers no files.

A dump is SQL, which the clients `mariadb` and `mysql` read too, with --binary-mode. Its delimiter is random, so that
nothing in it can look like the end of a statement.
"""

import json
import re
import resource
import secrets
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO, TypeAlias, cast

import pymysql
from pymysql.converters import encoders
from pymysql.cursors import SSCursor

Connection: TypeAlias = "pymysql.Connection[SSCursor]"

_CONNECT_TIMEOUT = 3
# For one table's checksum, or one statement of a dump; and for whoever reads the dump slowly.
_TIMEOUT = 3600
_MEMORY = 1 << 30  # many times of what is used: a hostile dump or database fails before it takes the machine's

_STATEMENT_SIZE = 500_000
_PIECE = 200_000  # a longer value goes in pieces, as a statement of some such would be more than the server accepts
_CHUNK = 1 << 20

# In double quotes, if the program was made in the mode ANSI_QUOTES.
_DEFINER = re.compile(rb"^(CREATE (?:ALGORITHM=\w+ )?)DEFINER=(?:`(?:[^`]|``)*`|\"(?:[^\"]|\"\")*\"|@)+ ")
_HEADER = re.compile(rb"DELIMITER (;;[0-9a-f]{12})\n")
_END = b"-- The end of the dump\n"

# Zeros in AUTO_INCREMENT columns and dates like 0000-00-00 stay what they are.
_SETTINGS = (
    b"SET NAMES utf8mb4",
    b"SET SESSION sql_mode = 'NO_AUTO_VALUE_ON_ZERO,ALLOW_INVALID_DATES', time_zone = '+00:00'",
    b"SET SESSION foreign_key_checks = 0, unique_checks = 0 /*M! , check_constraint_checks = 0 */",
)

_NUMBERS = set(b"tinyint smallint mediumint int bigint decimal float double bit year".split())
_TIMES = set(b"date time datetime timestamp".split())
_BYTES = set(
    b"binary varbinary tinyblob blob mediumblob longblob vector geometry point linestring polygon multipoint"
    b" multilinestring multipolygon geometrycollection geomcollection".split()
)

_ROUTINES = (
    "SELECT routine_type, routine_name FROM information_schema.routines WHERE routine_schema = DATABASE() ORDER BY 1, 2"
)
_TRIGGERS = (
    "SELECT 'TRIGGER', trigger_name FROM information_schema.triggers WHERE trigger_schema = DATABASE()"
    " ORDER BY event_object_table, action_order"
)


def main() -> int:
    """Do what the command line says; return the exit status."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    action, login = sys.argv[1], json.loads(sys.stdin.buffer.readline())
    try:
        with pymysql.connect(
            **login,
            charset="utf8mb4",
            use_unicode=False,
            conv=cast("Any", encoders),  # no decoders: every value stays the bytes that the server sent
            cursorclass=SSCursor,
            autocommit=True,
            connect_timeout=_CONNECT_TIMEOUT,
            read_timeout=_CONNECT_TIMEOUT,
            write_timeout=_TIMEOUT,
        ) as connection:
            # The library has one for this and for the handshake.
            connection._read_timeout = _TIMEOUT  # type: ignore[attr-defined]  # noqa: SLF001
            if action == "restore":
                _restore(connection, sys.stdin.buffer)
                report: dict[str, Any] = {}
            elif action == "contents":
                _begin(connection)
                tables = _names(connection, "BASE TABLE", "SYSTEM VERSIONED")
                report = {"tables": {name.decode(): _contents(connection, name) for name in tables}}
            else:
                _begin(connection)
                # Closed before the report is made, which nobody reads earlier.
                with sys.stdout.buffer as output:
                    report = {"tables": _dump(connection, login["database"].encode(), output)}
    except (pymysql.Error, ValueError, MemoryError) as error:
        code = error.args[0] if isinstance(error, pymysql.Error) and error.args else 0
        report = {"code": code, "reason": repr(error)[:1000]}
    sys.stderr.write(json.dumps(report) + "\n")
    return 1 if "code" in report else 0


def _begin(connection: Connection) -> None:
    """Fix the moment that is read from now on."""
    _run(
        connection,
        f"SET SESSION net_write_timeout = {_TIMEOUT}, lock_wait_timeout = 60, sql_mode = '', time_zone = '+00:00'",
    )
    _run(connection, "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    _run(connection, "START TRANSACTION WITH CONSISTENT SNAPSHOT")


def _dump(connection: Connection, database: bytes, output: BinaryIO) -> dict[str, tuple[int, str]]:
    """Write the dump; return the rows and the checksum of each table."""
    delimiter = b";;" + secrets.token_hex(6).encode() + b"\n"
    contents: dict[str, tuple[int, str]] = {}
    output.write(b"DELIMITER " + delimiter)
    statements = _statements(connection, _quoted(database) + b".", contents)
    output.writelines(statement + delimiter for statement in statements)
    output.write(_END)
    return contents


def _statements(connection: Connection, own: bytes, contents: dict[str, tuple[int, str]]) -> Iterator[bytes]:
    """Yield a dump's statements, and put the contents of each table into `contents` on the way.

    `own` is how the server names the database in the SQL that it generates, where that does not go without.
    """
    yield from _SETTINGS
    for name in _names(connection, "SEQUENCE"):
        yield _query(connection, b"SHOW CREATE SEQUENCE " + _quoted(name))[0][1]
        [(value,)] = _query(connection, b"SELECT next_not_cached_value FROM " + _quoted(name))
        yield b"DO SETVAL(" + _quoted(name) + b", " + value + b", 0)"
    for name in _names(connection, "BASE TABLE", "SYSTEM VERSIONED"):
        # What it locks of a table goes with the savepoint, or the customer could not alter it before the end.
        _run(connection, "SAVEPOINT dump")
        yield _query(connection, b"SHOW CREATE TABLE " + _quoted(name))[0][1].replace(own, b"")
        contents[name.decode()] = _contents(connection, name)
        yield from _inserts(connection, name)
        _run(connection, "ROLLBACK TO SAVEPOINT dump")
    yield from _programs(connection, _ROUTINES)
    yield from _SETTINGS
    yield from _views(connection, own)
    yield from _programs(connection, _TRIGGERS)


def _names(connection: Connection, *kinds: str) -> list[bytes]:
    found = _query(
        connection,
        "SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE() AND table_type IN %s"
        " ORDER BY 1",
        kinds,
    )
    return [name for (name,) in found]


def _contents(connection: Connection, table: bytes) -> tuple[int, str]:
    """Let the server count, and add up a hash of each row: a sum does not depend on the order."""
    fields = b", ".join(
        b"IFNULL(" + (read if kind in _NUMBERS | _TIMES else b"MD5(" + read + b")") + b", '-')"
        for _, read, kind in _columns(connection, table)
    )
    row = b"CAST(CONV(LEFT(MD5(CONCAT_WS(',', " + fields + b")), 16), 16, 10) AS UNSIGNED)"
    [(rows, checksum)] = _query(connection, b"SELECT COUNT(*), IFNULL(SUM(" + row + b"), 0) FROM " + _quoted(table))
    return int(rows), checksum.decode()


def _columns(connection: Connection, table: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Return the columns that can be written: their quoted name, how they are read without a loss, and their type."""
    found = _query(
        connection,
        "SELECT column_name, LOWER(data_type) FROM information_schema.columns WHERE table_schema = DATABASE()"
        " AND table_name = %s AND extra NOT LIKE '%%VIRTUAL GENERATED%%' AND extra NOT LIKE '%%STORED GENERATED%%'"
        " ORDER BY ordinal_position",
        table.decode(),
    )
    columns = []
    for name, kind in found:
        quoted = _quoted(name)
        # The server shows six digits of a FLOAT, and all of a DOUBLE.
        read = {b"float": quoted + b" + 0e0", b"bit": quoted + b" + 0"}.get(kind, quoted)
        columns.append((quoted, read, kind))
    return columns


def _inserts(connection: Connection, table: bytes) -> Iterator[bytes]:
    columns = _columns(connection, table)
    head = b"INSERT INTO " + _quoted(table) + b" (" + b", ".join(name for name, _, _ in columns) + b") VALUES\n"
    rows: list[bytes] = []
    size = 0
    cursor = _execute(connection, b"SELECT " + b", ".join(read for _, read, _ in columns) + b" FROM " + _quoted(table))
    while (row := cast("tuple[bytes | None, ...] | None", cursor.fetchone())) is not None:
        values = []
        for number, (value, (_, _, kind)) in enumerate(zip(row, columns, strict=True)):
            if value is None:
                values.append(b"NULL")
            elif kind in _NUMBERS:
                values.append(value)
            elif len(value) <= _PIECE:
                values.append(_literal(value, kind))
            else:
                variable = b"@v%d" % number
                yield from _assignments(variable, value, kind)
                values.append(variable)
                size = _STATEMENT_SIZE  # the variable is this row's only
        rows.append(b"(" + b",".join(values) + b")")
        size += len(rows[-1])
        if size >= _STATEMENT_SIZE:
            yield head + b",\n".join(rows)
            rows, size = [], 0
    if rows:
        yield head + b",\n".join(rows)


def _assignments(variable: bytes, value: bytes, kind: bytes) -> Iterator[bytes]:
    # As bytes, since a piece may end within a character.
    yield b"SET " + variable + b" = _binary''"
    for start in range(0, len(value), _PIECE):
        piece = _literal(value[start : start + _PIECE], b"blob")
        yield b"SET " + variable + b" = CONCAT(" + variable + b", " + piece + b")"
    if kind not in _BYTES:
        yield b"SET " + variable + b" = CONVERT(" + variable + b" USING utf8mb4)"


def _literal(value: bytes, kind: bytes) -> bytes:
    for special, escaped in ((b"\\", b"\\\\"), (b"'", b"\\'"), (b"\0", b"\\0"), (b"\n", b"\\n"), (b"\r", b"\\r")):
        value = value.replace(special, escaped)
    return (b"_binary'" if kind in _BYTES else b"'") + value + b"'"


def _programs(connection: Connection, query: str) -> Iterator[bytes]:
    """Yield routines or triggers, whose meaning depends on the settings that they were made with."""
    for kind, name in _query(connection, query):
        _, mode, text, _, collation, *_ = _query(connection, b"SHOW CREATE " + kind + b" " + _quoted(name))[0]
        yield b"SET SESSION sql_mode = '" + mode + b"', collation_connection = " + collation
        yield _without_definer(text)


def _views(connection: Connection, own: bytes) -> Iterator[bytes]:
    """Yield views, which may be made of each other: first one in place of each, with its columns."""
    finals = []
    for name in _names(connection, "VIEW"):
        # None, if what it is made of is gone.
        if columns := _columns(connection, name):
            yield b"CREATE VIEW " + _quoted(name) + b" AS SELECT " + b", ".join(b"1 AS " + col for col, _, _ in columns)
            text = _without_definer(_query(connection, b"SHOW CREATE VIEW " + _quoted(name))[0][1].replace(own, b""))
            finals.append(text.replace(b"CREATE ", b"CREATE OR REPLACE ", 1))
    yield from finals


def _without_definer(text: bytes) -> bytes:
    """Let whoever restores it be the definer: he could not make anybody else one."""
    return _DEFINER.sub(rb"\1", text)


def _restore(connection: Connection, dump: BinaryIO) -> None:
    [(limit,)] = _query(connection, "SELECT @@max_allowed_packet")
    header = _HEADER.fullmatch(dump.readline(_CHUNK))
    if header is None:
        raise ValueError("this is no dump of ours")
    rest = b""
    while chunk := dump.read(_CHUNK):
        *statements, rest = (rest + chunk).split(header[1] + b"\n")
        for statement in statements:
            _run(connection, statement)
        if len(rest) > int(limit):
            raise ValueError("a statement is longer than the server takes")
    if rest != _END:
        raise ValueError("the dump does not end where it should")


def _run(connection: Connection, statement: bytes | str) -> None:
    """Run a statement that has no answer: rows could be any number, and only a dump of another's making has any."""
    cursor = _execute(connection, statement)  # kept until the connection is gone, as it would read all rows first
    if cursor.description is not None:
        raise ValueError("a statement is a query")


def _query(connection: Connection, statement: bytes | str, *args: object) -> list[tuple[bytes, ...]]:
    return cast("list[tuple[bytes, ...]]", _execute(connection, statement, *args).fetchall())


def _execute(connection: Connection, statement: bytes | str, *args: object) -> SSCursor:
    """Run a statement; the cursor is read to its end or left to a connection that ends, as a close would read on."""
    cursor = connection.cursor()
    # The library takes bytes as they are; its types do not say so.
    cursor.execute(cast("str", statement), args or None)
    return cursor


def _quoted(name: bytes) -> bytes:
    return b"`" + name.replace(b"`", b"``") + b"`"


if __name__ == "__main__":
    sys.exit(main())
