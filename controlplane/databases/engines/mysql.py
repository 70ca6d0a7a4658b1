"""The MySQL driver: a database and a user of one name, changed only where the cluster differs from the target."""

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from hashlib import sha1
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pymysql
import structlog
from pymysql.constants import CR, ER
from pymysql.cursors import Cursor

from controlplane.databases.engines.engine import (
    Busy,
    Check,
    ClusterUnavailable,
    Connection,
    Contents,
    Missing,
    Observation,
    Target,
    unchecked,
)
from controlplane.databases.engines.mysql_dump import (
    WHILE_READING,
    Dump,
    contents_of,
    dump_program,
    report_of,
    translated,
)

T = TypeVar("T")
Admin: TypeAlias = "pymysql.Connection[Cursor]"

_NAME = re.compile(r"[a-z][a-z0-9_]{2,31}")
_SYSTEM_NAMES = {"mysql", "sys", "test", "information_schema", "performance_schema", "root", "public"}

_CONNECT_TIMEOUT = 3
_STATEMENT_TIMEOUT = 30
_END_TIMEOUT = 10.0  # for sessions that were killed: they first roll back

# The comments are code: the first to MariaDB alone, the second to MySQL 8 alone, which else shows yesterday's sizes. An
# idle session ends soon, as with a lost one its lock would stay.
_SESSION = (
    f"SET SESSION sql_mode = '', lock_wait_timeout = 10, innodb_lock_wait_timeout = 10, wait_timeout = 60"
    f" /*M! , max_statement_time = {_STATEMENT_TIMEOUT} */ /*!80000 , information_schema_stats_expiry = 0 */"
)

# All that there is for one database but GRANT OPTION, and EVENT: an event runs when nobody is logged in.
_RIGHTS = (
    "SELECT, INSERT, UPDATE, DELETE, CREATE, DROP, REFERENCES, INDEX, ALTER, CREATE TEMPORARY TABLES, LOCK TABLES,"
    " EXECUTE, CREATE VIEW, SHOW VIEW, CREATE ROUTINE, ALTER ROUTINE, TRIGGER"
)

# What SHOW CREATE USER says of an account that has no options but ours; MySQL 8 says more of them than MariaDB.
_ACCOUNT = re.compile(
    r"CREATE USER \S+( IDENTIFIED (BY PASSWORD|WITH 'mysql_native_password' AS) '(?P<verifier>[^']*)')?( REQUIRE NONE)?"
    r"( WITH MAX_USER_CONNECTIONS (?P<connections>\d+))?( PASSWORD EXPIRE DEFAULT)?( ACCOUNT (?P<lock>LOCK|UNLOCK))?"
    r"( PASSWORD (HISTORY|REUSE INTERVAL|REQUIRE CURRENT) DEFAULT)*"
)


class MySQL:
    """One MariaDB cluster, version 10.6 or later. Written for MySQL 8.0 too, but not tested on it.

    `admin_url` is `mysql://admin:secret@host:3306/?ssl-ca=/file.pem`, or `mysql://admin@/?socket=/path/of/the/socket`.
    With `ssl-ca` the server must prove that it is `host`; without, TLS is used if the server has it. The admin has
    all rights, with GRANT OPTION. `host` and `port` are what customers connect to.

    Enforced: who reads and writes what, the number of sessions, no login. Advice: `memory_mb` and `storage_gb`, as no
    account has a limit on either: set `maximum-sort-buffer-size` and its like in the cluster's configuration, and look
    at `observe()`. A new password ends the sessions that came in with the old one. A customer can change his password
    himself; the next `apply` puts ours back.

    The cluster wants `skip-symbolic-links`, no database `test` and no user without a name, which `apply` checks; on
    MySQL no `partial_revokes`; with a binary log `log_bin_trust_function_creators`. `enforce-storage-engine=InnoDB`
    makes dumps consistent. Nothing keeps tenants apart in `XA RECOVER`: they see and can end each other's prepared
    transactions, and one that its tenant left behind keeps his database from going until somebody ends it.

    Statements go over a connection for each action, four at once, in threads: cancelled, an action goes on to its
    end, and holds its lock until then. Dumps are read and written by a process of their own, `mysql_dump_program.py`.
    """

    def __init__(self, *, admin_url: str, host: str, port: int) -> None:
        self._admin_login = _login(admin_url)
        self._host = host
        self._port = port
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="mysql")

    async def apply(self, target: Target, *, check: Check = unchecked) -> tuple[str, ...]:
        """Make the cluster match the target; see `Engine.apply`."""
        _check_name(target.name)
        if target.connections < 1:
            raise ValueError("0 connections would mean no limit")
        return await self._in_thread(self._apply, target, _from_thread(check))

    async def drop(self, name: str, *, check: Check = unchecked) -> None:
        """Remove database and user; see `Engine.drop`."""
        _check_name(name)
        await self._in_thread(self._drop, name, _from_thread(check))

    async def observe(self, name: str) -> Observation | None:
        """Return what the database is like; see `Engine.observe`. The size is InnoDB's estimate."""
        _check_name(name)
        return await self._in_thread(self._observe, name)

    async def names(self, prefix: str) -> set[str]:
        """Return the names of databases and users; see `Engine.names`."""
        return await self._in_thread(self._names, prefix)

    @asynccontextmanager
    async def dump(self, name: str) -> AsyncIterator[Dump]:
        """Open a dump, which is SQL; see `Engine.dump`.

        InnoDB's tables are in it as of one moment, others as of when it comes to them. The past of versioned tables is
        not, nor are views whose tables are gone.
        """
        _check_name(name)
        async with dump_program("dump", self._admin_login, name) as program:
            yield Dump(program)

    async def restore(self, name: str, password: str, chunks: AsyncIterator[bytes]) -> None:
        """Read a dump into an empty database as its user; see `Engine.restore`. It takes one of his sessions."""
        _check_name(name)
        login = {**self._admin_login, "user": name, "password": _sent(password)}
        async with dump_program("restore", login, name) as program:
            assert program.stdin is not None  # noqa: S101
            # It closes its end when the dump does not fit, and says why below.
            with suppress(ConnectionError):
                async for chunk in chunks:
                    program.stdin.write(chunk)
                    await program.stdin.drain()
            program.stdin.close()
            await report_of(program)

    async def contents(self, name: str) -> Contents:
        """Return what is in a database now, summed up by the server; see `Engine.contents`."""
        _check_name(name)
        async with dump_program("contents", self._admin_login, name) as program:
            return contents_of(await report_of(program, later=WHILE_READING))

    def connection(self, name: str, password: str) -> Connection:
        """Return how a customer reaches the database."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return Connection(
            host=self._host,
            port=self._port,
            database=name,
            username=name,
            password=password,
            uri=f"mysql://{name}:{quote(password, safe='')}@{host}:{self._port}/{name}",
        )

    def _apply(self, target: Target, check: Callable[[], None]) -> tuple[str, ...]:
        with self._locked(target.name, check) as admin:
            _warn_of_gaps(admin)
            if _exists(admin, target.name):
                return tuple(_apply_user(admin, target))
            if target.exists:
                raise Missing
            _rows(admin, f"CREATE DATABASE `{target.name}` CHARACTER SET utf8mb4")
            return ("the database", *(part for part in _apply_user(admin, target) if part != "the user"))

    def _drop(self, name: str, check: Callable[[], None]) -> None:
        with self._locked(name, check) as admin:
            for host in _hosts(admin, name):
                _rows(admin, f"DROP USER IF EXISTS '{name}'@%s", host)
            # A dump that reads it would keep it from going.
            _end_sessions(admin, "user = %s OR db = %s", name, name)
            _rows(admin, f"DROP DATABASE IF EXISTS `{name}`")

    def _observe(self, name: str) -> Observation | None:
        with self._admin() as admin:
            if not _exists(admin, name) or "%" not in _hosts(admin, name):
                return None
            [(account,)] = _rows(admin, f"SHOW CREATE USER '{name}'@'%'")
            [(size,)] = _rows(
                admin,
                "SELECT SUM(data_length + index_length) FROM information_schema.tables WHERE table_schema = %s",
                name,
            )
            sessions = _sessions(admin, "user = %s", name)
        return Observation(login=" ACCOUNT LOCK" not in account, connections=len(sessions), size_bytes=int(size or 0))

    def _names(self, prefix: str) -> set[str]:
        with self._admin() as admin:
            found = _rows(
                admin, "SELECT schema_name FROM information_schema.schemata UNION SELECT user FROM mysql.user"
            )
        return {name for (name,) in found if name.startswith(prefix)}

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *args))

    @contextmanager
    def _locked(self, name: str, check: Callable[[], None]) -> Iterator[Admin]:
        """Connect as the admin and hold the lock of this name; whoever else wants it meanwhile is told Busy."""
        lock = f"controlplane {name}"
        with self._admin() as admin:
            [(taken,)] = _rows(admin, "SELECT GET_LOCK(%s, 0)", lock)
            if not taken and _end_strangers(admin, lock):
                [(taken,)] = _rows(admin, "SELECT GET_LOCK(%s, 2)", lock)
            if not taken:
                raise Busy("Another change to this database is still under way; look again in a moment.")
            try:
                check()
                yield admin
            finally:
                # The server sees later than we that we are gone.
                with suppress(pymysql.Error, OSError):
                    _rows(admin, "SELECT RELEASE_LOCK(%s)", lock)

    @contextmanager
    def _admin(self) -> Iterator[Admin]:
        """Connect as the admin, and tell what goes wrong meanwhile in the terms of the seam."""
        admin: Admin = pymysql.connect(
            **self._admin_login,
            charset="utf8mb4",
            autocommit=True,
            init_command=_SESSION,
            connect_timeout=_CONNECT_TIMEOUT,
            read_timeout=_CONNECT_TIMEOUT,
            write_timeout=_STATEMENT_TIMEOUT,
            defer_connect=True,
        )
        try:
            admin.connect(_unix_socket(self._admin_login))
            # The library has one for the handshake and for statements, for which the server's own is to come first.
            admin._read_timeout = _STATEMENT_TIMEOUT + 5  # type: ignore[attr-defined]  # noqa: SLF001
            yield admin
        except OSError as error:
            raise translated(CR.CR_CONN_HOST_ERROR, "") from error
        except pymysql.Error as error:
            raise translated(error.args[0], "The database cluster refused a change; contact support.") from error
        finally:
            admin.close()


def _from_thread(check: Check) -> Callable[[], None]:
    """Return what a thread calls to have this loop ask."""
    loop = asyncio.get_running_loop()
    # Not for ever: the loop may have ended, and a thread that waits for it would keep the process from ending too.
    return lambda: asyncio.run_coroutine_threadsafe(check(), loop).result(_STATEMENT_TIMEOUT)


def _warn_of_gaps(admin: Admin) -> None:
    """Say what of the cluster's configuration lets tenants out of their databases."""
    [(shared, nameless, links)] = _rows(
        admin,
        "SELECT EXISTS (SELECT 1 FROM mysql.db WHERE user IN ('', 'PUBLIC')),"
        " EXISTS (SELECT 1 FROM mysql.user WHERE user = ''), @@have_symlink = 'YES'",
    )
    for is_open, warning in (
        (shared, "all users have rights on some database: revoke those of '' and PUBLIC in mysql.db"),
        (nameless, "there is a user without a name, who may come before a tenant: drop him"),
        (links, "tenants can make files wherever the server can: start it with skip-symbolic-links"),
    ):
        if is_open:
            structlog.get_logger().warning(warning)


def _apply_user(admin: Admin, target: Target) -> list[str]:
    name = target.name
    differs = []
    hosts = _hosts(admin, name)
    if hosts - {"%"}:  # a server prefers the account whose host is the more exact
        differs.append("a second user of its name")
    if "%" not in hosts:
        differs.append("the user")
    else:
        [(text,)] = _rows(admin, f"SHOW CREATE USER '{name}'@'%'")
        account = _ACCOUNT.fullmatch(text)
        if account is None:
            differs.append("the user's options")
        else:
            found = {
                "the password": account["verifier"] == _verifier(target.password),
                "the connection limit": account["connections"] == str(target.connections),
                "the login": (account["lock"] != "LOCK") == target.login,
            }
            differs += [part for part, is_right in found.items() if not is_right]
        if not _has_just_his_rights(admin, name):
            differs.append("the rights")
    options = (
        f"IDENTIFIED WITH mysql_native_password AS '{_verifier(target.password)}'"
        f" WITH MAX_USER_CONNECTIONS {target.connections:d} ACCOUNT {'UNLOCK' if target.login else 'LOCK'}"
    )
    if set(differs) - {"the connection limit", "the login"}:
        # Made anew, as no statement takes all away that an account may have: roles, proxies, limits of other kinds. A
        # session keeps the rights that it began with, so it ends. Ours goes first: whoever goes on after a crash finds
        # it missing, and does all of this.
        for host in ("%", *hosts - {"%"}):
            _rows(admin, f"DROP USER IF EXISTS '{name}'@%s", host)
        _end_sessions(admin, "user = %s", name)
        _rows(admin, f"CREATE USER '{name}'@'%' {options}")
        _rows(admin, f"GRANT {_RIGHTS} ON {_granted(name)} TO '{name}'@'%'")
    elif differs:
        _rows(admin, f"ALTER USER '{name}'@'%' {options}")
    if not target.login:
        _end_sessions(admin, "user = %s", name)
    return differs


def _has_just_his_rights(admin: Admin, name: str) -> bool:
    user = f"`{name}`@`%`"
    # MariaDB says the account's options again behind the first.
    found = {
        row if "GRANT OPTION" in row else re.sub(f"(?<={user}) .*", "", row)
        for (row,) in _rows(admin, f"SHOW GRANTS FOR {user}")
    }
    return found == {f"GRANT USAGE ON *.* TO {user}", f"GRANT {_RIGHTS} ON {_granted(name)} TO {user}"}


def _granted(name: str) -> str:
    """Return the database as GRANT wants it, where an underscore stands for any character."""
    escaped = name.replace("_", r"\_")
    return f"`{escaped}`.*"


def _exists(admin: Admin, name: str) -> bool:
    return bool(_rows(admin, "SELECT 1 FROM information_schema.schemata WHERE schema_name = %s", name))


def _hosts(admin: Admin, name: str) -> set[str]:
    """Return from where users of this name may come: each is an account of its own, and ours is the one of `%`."""
    return {host for (host,) in _rows(admin, "SELECT host FROM mysql.user WHERE user = %s", name)}


def _sessions(admin: Admin, condition: str, *args: str) -> set[int]:
    query = f"SELECT id FROM information_schema.processlist WHERE ({condition}) AND id != CONNECTION_ID()"  # noqa: S608
    return {number for (number,) in _rows(admin, query, *args)}


def _end_sessions(admin: Admin, condition: str, *args: str) -> None:
    """End sessions, and wait until they are gone, in which they may roll back for a while."""
    deadline = time.monotonic() + _END_TIMEOUT
    while sessions := _sessions(admin, condition, *args):
        if time.monotonic() > deadline:
            raise ClusterUnavailable("Sessions of the database are still being ended; try again later.")
        for session in sessions:
            try:
                _rows(admin, f"KILL {session:d}")
            except pymysql.OperationalError as error:
                if error.args[0] != ER.NO_SUCH_THREAD:  # it has ended by itself
                    raise
        time.sleep(0.01)


def _end_strangers(admin: Admin, lock: str) -> bool:
    """End the sessions of the user who holds the lock if he is a tenant, of whom each can take any lock."""
    strangers = _rows(
        admin,
        "SELECT user FROM information_schema.processlist JOIN information_schema.schemata ON schema_name = user"
        " WHERE id = IS_USED_LOCK(%s) AND user != SUBSTRING_INDEX(USER(), '@', 1)",
        lock,
    )
    for (user,) in strangers:
        _end_sessions(admin, "user = %s", user)
    return bool(strangers)


def _rows(admin: Admin, statement: str, *args: str) -> tuple[tuple[Any, ...], ...]:
    with admin.cursor() as cursor:
        cursor.execute(statement, args or None)
        return tuple(cursor.fetchall())


def _verifier(password: str) -> str:
    """Return what the server stores for a password, so that no statement, and no log of one, holds the password."""
    return "*" + sha1(sha1(password.encode()).digest()).hexdigest().upper()  # noqa: S324 - so says the protocol


def _sent(password: str) -> str:
    """Return what to give to the library, which sends Latin-1, for a password that everybody else sends in UTF-8."""
    return password.encode().decode("latin-1")


def _login(url: str) -> dict[str, Any]:
    """Return what to give to `pymysql.connect`."""
    parts = urlsplit(url)
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    if parts.scheme != "mysql" or not parts.username or query.keys() - {"socket", "ssl-ca"}:
        raise ValueError("The admin URL must be mysql://user:password@host:port/, with ?socket= or ?ssl-ca= if need be")
    login: dict[str, Any] = {"user": unquote(parts.username), "password": _sent(unquote(parts.password or ""))}
    if "socket" in query:
        return {**login, "unix_socket": query["socket"], "ssl_disabled": True}
    login |= {"host": parts.hostname or "localhost", "port": parts.port or 3306}
    if "ssl-ca" in query:
        login |= {"ssl_ca": query["ssl-ca"], "ssl_verify_cert": True, "ssl_verify_identity": True}
    return login


def _unix_socket(login: dict[str, Any]) -> socket.socket | None:
    """Connect to the socket if it is one: the library would not close one that nobody answers."""
    if "unix_socket" not in login:
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(_CONNECT_TIMEOUT)
        connection.connect(login["unix_socket"])
    except OSError:
        connection.close()
        raise
    return connection


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in _SYSTEM_NAMES:
        raise ValueError(f"{name!r} cannot be the name of a tenant's database")
