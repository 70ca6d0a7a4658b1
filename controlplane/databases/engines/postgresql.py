"""The PostgreSQL driver: a role and a database of one name, changed only where the cluster differs from the target."""

import re
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from hmac import compare_digest
from pathlib import Path
from urllib.parse import quote, urlsplit

import asyncpg
import structlog
from scramp import ScramMechanism

from controlplane.databases.engines.engine import Busy, Connection, Contents, Dump, EngineError, Observation, Target
from controlplane.databases.engines.postgresql_dump import PostgreSQLDump, count_contents, lock_tables, run_pg_restore
from controlplane.databases.engines.postgresql_errors import TRY_LATER, in_our_terms

_NAME = re.compile(r"[a-z][a-z0-9_]{2,31}")
_SYSTEM_NAMES = {"postgres", "template0", "template1"}

_CONNECT_TIMEOUT = 3.0
_STATEMENT_TIMEOUT = 30.0
# Lets the server's own timeout come first; what is beyond it is for a network that swallows packets.
_ANSWER_MARGIN = 5.0
_NO_TIMEOUT = 0.0
_LOCK_TIMEOUT = 60.0

_FORBIDDEN = {
    "rolsuper": "NOSUPERUSER",
    "rolcreatedb": "NOCREATEDB",
    "rolcreaterole": "NOCREATEROLE",
    "rolreplication": "NOREPLICATION",
    "rolbypassrls": "NOBYPASSRLS",
}

# Here and not left to a database, whose owner may have set them otherwise.
_SETTINGS = {
    "application_name": "controlplane",
    "lock_timeout": f"{_LOCK_TIMEOUT:.0f}s",
    "search_path": "pg_catalog",
    "role": "none",
    "row_security": "off",
    "idle_in_transaction_session_timeout": "0",
    # A table may have become a view when we come to read it, and the functions in it would run as us (CVE-2024-7348).
    "restrict_nonsystem_relation_kind": "view, foreign-table",
    # What a value looks like as text, and so its checksum.
    "timezone": "UTC",
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "quote_all_identifiers": "off",
}

_INVALID = -2  # datconnlimit of a database whose DROP was interrupted; what is left of it cannot be used

# A customer may store a verifier of his own making, and to check one with millions of rounds takes seconds: only one of
# the form of ours, with 32 bytes of salt, is looked at.
_ROUNDS = 4096
_VERIFIER = re.compile(rf"SCRAM-SHA-256\${_ROUNDS}:([A-Za-z0-9+/]{{43}}=)\$[^:]+:.+")


class PostgreSQL:
    """One PostgreSQL cluster, version 15.8, 16.4, 17 or later.

    `admin_dsn` is a URL as libpq takes it: `postgresql://admin:secret@host:5432/postgres?sslmode=verify-full`, or
    `postgresql://admin@/postgres?host=/folder/of/the/socket`. The admin is a superuser, or has CREATEROLE and
    CREATEDB. Its database is where the work is done from; no tenant may connect there. `host` and `port` are what
    customers connect to. `bin_dir` holds the `pg_dump` and `pg_restore` of the cluster's own major version: an older
    one refuses, and what a newer one writes only a newer one reads, with settings that the cluster does not know.

    Enforced: who may connect, and how many connections at once; with a superuser as the admin, also that temporary
    files stay within the storage. Advice: memory and the size of the data, which PostgreSQL limits for no database.
    A new password holds for new sessions; those that run go on.

    Each action has a connection of its own: that takes 3 ms of the 35 that a new database takes, and the advisory
    lock on it goes when it goes.
    """

    def __init__(self, *, admin_dsn: str, host: str, port: int, bin_dir: Path) -> None:
        if urlsplit(admin_dsn).scheme not in {"postgresql", "postgres"}:
            raise ValueError("The admin DSN must be a URL: postgresql://user:password@host:port/database")
        self._dsn = admin_dsn
        self._host = host
        self._port = port
        self._bin_dir = bin_dir

    async def apply(self, target: Target) -> tuple[str, ...]:
        """Make the cluster match the target; see `Engine.apply`."""
        async with self._locked(target.name) as admin:
            await _isolate_system_databases(admin)
            differed = (*await _apply_role(admin, target), *await _apply_database(admin, target.name))
            return ("the database",) if "the database" in differed else differed

    async def drop(self, name: str) -> None:
        """Remove database and role; see `Engine.drop`."""
        async with self._locked(name) as admin:
            if await _role_exists(admin, name):
                await _own_role(admin, name)
            if await admin.fetchval("SELECT datistemplate FROM pg_database WHERE datname = $1", name):
                await admin.execute(f'ALTER DATABASE "{name}" IS_TEMPLATE false')  # its owner can make it undroppable
            await admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            if await _role_exists(admin, name):
                # Rights that somebody granted it on other databases would keep the role.
                await admin.execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')

    async def observe(self, name: str) -> Observation | None:
        """Return what the database is like; see `Engine.observe`."""
        _check_name(name)
        async with self._admin() as admin:
            row = await admin.fetchrow(
                "SELECT rolcanlogin AND datallowconn AS login, pg_database_size(d.oid) AS size_bytes,"
                " (SELECT count(*) FROM pg_stat_activity a WHERE a.datid = d.oid AND a.usename = $1) AS connections"
                " FROM pg_database d JOIN pg_roles r ON r.rolname = d.datname WHERE d.datname = $1",
                name,
            )
        if row is None:
            return None
        return Observation(login=row["login"], connections=row["connections"], size_bytes=row["size_bytes"])

    async def names(self, prefix: str) -> set[str]:
        """Return the names of databases and roles; see `Engine.names`."""
        async with self._admin() as admin:
            rows = await admin.fetch(
                "SELECT datname::text AS name FROM pg_database WHERE starts_with(datname, $1)"
                " UNION SELECT rolname::text FROM pg_roles WHERE starts_with(rolname, $1)",
                prefix,
            )
        return {row["name"] for row in rows}

    @asynccontextmanager
    async def dump(self, name: str) -> AsyncIterator[Dump]:
        """Open a dump in pg_dump's custom format; see `Engine.dump`."""
        _check_name(name)
        async with self._snapshot(name) as admin:  # not in our terms what our caller raises meanwhile
            dump = PostgreSQLDump(admin, program=self._bin_dir / "pg_dump", dsn=self._dsn, name=name)
            try:
                yield dump
            finally:
                await dump.close()

    async def restore(self, name: str, password: str, chunks: AsyncIterator[bytes]) -> None:
        """Read a dump as the tenant; see `Engine.restore`."""
        _check_name(name)
        dsn = self._tenant_dsn(name)
        with in_our_terms():  # to learn why, if the tenant does not get in: pg_restore's words are not for programs
            tenant = await asyncpg.connect(dsn, password=password, timeout=_CONNECT_TIMEOUT)
            await tenant.close(timeout=_CONNECT_TIMEOUT)
        await run_pg_restore(self._bin_dir / "pg_restore", dsn=dsn, password=password, chunks=chunks)

    async def contents(self, name: str) -> Contents:
        """Return what is in the database; see `Engine.contents`."""
        _check_name(name)
        async with self._snapshot(name) as admin:
            with in_our_terms():
                return await count_contents(admin, await lock_tables(admin))

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

    def _tenant_dsn(self, name: str) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"postgresql://{name}@{host}:{self._port}/{name}"

    @asynccontextmanager
    async def _locked(self, name: str) -> AsyncIterator[asyncpg.Connection]:
        """Connect as the admin and hold the lock of this name; whoever else wants it meanwhile is told Busy."""
        _check_name(name)
        async with self._admin() as admin:
            if not await admin.fetchval("SELECT pg_try_advisory_lock(hashtextextended($1, 0))", name):
                raise Busy("Another change to this database is still under way; look again in a moment.")
            yield admin

    @asynccontextmanager
    async def _snapshot(self, name: str) -> AsyncIterator[asyncpg.Connection]:
        """Connect as the admin to a tenant's database, and see it as it is at this moment.

        Without a timeout, as it takes as long as there is data; whoever wants it has a deadline.
        """
        with in_our_terms():
            admin = await self._connect(database=name, within=_NO_TIMEOUT)
        try:
            with in_our_terms():
                # Another setting of the owner's, which only version 17 knows.
                await admin.execute(
                    "SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'transaction_timeout'"
                )
                await admin.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield admin
        finally:
            with suppress(*TRY_LATER, asyncpg.PostgresError):
                await admin.close(timeout=_CONNECT_TIMEOUT)

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[asyncpg.Connection]:
        """Connect as the admin, and tell what goes wrong meanwhile in the terms of the seam."""
        admin = None
        try:
            with in_our_terms():
                admin = await self._connect(within=_STATEMENT_TIMEOUT)
                yield admin
                await admin.close(timeout=_CONNECT_TIMEOUT)  # waits for the server, so that its locks are gone too
        finally:
            if admin is not None:
                admin.terminate()

    async def _connect(self, *, database: str | None = None, within: float) -> asyncpg.Connection:
        return await asyncpg.connect(
            self._dsn,
            **({"database": database} if database else {}),
            timeout=_CONNECT_TIMEOUT,
            command_timeout=within + _ANSWER_MARGIN if within else None,
            server_settings={**_SETTINGS, "statement_timeout": f"{within:.0f}s"},
        )


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


async def _apply_role(admin: asyncpg.Connection, target: Target) -> list[str]:
    name, differed = target.name, list[str]()
    if not await _role_exists(admin, name):
        await admin.execute(f'CREATE ROLE "{name}"')
        differed.append("the user")
    await _own_role(admin, name)
    role = await admin.fetchrow(
        "SELECT *, rolvaliduntil < 'infinity' AS expires FROM pg_roles WHERE rolname = $1", name
    )
    # Only what differs: an admin who is no superuser may not even name an attribute that he lacks.
    options = [word for attribute, word in _FORBIDDEN.items() if role[attribute]]
    if await _revoke_memberships(admin, name) or options:
        differed.append("the user's rights")
    if role["rolcanlogin"] != target.login:
        options.append("LOGIN" if target.login else "NOLOGIN")
        differed.append("whether it can be logged in to")
    if role["rolconnlimit"] != target.connections:
        options.append(f"CONNECTION LIMIT {target.connections:d}")
        differed.append("the connection limit")
    has_password = await _has_password(admin, name, target.password)
    if not has_password:
        options.append(f"PASSWORD '{_verifier(target.password)}'")
        differed += [] if has_password is None else ["the password"]
    if role["expires"]:
        options.append("VALID UNTIL 'infinity'")
        differed.append("the password's end")
    if options:
        await admin.execute(f'ALTER ROLE "{name}" {" ".join(options)}')
    if await _limit_temporary_files(admin, role, target):
        differed.append("the limit of temporary files")
    if not target.login:
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", name)
    return ["the user"] if "the user" in differed else differed


async def _revoke_memberships(admin: asyncpg.Connection, name: str) -> bool:
    """Take from the role what it is a member of, and its members but for admins; tell whether there was any."""
    found = await admin.fetch(
        "SELECT pg_get_userbyid(roleid) AS role, pg_get_userbyid(member) AS member, pg_get_userbyid(grantor) AS grantor"
        " FROM pg_auth_members WHERE pg_get_userbyid(member) = $1"
        " OR pg_get_userbyid(roleid) = $1"
        " AND NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = member AND (rolsuper OR rolcreaterole))",
        name,
    )
    for row in found:
        role, member, grantor = (_quoted(row[key]) for key in ("role", "member", "grantor"))
        await admin.execute(f"REVOKE {role} FROM {member} GRANTED BY {grantor} CASCADE")
    return bool(found)


async def _limit_temporary_files(admin: asyncpg.Connection, role: asyncpg.Record, target: Target) -> bool:
    """Set the limit, and tell whether it differed; only a superuser can, and then the tenant himself cannot."""
    setting = f"temp_file_limit={target.storage_gb}GB"
    if setting in (role["rolconfig"] or ()) or not await _is_superuser(admin):
        return False
    await admin.execute(f"ALTER ROLE \"{target.name}\" SET temp_file_limit = '{target.storage_gb:d}GB'")
    return True


async def _apply_database(admin: asyncpg.Connection, name: str) -> list[str]:
    database = await admin.fetchrow(
        "SELECT pg_get_userbyid(datdba) AS owner, datconnlimit, datallowconn FROM pg_database WHERE datname = $1", name
    )
    differed = list[str]()
    if database is None:
        # Closed until PUBLIC has lost its rights, or a tenant could slip in before. STRATEGY wal_log, the default, took
        # 31 ms where file_copy took 81.
        await admin.execute(
            f'CREATE DATABASE "{name}" OWNER "{name}" TEMPLATE template0 ENCODING \'UTF8\' ALLOW_CONNECTIONS false'
        )
        differed.append("the database")
    elif database["datconnlimit"] == _INVALID:
        raise EngineError("The database was half deleted and cannot be used; delete it, and create it anew.")
    elif database["owner"] != name:
        await admin.execute(f'ALTER DATABASE "{name}" OWNER TO "{name}"')
        differed.append("the owner")
    found = await admin.fetchrow(
        "SELECT datallowconn AND datconnlimit = -1 AND NOT datistemplate"
        " AND has_database_privilege($1, oid, 'CREATE') AND has_database_privilege($1, oid, 'CONNECT')"
        " AND has_database_privilege($1, oid, 'TEMPORARY') AS matches,"
        " ARRAY(SELECT DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END"
        " FROM aclexplode(coalesce(datacl, acldefault('d', datdba))) WHERE grantee <> datdba) AS others"
        " FROM pg_database WHERE datname = $1",
        name,
    )
    if found["others"] or not found["matches"]:
        await admin.execute(
            f'REVOKE ALL ON DATABASE "{name}" FROM {", ".join(found["others"]) or "PUBLIC"} CASCADE;'
            f'GRANT ALL ON DATABASE "{name}" TO "{name}";'
            f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true CONNECTION LIMIT -1 IS_TEMPLATE false'
        )
        differed += [] if "the database" in differed else ["who may connect"]
    return differed


async def _role_exists(admin: asyncpg.Connection, name: str) -> bool:
    return bool(await admin.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", name))


async def _own_role(admin: asyncpg.Connection, name: str) -> None:
    """Let an admin who is no superuser act for the role: to give it a database, end its sessions, drop both."""
    if await _is_superuser(admin):
        return
    # Before version 16 membership means all of this.
    options = " WITH INHERIT TRUE, SET TRUE" if admin.get_server_version().major >= 16 else ""  # noqa: PLR2004
    await admin.execute(f'GRANT "{name}" TO CURRENT_USER{options}')


async def _is_superuser(admin: asyncpg.Connection) -> bool:
    return bool(await admin.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"))


async def _has_password(admin: asyncpg.Connection, name: str, password: str) -> bool | None:
    """Return whether this is the role's password; None where only a superuser could tell."""
    if not await admin.fetchval("SELECT has_table_privilege('pg_authid', 'SELECT')"):
        return None
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


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in _SYSTEM_NAMES or name.startswith("pg_"):
        raise ValueError(f"{name!r} cannot be the name of a tenant's database")


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'
