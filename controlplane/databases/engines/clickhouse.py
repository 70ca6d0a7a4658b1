"""The ClickHouse driver: a user and a database of one name, over HTTP; changed only where the server differs."""

import asyncio
import json
import re
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from ssl import create_default_context
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import httpx2

from controlplane.databases.engines.clickhouse_dump import ENGINES, ClickHouseDump, restore_dump, tables_of
from controlplane.databases.engines.clickhouse_http import STATEMENT_TIMEOUT, Refused, Session
from controlplane.databases.engines.engine import (
    Check,
    ClusterUnavailable,
    Connection,
    Contents,
    EngineError,
    Missing,
    Observation,
    Table,
    Target,
    unchecked,
)

_NAME = re.compile(r"[a-z][a-z0-9_]{2,31}")
_SYSTEM_NAMES = {"default", "system", "information_schema"}

_CONNECT_TIMEOUT = 3.0
# Lets the server's own timeout come first; this one is for a network that swallows packets.
_ANSWER_TIMEOUT = STATEMENT_TIMEOUT + 5.0
_ACTION_TIMEOUT = 60.0
# Between two pieces of a dump: a table that is merged while it is read (FINAL) may be silent for long.
_DATA_TIMEOUT = 300.0

_TRY_LATER = {
    "159",  # TIMEOUT_EXCEEDED
    "202",  # TOO_MANY_SIMULTANEOUS_QUERIES
    "209",  # SOCKET_TIMEOUT
    "210",  # NETWORK_ERROR
    "225",  # NO_ZOOKEEPER
    "236",  # ABORTED: it shuts down
    "241",  # MEMORY_LIMIT_EXCEEDED
    "242",  # TABLE_IS_READ_ONLY
    "243",  # NOT_ENOUGH_SPACE
    "252",  # TOO_MANY_PARTS
    "394",  # QUERY_WAS_CANCELLED
    "473",  # DEADLOCK_AVOIDED
    "700",  # USER_SESSION_LIMIT_EXCEEDED
    "745",  # SERVER_OVERLOADED
    "999",  # KEEPER_EXCEPTION
}
_WRONG_PASSWORD = "516"  # noqa: S105 - an error's number
_HTTP_TRY_LATER = {502, 503, 504}  # a proxy before the cluster

# Not ALL: CREATE DICTIONARY would let a tenant make the server read other hosts, and other databases as another user.
_RIGHTS = (
    "SHOW",
    "SELECT",
    "INSERT",
    "ALTER TABLE",
    "ALTER VIEW",
    "CREATE TABLE",
    "CREATE VIEW",
    "DROP TABLE",
    "DROP VIEW",
    "TRUNCATE",
    "OPTIMIZE",
)
# Without it there are no table functions, not even `format`. Those that read elsewhere want rights of their own.
_RIGHT_ANYWHERE = "CREATE TEMPORARY TABLE"
_ANYWHERE = (None, None, None, 0, 0)

# Words for a customer: what only a new user mends, and what is changed in place.
_IDENTITY = {"the user", "the login", "the password"}
_WORDS = {
    "max_sessions_for_user": "the connection limit",
    "max_concurrent_queries_for_user": "the connection limit",
    "max_memory_usage_for_user": "the memory limit",
}
_SETTINGS = {*_WORDS.values(), "the settings"}

# In a row each, what there is of a name; a subquery for each kind would take twice the time.
_LOOK = """\
SELECT 'databases' AS kind, '[]' AS row FROM system.databases WHERE name = {name:String}
UNION ALL SELECT 'users', toJSONString((toString(auth_type), host_ip, host_names, host_names_regexp, host_names_like,
    default_database)) FROM system.users WHERE name = {name:String}
UNION ALL SELECT 'roles', toJSONString(tuple(toString(granted_role_name)))
    FROM system.role_grants WHERE user_name = {name:String}
UNION ALL SELECT 'settings', toJSONString((ifNull(setting_name, inherit_profile), value, toString(writability)))
    FROM system.settings_profile_elements WHERE user_name = {name:String} AND ifNull(inherit_profile, '') != 'default'
UNION ALL SELECT 'grants', toJSONString((toString(access_type), database, table, column, is_partial_revoke,
    grant_option)) FROM system.grants WHERE user_name = {name:String}
FORMAT JSONEachRow"""

_OBSERVE = """\
SELECT
    (SELECT toUInt32(count()) FROM system.databases WHERE name = {name:String}) AS databases,
    (SELECT groupArray(length(host_ip) > 0) FROM system.users WHERE name = {name:String}) AS users,
    (SELECT toUInt32(count()) FROM system.processes WHERE user = {name:String}) AS connections,
    (SELECT toString(sum(total_bytes)) FROM system.tables WHERE database = {name:String}) AS size
FORMAT JSONEachRow"""

_NAMES = """\
SELECT name FROM system.databases WHERE startsWith(name, {prefix:String})
UNION DISTINCT SELECT name FROM system.users WHERE startsWith(name, {prefix:String})
FORMAT JSONEachRow"""


class ClickHouse:
    """One ClickHouse server, version 24.8 or later, or the embedded one (`controlplane.local.chdb`).

    `admin_url` is its HTTP interface: `https://admin:secret@host:8443`. The admin is an SQL user with
    `access_management`, all rights WITH GRANT OPTION, and without a readonly profile. `host` and `port` are what
    customers connect to, by HTTP as well.

    Enforced: sessions and running queries at once, memory of all queries together (all CONST: no tenant changes
    them), the engines of tables, rights on his own database only. Advice: the storage, of which ClickHouse has no
    limit per user or database. A server must have `access_control_improvements.table_engines_require_grant` on, or
    tenants write into each other's tables through a Buffer; and `remote_url_allow_hosts` set, as a table's settings
    may name a disk that is a web address.

    A user is made anew for another password, and when his login ends: the new one has another id, so whatever session
    the old one had is refused from then on. ClickHouse has no lock that ends with its session, so Busy is never raised:
    two workers at once send the same statements, each of which says all that is wanted, and none after 60 s. One
    that is paused between its check and its first statement may be overtaken all the same.
    """

    def __init__(self, *, admin_url: str, host: str, port: int) -> None:
        url = urlsplit(admin_url)
        if url.scheme not in {"http", "https"} or not url.hostname or not url.username:
            raise ValueError("The admin URL must be http(s)://user:password@host:port")
        self._scheme = url.scheme
        self._server = url._replace(netloc=url.netloc.rpartition("@")[2]).geturl()
        self._admin = httpx2.BasicAuth(unquote(url.username), unquote(url.password or ""))
        self._host = host
        self._port = port
        self._tls = create_default_context() if url.scheme == "https" else False

    async def apply(self, target: Target, *, check: Check = unchecked) -> tuple[str, ...]:
        """Make the server match the target; see `Engine.apply`."""
        name = _checked(target.name)
        async with _within(_ACTION_TIMEOUT), self._session(self._admin) as admin:
            found = await _look(admin, name)
            if not found.database and target.exists:
                raise Missing
            differs = found.differences(target)
            if target.login and not differs & _IDENTITY:
                differs |= set() if await self._opens(name, target.password) else {"the password"}
            await check()
            if not found.database:
                await admin.run(f"CREATE DATABASE IF NOT EXISTS {name}")
            if differs & _IDENTITY:
                await admin.run(_new_user(target))
            elif differs & _SETTINGS:
                await admin.run(f"ALTER USER {name} SETTINGS {_settings_clause(target)}")
            if differs & _IDENTITY or "the rights" in differs or not target.login:
                # The rights come last: whoever goes on after a crash finds them missing, and ends the queries too.
                await admin.run(f"REVOKE ALL ON *.* FROM {name}")
                await admin.run(f"KILL QUERY WHERE user = '{name}' SYNC")
                await _grant(admin, target)
            # Another version may give the same rights other names: only a change is one.
            if "the rights" in differs and (await _look(admin, name)).grants == found.grants:
                differs.discard("the rights")
        return ("the database",) if not found.database else tuple(sorted(differs))

    async def drop(self, name: str, *, check: Check = unchecked) -> None:
        """Remove user and database; see `Engine.drop`."""
        _checked(name)
        async with _within(_ACTION_TIMEOUT), self._session(self._admin) as admin:
            await check()
            await admin.run(f"DROP USER IF EXISTS {name}")
            await admin.run(f"KILL QUERY WHERE user = '{name}' SYNC")
            # Without SYNC the data stays for eight minutes, and its name with it.
            await admin.run(f"DROP DATABASE IF EXISTS {name} SYNC")

    async def observe(self, name: str) -> Observation | None:
        """Look at the database; see `Engine.observe`. Connections are queries that run: HTTP has no others."""
        _checked(name)
        async with _within(_ACTION_TIMEOUT), self._session(self._admin) as admin:
            row = json.loads(await admin.run(_OBSERVE, param_name=name))
        if not row["databases"] or not row["users"]:
            return None
        return Observation(
            login=bool(row["users"][0]), connections=int(row["connections"]), size_bytes=int(row["size"] or 0)
        )

    async def names(self, prefix: str) -> set[str]:
        """Return the names of databases and users that begin with this."""
        async with _within(_ACTION_TIMEOUT), self._session(self._admin) as admin:
            answer = await admin.run(_NAMES, param_prefix=prefix)
        return {json.loads(line)["name"] for line in answer.splitlines()} - _SYSTEM_NAMES

    @asynccontextmanager
    async def dump(self, name: str) -> AsyncIterator[ClickHouseDump]:
        """Open a dump; see `Engine.dump` and `clickhouse_dump`."""
        _checked(name)
        async with self._session(self._admin, silence=_DATA_TIMEOUT) as admin:
            tables = await tables_of(admin, name)
            dump = ClickHouseDump(admin, name, tables)
            try:
                yield dump
            finally:
                await dump.close()

    async def restore(self, name: str, password: str, chunks: AsyncIterator[bytes]) -> None:
        """Read a dump into an empty database as its own user; see `Engine.restore`."""
        _checked(name)
        async with self._session(httpx2.BasicAuth(name, password), silence=_DATA_TIMEOUT) as tenant:
            await restore_dump(tenant, name, chunks)

    async def contents(self, name: str) -> Contents:
        """Count and sum up the rows of every table, each as of its own moment."""
        _checked(name)
        tables = {}
        async with self._session(self._admin, silence=_DATA_TIMEOUT) as admin:
            for table in await tables_of(admin, name):
                if table.columns:
                    lines = table.lines(name)
                    sql = f"SELECT count(), sum(sipHash64(line)) FROM ({lines}) FORMAT TabSeparated"  # noqa: S608
                    rows, total = (await admin.run(sql, timeout=0, database=name)).split()
                    tables[table.name] = Table(rows=int(rows), checksum=f"{int(total):016x}")
        return Contents(tables=tables)

    def connection(self, name: str, password: str) -> Connection:
        """Return how a customer reaches the database: a URI as the clients of all languages take it, and not curl."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return Connection(
            host=self._host,
            port=self._port,
            database=name,
            username=name,
            password=password,
            uri=f"{self._scheme}://{name}:{quote(password, safe='')}@{host}:{self._port}/{name}",
        )

    async def _opens(self, name: str, password: str) -> bool:
        """Return whether this is the user's password. Other errors mean so too: that he has no connection left."""
        try:
            async with self._session(httpx2.BasicAuth(name, password)) as tenant:
                await tenant.run("", query="SELECT 1")
        except EngineError as error:
            if not isinstance(error.__cause__, Refused):
                raise
            return error.__cause__.code != _WRONG_PASSWORD
        return True

    @asynccontextmanager
    async def _session(self, auth: httpx2.BasicAuth, *, silence: float = _ANSWER_TIMEOUT) -> AsyncIterator[Session]:
        """Connect, and tell what goes wrong meanwhile in the terms of the seam."""
        try:
            async with httpx2.AsyncClient(
                base_url=self._server,
                auth=auth,
                verify=self._tls,
                timeout=httpx2.Timeout(silence, connect=_CONNECT_TIMEOUT),
                trust_env=False,
                limits=httpx2.Limits(max_connections=2),
            ) as client:
                yield Session(client)
        except httpx2.TransportError as error:
            raise ClusterUnavailable("The database cluster is not available at the moment; try again later.") from error
        except Refused as error:
            if error.code in _TRY_LATER or error.status in _HTTP_TRY_LATER:
                sentence = "The database cluster is not available at the moment; try again later."
                raise ClusterUnavailable(sentence) from error
            raise EngineError("The database cluster refused a change; contact support if this stays so.") from error


@dataclass(frozen=True, slots=True)
class _Found:
    """What is on the server of one name: whether a database, and of the user what system tables say."""

    database: bool
    users: list[list[object]]
    roles: list[list[object]]
    settings: dict[str, tuple[str, str]]
    grants: list[tuple[object, ...]]

    def differences(self, target: Target) -> set[str]:
        """Return, in words for a customer, what is not as it should be; only a login tells whether the password is."""
        if not self.users:
            return {"the user"}
        auth, *hosts, database = self.users[0]
        settings = {key: (str(value), "CONST") for key, value in _settings(target).items()}
        differs = {
            _WORDS.get(key, "the settings")
            for key in settings.keys() | self.settings.keys()
            if settings.get(key) != self.settings.get(key)
        }
        # One method, or a list of them since 24.9.
        if auth not in ("sha256_password", "['sha256_password']"):
            differs.add("the password")
        if hosts != [["::/0"] if target.login else [], [], [], []]:
            differs.add("the login")
        if database != target.name or self.roles:
            differs.add("the user")
        engines = [grant for grant in self.grants if grant[0] == "TABLE ENGINE"]
        rights = sorted(str(grant) for grant in self.grants if grant not in engines)
        wanted = [*((right, target.name, None, None, 0, 0) for right in _RIGHTS), (_RIGHT_ANYWHERE, *_ANYWHERE)]
        if rights != sorted(map(str, wanted * target.login)) or len(engines) != len(ENGINES) * target.login:
            differs.add("the rights")
        return differs


async def _look(admin: Session, name: str) -> _Found:
    return _found(await admin.run(_LOOK, param_name=name))


def _found(answer: str) -> _Found:
    found = defaultdict[str, list[list[Any]]](list)
    for line in map(json.loads, answer.splitlines()):
        found[line["kind"]].append(json.loads(line["row"]))
    return _Found(
        database=bool(found["databases"]),
        users=found["users"],
        roles=found["roles"],
        settings={key: (value, writability) for key, value, writability in found["settings"]},
        grants=sorted(map(tuple, found["grants"]), key=str),
    )


async def _grant(admin: Session, target: Target) -> None:
    """Give the user his rights; a session that outlives the login has none."""
    if target.login:
        engines = ", ".join(f"TABLE ENGINE ON {engine}" for engine in ENGINES)
        rights = f"{', '.join(_RIGHTS)} ON {target.name}.*, {_RIGHT_ANYWHERE} ON *.*, {engines}"
        await admin.run(f"GRANT {rights} TO {target.name}")


def _new_user(target: Target) -> str:
    """Return the statement that makes the user, or makes him anew. It has a hash, so no log has the password."""
    salt = secrets.token_hex(32)
    verifier = sha256(f"{target.password}{salt}".encode()).hexdigest()
    return (
        f"CREATE USER OR REPLACE {target.name} IDENTIFIED WITH sha256_hash BY '{verifier}' SALT '{salt}'"
        f" HOST {'ANY' if target.login else 'NONE'} DEFAULT DATABASE {target.name} SETTINGS {_settings_clause(target)}"
    )


def _settings(target: Target) -> dict[str, int]:
    return {
        "max_sessions_for_user": target.connections,
        "max_concurrent_queries_for_user": target.connections,
        "max_memory_usage_for_user": target.memory_mb * 1024 * 1024,
    }


def _settings_clause(target: Target) -> str:
    return ", ".join(f"{key} = {value} CONST" for key, value in _settings(target).items())


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name) or name in _SYSTEM_NAMES:
        raise ValueError(f"{name!r} cannot be the name of a tenant's database")
    return name


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    """Send nothing after this time, so that a worker that was paused does not act late."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise ClusterUnavailable("The database cluster is too slow at the moment; try again later.") from error
