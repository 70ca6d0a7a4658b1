"""The PostgreSQL driver: a role and a database of one name, changed only where the cluster differs from the target."""

import asyncio
import os
import re
from asyncio.subprocess import DEVNULL, PIPE
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from hmac import compare_digest
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import asyncpg
import structlog
from scramp import ScramMechanism

from controlplane.databases.engines.engine import Busy, ClusterUnavailable, Connection, EngineError, Target

_NAME = re.compile(r"[a-z][a-z0-9_]{2,62}")
_SYSTEM_NAMES = {"postgres", "template0", "template1"}

_CONNECT_TIMEOUT = 3.0
_STATEMENT_TIMEOUT = 30.0
# Lets the server's own timeout come first; this one is for a network that swallows packets.
_ANSWER_TIMEOUT = _STATEMENT_TIMEOUT + 5
_DUMP_LOCK_TIMEOUT = 60.0

_TRY_LATER = (
    OSError,
    asyncpg.PostgresConnectionError,
    # When the connection broke between two statements: "connection is closed", or a state that asyncpg did not expect.
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,  # starting, shutting down, timed out
    asyncpg.InsufficientResourcesError,  # too many connections, disk full
    asyncpg.LockNotAvailableError,
    asyncpg.ObjectInUseError,
    asyncpg.TransactionRollbackError,
)

_FORBIDDEN = {
    "rolsuper": "NOSUPERUSER",
    "rolcreatedb": "NOCREATEDB",
    "rolcreaterole": "NOCREATEROLE",
    "rolreplication": "NOREPLICATION",
    "rolbypassrls": "NOBYPASSRLS",
}

_INVALID = -2  # datconnlimit of a database whose DROP was interrupted; what is left of it cannot be used

# A customer may store a verifier of his own making, and to check one with millions of rounds takes seconds: only one of
# the form of ours, with 32 bytes of salt, is looked at.
_ROUNDS = 4096
_VERIFIER = re.compile(rf"SCRAM-SHA-256\${_ROUNDS}:([A-Za-z0-9+/]{{43}}=)\$[^:]+:.+")


class PostgreSQL:
    """One PostgreSQL cluster, version 15 or later.

    `admin_dsn` is a URL as libpq takes it: `postgresql://admin:secret@host:5432/postgres?sslmode=verify-full`, or
    `postgresql://admin@/postgres?host=/folder/of/the/socket`. The admin is a superuser, or has CREATEROLE and
    CREATEDB. Its database is where the work is done from; no tenant may connect there. `host` and `port` are what
    customers connect to. `bin_dir` holds the `pg_dump` of the cluster's own major version: an older one
    refuses, and what a newer one writes only a newer pg_restore reads, with settings that the cluster does not know.

    Each action has a connection of its own: that takes 3 ms of the 35 that a new database takes, and the advisory
    lock on it goes when it goes.
    """

    def __init__(self, *, admin_dsn: str, host: str, port: int, bin_dir: Path) -> None:
        if urlsplit(admin_dsn).scheme not in {"postgresql", "postgres"}:
            raise ValueError("The admin DSN must be a URL: postgresql://user:password@host:port/database")
        self._dsn = admin_dsn
        self._host = host
        self._port = port
        self._pg_dump = bin_dir / "pg_dump"

    async def apply(self, target: Target) -> None:
        """Make the cluster match the target; see `Engine.apply`."""
        async with self._locked(target.name) as admin:
            await _isolate_system_databases(admin)
            await _apply_role(admin, target)
            await _apply_database(admin, target.name)

    async def drop(self, name: str) -> None:
        """Remove database and role; see `Engine.drop`."""
        async with self._locked(name) as admin:
            if await _role_exists(admin, name):
                await _own_role(admin, name)
            await admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            if await _role_exists(admin, name):
                # Rights that somebody granted it on other databases would keep the role.
                await admin.execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')

    async def dump(self, name: str, path: Path) -> None:
        """Write a dump in pg_dump's custom format; see `Engine.dump`."""
        _check_name(name)
        with _new_file(path):
            await self._run_pg_dump(name, path)

    def connection(self, name: str, password: str) -> Connection:
        """Return how a customer reaches the database."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return Connection(
            host=self._host,
            port=self._port,
            database=name,
            username=name,
            password=password,
            uri=f"postgresql://{name}:{quote(password, safe='')}@{host}:{self._port}/{name}",
        )

    async def _run_pg_dump(self, name: str, path: Path) -> None:
        url, password = _without_password(self._dsn, database=name)
        # It syncs the file and its folder itself (since PostgreSQL 10). Without --role, as a tenant may lack rights on
        # his own tables, and forced row-level security would make the dump fail.
        process = await asyncio.create_subprocess_exec(
            self._pg_dump,
            "--format=custom",
            f"--file={path}",
            f"--lock-wait-timeout={_DUMP_LOCK_TIMEOUT * 1000:.0f}",
            "--no-password",
            f"--dbname={url}",
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            env={
                **os.environ,
                "LC_ALL": "C",
                "PGCONNECT_TIMEOUT": f"{_CONNECT_TIMEOUT:.0f}",
                **({"PGPASSWORD": password} if password else {}),
            },
        )
        try:
            _, output = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode == 0:
            return
        async with self._admin():  # raises ClusterUnavailable, if that is why
            pass
        lines = output.decode(errors="replace").splitlines()
        reason = next((line for line in lines if "error:" in line), f"exit status {process.returncode}")
        raise EngineError("The database could not be dumped; try again, or contact support.") from RuntimeError(reason)

    @asynccontextmanager
    async def _locked(self, name: str) -> AsyncIterator[asyncpg.Connection]:
        """Connect as the admin and hold the lock of this name; whoever else wants it meanwhile is told Busy."""
        _check_name(name)
        async with self._admin() as admin:
            if not await admin.fetchval("SELECT pg_try_advisory_lock(hashtextextended($1, 0))", name):
                raise Busy("Another change to this database is still under way; look again in a moment.")
            yield admin

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[asyncpg.Connection]:
        """Connect as the admin, and tell what goes wrong meanwhile in the terms of the seam."""
        admin = None
        try:
            admin = await asyncpg.connect(
                self._dsn,
                timeout=_CONNECT_TIMEOUT,
                command_timeout=_ANSWER_TIMEOUT,
                server_settings={
                    "application_name": "controlplane",
                    "statement_timeout": f"{_STATEMENT_TIMEOUT}s",
                    "search_path": "pg_catalog",
                },
            )
            yield admin
            await admin.close(timeout=_CONNECT_TIMEOUT)  # waits for the server, so that its locks are gone too
        except _TRY_LATER as error:
            raise ClusterUnavailable("The database cluster is not available at the moment; try again later.") from error
        except asyncpg.PostgresError as error:
            raise EngineError("The database cluster refused a change; contact support if this stays so.") from error
        finally:
            if admin is not None:
                admin.terminate()


@contextmanager
def _new_file(path: Path) -> Iterator[None]:
    """Make the file, for our eyes only where pg_dump would ask the umask, and remove it if its contents fail."""
    path.touch(0o600)
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


async def _isolate_system_databases(admin: asyncpg.Connection) -> None:
    """Keep tenants out of the databases that come with a cluster, and out of the admin's."""
    found = await admin.fetch(
        "SELECT datname, pg_has_role(datdba, 'USAGE') AS ours FROM pg_database"
        " WHERE (datname IN ('postgres', 'template1') OR datname = current_database())"
        " AND has_database_privilege('public', oid, 'CONNECT')"
    )
    for row in found:
        if row["ours"]:
            # Two at once on the same row would fail with "tuple concurrently updated".
            async with admin.transaction():
                await admin.execute("SELECT pg_advisory_xact_lock(hashtextextended('system databases', 0))")
                await admin.execute(f"REVOKE ALL ON DATABASE {_quoted(row['datname'])} FROM PUBLIC")
        else:
            structlog.get_logger().warning(
                "tenants can connect to a system database: revoke CONNECT on it from PUBLIC", database=row["datname"]
            )


async def _apply_role(admin: asyncpg.Connection, target: Target) -> None:
    name = target.name
    if not await _role_exists(admin, name):
        await admin.execute(f'CREATE ROLE "{name}"')
    await _own_role(admin, name)
    role = await admin.fetchrow("SELECT * FROM pg_roles WHERE rolname = $1", name)
    # Only what differs: an admin who is no superuser may not even name an attribute that he lacks.
    options = [word for attribute, word in _FORBIDDEN.items() if role[attribute]]
    if role["rolcanlogin"] != target.login:
        options.append("LOGIN" if target.login else "NOLOGIN")
    if role["rolconnlimit"] != target.connections:
        options.append(f"CONNECTION LIMIT {target.connections:d}")
    if not await _has_password(admin, name, target.password):
        options.append(f"PASSWORD '{_verifier(target.password)}'")
    if options:
        await admin.execute(f'ALTER ROLE "{name}" {" ".join(options)}')
    if not target.login:
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", name)


async def _apply_database(admin: asyncpg.Connection, name: str) -> None:
    database = await admin.fetchrow(
        "SELECT pg_get_userbyid(datdba) AS owner, datconnlimit FROM pg_database WHERE datname = $1", name
    )
    if database is None:
        # Closed until PUBLIC has lost its rights, or a tenant could slip in before. STRATEGY wal_log, the default, took
        # 31 ms where file_copy took 81.
        await admin.execute(
            f'CREATE DATABASE "{name}" OWNER "{name}" TEMPLATE template0 ENCODING \'UTF8\' ALLOW_CONNECTIONS false'
        )
    elif database["datconnlimit"] == _INVALID:
        raise EngineError("The database was half deleted and cannot be used; delete it, and create it anew.")
    elif database["owner"] != name:
        await admin.execute(f'ALTER DATABASE "{name}" OWNER TO "{name}"')
    matches = await admin.fetchval(
        "SELECT datallowconn AND datconnlimit = -1"
        " AND NOT has_database_privilege('public', oid, 'CREATE, CONNECT, TEMPORARY')"
        " AND has_database_privilege($1, oid, 'CREATE') AND has_database_privilege($1, oid, 'CONNECT')"
        " AND has_database_privilege($1, oid, 'TEMPORARY') FROM pg_database WHERE datname = $1",
        name,
    )
    if not matches:
        await admin.execute(
            f'REVOKE ALL ON DATABASE "{name}" FROM PUBLIC; GRANT ALL ON DATABASE "{name}" TO "{name}";'
            f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true CONNECTION LIMIT -1'
        )


async def _role_exists(admin: asyncpg.Connection, name: str) -> bool:
    return bool(await admin.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", name))


async def _own_role(admin: asyncpg.Connection, name: str) -> None:
    """Let an admin who is no superuser act for the role: to give it a database, end its sessions, drop both."""
    if await admin.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"):
        return
    # Before version 16 membership means all of this.
    options = " WITH INHERIT TRUE, SET TRUE" if admin.get_server_version().major >= 16 else ""  # noqa: PLR2004
    await admin.execute(f'GRANT "{name}" TO CURRENT_USER{options}')


async def _has_password(admin: asyncpg.Connection, name: str, password: str) -> bool:
    """Return whether this is the role's password; False where only a superuser could tell."""
    if not await admin.fetchval("SELECT has_table_privilege('pg_authid', 'SELECT')"):
        return False
    stored = await admin.fetchval("SELECT rolpassword FROM pg_authid WHERE rolname = $1", name)
    parts = _VERIFIER.fullmatch(stored or "")
    return parts is not None and compare_digest(stored, _verifier(password, b64decode(parts[1])))


def _verifier(password: str, salt: bytes | None = None) -> str:
    """Return what PostgreSQL stores for a password, so that no statement, and no log of one, holds the password."""
    salt, stored_key, server_key, rounds = ScramMechanism("SCRAM-SHA-256").make_auth_info(
        password, iteration_count=_ROUNDS, salt=salt
    )
    encoded = (b64encode(part).decode() for part in (salt, stored_key, server_key))
    return "SCRAM-SHA-256${}:{}${}:{}".format(rounds, *encoded)


def _without_password(dsn: str, *, database: str) -> tuple[str, str]:
    """Return the DSN for another database and without its password, which other users could read in a command line."""
    url = urlsplit(dsn)
    user, at, hosts = url.netloc.rpartition("@")
    user, _, password = user.partition(":")
    query = dict(parse_qsl(url.query))
    password = query.pop("password", unquote(password))
    return url._replace(
        netloc=f"{user}{at}{hosts}", path=f"/{database}", query=urlencode(query, quote_via=quote)
    ).geturl(), password


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in _SYSTEM_NAMES or name.startswith("pg_"):
        raise ValueError(f"{name!r} cannot be the name of a tenant's database")


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'
