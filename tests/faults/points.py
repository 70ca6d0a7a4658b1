"""The places where a server's process changes the world outside of it: at each of them it can be killed.

They are put around the libraries by which it does so, below the project's code, so that what the code does is found out
and not listed: statements and commands to clusters, programs, commits of the control plane's own database, and what
happens to the files of backups.

Each has moments: before it; amid it, after half of the time that it took when it was last seen; and after it. What is
after one point is before the next, unless somebody gets an answer in between: so only the commit of an order, or of
what a host has told, has an "after". What the kernel does with a file has no "amid". What only reads or locks has no
moment at all, as the world is the same before and behind it; nor has what hosts report now and then, which would come
anywhere between. The scope `everything` makes moments of all these too; `cluster` leaves out commits and files, which
are the same for each engine.
"""

import asyncio
import inspect
import os
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import asyncpg
import httpx2
import pymongo.monitoring
import pymysql
import sqlalchemy
from sqlalchemy.engine.default import DefaultDialect

from controlplane.backups import storage

# A point's, of "before", "amid" and "after".
Moments = Collection[str]
_OF_READING: Moments = ()
_OF_A_FILE = ("before",)
_OF_A_CHANGE = ("before", "amid")
_OF_AN_ANSWER = ("before", "amid", "after")
# From the arguments of a call: what its point is called, and its moments; None if it is none.
Name = Callable[..., tuple[str, Moments] | None]
Scope = Literal["cluster", "usual", "everything"]

_SECONDS = 0.002  # of a point that was never seen
_READS = re.compile(r"\s*(SELECT|SHOW|SET|WITH|LOCK|BEGIN|COMMIT|ROLLBACK|;|$)", re.IGNORECASE)
_ACTS = re.compile(r"terminate", re.IGNORECASE)
_WORDS = re.compile(r"\s*((?:[A-Za-z_]+[ (,]?)*)")
_CHANGES = re.compile(r"\s*(?:INSERT INTO|UPDATE|DELETE FROM) (\w+)")
_READING_COMMANDS = {
    *("find", "getMore", "killCursors", "aggregate", "count", "listCollections", "listDatabases", "listIndexes"),
    *("usersInfo", "dbStats", "currentOp", "hello", "ping", "saslStart", "saslContinue", "endSessions"),
}
# One of these tables is changed for whom an answer follows: the record has what customers order, and nothing else; the
# others have what a host has taken over, and how loading a function went.
_ANSWERED = {"audit_entries", "hosts", "function_versions"}
_NOW_AND_THEN = {
    *("hosts", "function_log_batches", "function_log_heads", "function_log_lines", "proxy_counters", "proxy_usage"),
}
# What differs from run to run: ids, and the middle of a temporary file's name.
_CHANCE = re.compile(r"\b[a-z]\w*_[0-9a-z]{26}|(?<=\.)[^.]{8}(?=\.part$)")


class Points:
    """Counts the moments of this process from when it is told to, and kills it at one of them.

    Where several do things at once, a moment's number is not the same each time. So it has a name too: which of those
    at its point it is, `before commit functions #2`; once told a name, the process reports that of each that comes.
    """

    def __init__(self, report: Callable[[Mapping[str, Any]], None], *, scope: Scope) -> None:
        self._report = report
        self._scope = scope
        self._lock = threading.Lock()
        self._left = 0
        self._named: str | None = None
        self._came = Counter[str]()
        self._seconds: dict[str, float] = {}
        self._pause_at: list[str] = []

    def arm(self, moment: int | str, seconds: dict[str, float]) -> None:
        """Kill the process at the moment of this number or name from now, never for 0 or an empty one.

        `seconds` is what points take.
        """
        signal.setitimer(signal.ITIMER_REAL, 0)  # or an alarm that comes too late would ring in what is done next
        with self._lock:
            self._left, self._named = (moment, None) if isinstance(moment, int) else (0, moment)
            self._came.clear()
            self._seconds = seconds

    def pause_at(self, names: list[str]) -> None:
        """Stop the process, until somebody lets it go on, where it comes to these points one after the other.

        It stops at the last; each goes by how its name begins.
        """
        with self._lock:
            self._pause_at = names

    @contextmanager
    def at(self, name: str, moments: Moments) -> Iterator[None]:
        """Pass a point."""
        began = self.begin(name, moments)
        try:
            yield
        finally:
            self.end(name, moments, began)

    def begin(self, name: str, moments: Moments) -> float:
        """Come to a point; return when."""
        if self._is_last(name):
            self._report({"paused": name})
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # by `kill` another thread may have it first
        if self._is_now("before", name, moments):
            self._die(f"before {name}")
        if self._is_now("amid", name, moments):
            self._report({"killed": f"amid {name}"})
            # The kernel's own alarm ends a process that has no handler for it, whatever it is doing.
            signal.setitimer(signal.ITIMER_REAL, self._seconds.get(name, _SECONDS) / 2)
        return time.perf_counter()

    def end(self, name: str, moments: Moments, began: float) -> None:
        """Leave a point behind."""
        if "amid" in moments:
            self._report({"passed": name, "seconds": time.perf_counter() - began})
        if self._is_now("after", name, moments):
            self._die(f"after {name}")

    def _is_now(self, moment: str, name: str, moments: Moments) -> bool:
        if moment not in moments and self._scope != "everything":
            return False
        if self._scope == "cluster" and name.startswith(("commit", "file")):
            return False
        with self._lock:
            if self._named is None:
                self._left -= 1
                return self._left == 0
            point = f"{moment} {name}"
            self._came[point] += 1
            self._report({"came": f"{point} #{self._came[point]}"})
            return self._named == f"{point} #{self._came[point]}"

    def _is_last(self, name: str) -> bool:
        with self._lock:
            if not self._pause_at or not name.startswith(self._pause_at[0]):
                return False
            del self._pause_at[0]
            return not self._pause_at

    def _die(self, moment: str) -> None:
        self._report({"killed": moment})
        os.kill(os.getpid(), signal.SIGKILL)


def put_everywhere(points: Points, backups: Path) -> None:
    """Put the points around the libraries of this process; `backups` is the folder of their storage."""
    _around_commits(points)
    _around_files(points, backups)
    _around_programs(points)
    _around_sql(points)
    _around_http(points)
    _around_mongodb(points)


def _around_commits(points: Points) -> None:
    tables = dict[Any, dict[str, None]]()  # that a transaction has changed, by its connection

    def note(connection: sqlalchemy.Connection, _cursor: object, statement: str, *_more: object) -> None:
        if changes := _CHANGES.match(statement):
            tables.setdefault(connection.connection.dbapi_connection, {})[changes[1]] = None

    def forget(connection: sqlalchemy.Connection) -> None:
        tables.pop(connection.connection.dbapi_connection, None)

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", note)
    sqlalchemy.event.listen(sqlalchemy.Engine, "rollback", forget)

    def name(_dialect: object, connection: Any) -> tuple[str, Moments]:
        changed = tables.pop(connection.dbapi_connection, {})
        return f"commit {'+'.join(changed)}", _moments_of_a_commit(set(changed))

    _wrap(points, DefaultDialect, "do_commit", name)


def _moments_of_a_commit(changed: set[str]) -> Moments:
    if changed <= _NOW_AND_THEN:  # or nothing at all
        return _OF_READING
    return _OF_AN_ANSWER if changed & _ANSWERED else _OF_A_CHANGE


def _around_files(points: Points, backups: Path) -> None:
    def named(function: str, path_of: Callable[..., Any]) -> Name:
        def name(*args: Any, **options: Any) -> tuple[str, Moments] | None:
            path = Path(path_of(*args, **options))
            if not path.is_relative_to(backups):
                return None
            return f"file {function} {_CHANCE.sub('…', str(path.relative_to(backups)))}", _OF_A_FILE

        return name

    for function in ("mkdir", "rename", "unlink", "rmdir"):
        _wrap(points, os, function, named(function, lambda path, *_more, **_options: path))
    _wrap(points, os, "fsync", named("fsync", lambda number: Path(f"/proc/self/fd/{number}").readlink()))
    _wrap(points, tempfile, "mkstemp", named("mkstemp", lambda **options: f"{options['dir']}/{options['prefix']}"))
    _wrap(points, storage._Part, "write", named("write", lambda part, _chunk: part._aside))  # noqa: SLF001


def _around_programs(points: Points) -> None:
    def name(*command: Any, **_options: Any) -> tuple[str, Moments]:
        scripts = [part for part in map(str, command) if part.endswith(".py")]
        return f"program {Path((scripts or command)[0]).name}", _OF_A_CHANGE

    _wrap(points, asyncio, "create_subprocess_exec", name)


def _around_sql(points: Points) -> None:
    def name(_connection: object, sql: str, *_arguments: object, **_options: object) -> tuple[str, Moments] | None:
        # No driver writes rows: this is our own database, of which the commits count.
        return None if _CHANGES.match(sql) else _statement(sql)

    for method in ("execute", "executemany", "fetch", "fetchrow", "fetchval"):
        _wrap(points, asyncpg.Connection, method, name)
    _wrap(points, pymysql.connections.Connection, "query", name)


def _around_http(points: Points) -> None:
    def name(_client: object, request: httpx2.Request, **_options: object) -> tuple[str, Moments]:
        sql = request.url.params.get("query") or request.content.decode()
        return _statement(sql)

    _wrap(points, httpx2.AsyncClient, "send", name)


def _around_mongodb(points: Points) -> None:
    began = dict[int, float]()

    def moments(event: Any) -> Moments:
        return _OF_READING if event.command_name in _READING_COMMANDS else _OF_A_CHANGE

    class Listener(pymongo.monitoring.CommandListener):
        """Hears of each command before it is sent, and of its end."""

        def started(self, event: pymongo.monitoring.CommandStartedEvent) -> None:
            began[event.request_id] = points.begin(event.command_name, moments(event))

        def succeeded(self, event: Any) -> None:
            points.end(event.command_name, moments(event), began.pop(event.request_id))

        failed = succeeded

    pymongo.monitoring.register(Listener())


def _wrap(points: Points, owner: Any, name: str, name_of: Name) -> None:
    """Put a point around a function, named by its arguments."""
    original = getattr(owner, name)

    @wraps(original)
    def call(*args: Any, **options: Any) -> Any:
        if (point := name_of(*args, **options)) is None:
            return original(*args, **options)
        with points.at(*point):
            return original(*args, **options)

    @wraps(original)
    async def call_async(*args: Any, **options: Any) -> Any:
        if (point := name_of(*args, **options)) is None:
            return await original(*args, **options)
        with points.at(*point):
            return await original(*args, **options)

    setattr(owner, name, call_async if inspect.iscoroutinefunction(original) else call)


def _statement(sql: str) -> tuple[str, Moments]:
    """Return the words that it begins with, up to what it quotes; and its moments."""
    words = _WORDS.match(_CHANCE.sub("", sql))
    only_reads = _READS.match(sql) is not None and _ACTS.search(sql) is None
    return (words[1].strip(" (,")[:40] if words else ""), _OF_READING if only_reads else _OF_A_CHANGE
