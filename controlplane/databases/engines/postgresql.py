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

from controlplane.databases.engines.engine import (
    Busy,
    Check,
    ClusterUnavailable,
    Connection,
    Contents,
    Dump,
    EngineError,
    Missing,
    Observation,
    Target,
    unchecked,
)
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
_END_TIMEOUT = 5.0  # for one session that was told to end

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

# All that there is of one name, and who asks; in one statement, as a new connection's first words are its slowest.
_LOOK = """
SELECT us.rolsuper AS is_superuser, has_table_privilege('pg_authid', 'SELECT') AS sees_passwords,
  r.*, r.rolvaliduntil < 'infinity' AS expires,
  ARRAY(SELECT format('%I FROM %I GRANTED BY %I', pg_get_userbyid(roleid), pg_get_userbyid(member),
      pg_get_userbyid(grantor))
    FROM pg_auth_members WHERE member = r.oid
    OR roleid = r.oid AND NOT EXISTS (SELECT FROM pg_roles o WHERE o.oid = member AND (rolsuper OR rolcreaterole))
  ) AS memberships,
  pg_get_userbyid(datdba) AS owner, datconnlimit, datistemplate,
  datallowconn AND datconnlimit = -1 AND NOT datistemplate AND has_database_privilege(r.oid, d.oid, 'CREATE')
    AND has_database_privilege(r.oid, d.oid, 'CONNECT') AND has_database_privilege(r.oid, d.oid, 'TEMPORARY') AS opens,
  ARRAY(SELECT DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END
    FROM aclexplode(coalesce(datacl, acldefault('d', datdba))) WHERE grantee <> datdba) AS others
FROM pg_roles us LEFT JOIN pg_roles r ON r.rolname = $1 LEFT JOIN pg_database d ON d.datname = $1
WHERE us.rolname = current_user
"""

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
    A new password ends the sessions that came in with the old one. An admin who may not read `pg_authid` learns by a
    login as the tenant whether the password is ours, and sets it each time.

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

    async def apply(self, target: Target, *, check: Check = unchecked) -> tuple[str, ...]:
        """Make the cluster match the target; see `Engine.apply`."""
        async with self._locked(target.name, check) as admin:
            found = await admin.fetchrow(_LOOK, target.name)
            if found["owner"] is None and target.exists:
                raise Missing
            if found["datconnlimit"] == _INVALID:
                raise EngineError("The database was half deleted and cannot be used; delete it, and create it anew.")
            await _isolate_system_databases(admin)
            has_password = await self._has_password(admin, found, target)
            differed = await _apply_role(admin, found, target, has_password=has_password)
            if found["owner"] is None:
                await _create_database(admin, target.name)
                return ("the database",)
            return (*differed, *await _apply_database(admin, found, target.name))

    async def drop(self, name: str, *, check: Check = unchecked) -> None:
        """Remove database and role; see `Engine.drop`."""
        async with self._locked(name, check) as admin:
            found = await admin.fetchrow(_LOOK, name)
            if found["rolname"]:
                await _own_role(admin, found, name)
            if found["datistemplate"]:
                await admin.execute(f'ALTER DATABASE "{name}" IS_TEMPLATE false')  # its owner can make it undroppable
            await admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            if found["rolname"]:
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

    async def _has_password(self, admin: asyncpg.Connection, found: asyncpg.Record, target: Target) -> bool | None:
        """Return whether this is the role's password; None where that does not show, and nothing hangs on it."""
        if found["sees_passwords"]:
            stored = await admin.fetchval("SELECT rolpassword FROM pg_authid WHERE rolname = $1", target.name)
            parts = _VERIFIER.fullmatch(stored or "")
            return parts is not None and compare_digest(stored, _verifier(target.password, b64decode(parts[1])))
        if found["rolcanlogin"] and target.login:
            try:
                tenant = await asyncpg.connect(
                    self._tenant_dsn(target.name), password=target.password, timeout=_CONNECT_TIMEOUT
                )
                tenant.terminate()
            except asyncpg.InvalidPasswordError:
                return False
            except (*TRY_LATER, asyncpg.PostgresError):
                pass
        return None  # also if he got in, which he may by any password where the server's rules say `trust`

    def _tenant_dsn(self, name: str) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"postgresql://{name}@{host}:{self._port}/{name}"

    @asynccontextmanager
    async def _locked(self, name: str, check: Check) -> AsyncIterator[asyncpg.Connection]:
        """Connect as the admin and hold the lock of this name; whoever else wants it meanwhile is told Busy."""
        _check_name(name)
        async with self._admin() as admin:
            if not await admin.fetchval("SELECT pg_try_advisory_lock(hashtextextended($1, 0))", name):
                raise Busy("Another change to this database is still under way; look again in a moment.")
            await check()
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
        finally:
            if admin is not None:
                with suppress(*TRY_LATER, asyncpg.PostgresError):
                    await admin.close(timeout=_CONNECT_TIMEOUT)  # waits for the server, so that its locks are gone too

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


async def _apply_role(
    admin: asyncpg.Connection, found: asyncpg.Record, target: Target, *, has_password: bool | None
) -> list[str]:
    name, differed = target.name, _differences(found, target, has_password=has_password)
    if not found["rolname"]:
        await admin.execute(f'CREATE ROLE "{name}"')
    await _own_role(admin, found, name)
    for membership in found["memberships"]:
        await admin.execute(f"REVOKE {membership} CASCADE")
    if "the password" in differed:
        # Nobody comes in while the sessions end, and whoever goes on after a crash finds it missing and ends them too.
        await admin.execute(f'ALTER ROLE "{name}" PASSWORD NULL')
        await _end_sessions(admin, name)
    if differed or not has_password:
        # Only what differs: an admin who is no superuser may not even name an attribute that he lacks.
        options = [word for attribute, word in _FORBIDDEN.items() if found[attribute]]
        options += ["LOGIN" if target.login else "NOLOGIN", f"CONNECTION LIMIT {target.connections:d}"]
        options += [] if has_password else [f"PASSWORD '{_verifier(target.password)}'"]
        await admin.execute(f"ALTER ROLE \"{name}\" {' '.join(options)} VALID UNTIL 'infinity'")
    # Only a superuser can set it, and then the tenant himself cannot.
    if found["is_superuser"] and {"the user", "the limit of temporary files"} & set(differed):
        await admin.execute(f"ALTER ROLE \"{name}\" SET temp_file_limit = '{target.storage_gb:d}GB'")
    if not target.login:
        await _end_sessions(admin, name)
    return differed


def _differences(found: asyncpg.Record, target: Target, *, has_password: bool | None) -> list[str]:
    if not found["rolname"]:
        return ["the user"]
    limit = f"temp_file_limit={target.storage_gb}GB"
    matches = {
        "the user's rights": not found["memberships"] and not any(found[attribute] for attribute in _FORBIDDEN),
        "whether it can be logged in to": found["rolcanlogin"] == target.login,
        "the connection limit": found["rolconnlimit"] == target.connections,
        "the password": has_password is not False,
        "the password's end": not found["expires"],
        "the limit of temporary files": not found["is_superuser"] or limit in (found["rolconfig"] or ()),
    }
    return [part for part, is_right in matches.items() if not is_right]


async def _end_sessions(admin: asyncpg.Connection, name: str) -> None:
    """End the role's sessions, and wait until they are gone."""
    ended = await admin.fetchval(
        "SELECT count(pg_terminate_backend(pid, $2)) FROM pg_stat_activity WHERE usename = $1",
        name,
        int(_END_TIMEOUT * 1000),
    )
    if ended and await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE usename = $1", name):
        raise ClusterUnavailable("Sessions of the database are still being ended; try again later.")


async def _create_database(admin: asyncpg.Connection, name: str) -> None:
    # Closed until PUBLIC has lost its rights, or a tenant could slip in before. STRATEGY wal_log, the default, took
    # 31 ms where file_copy took 81.
    await admin.execute(
        f'CREATE DATABASE "{name}" OWNER "{name}" TEMPLATE template0 ENCODING \'UTF8\' ALLOW_CONNECTIONS false'
    )
    await _open_database(admin, name, revoked=["PUBLIC"])


async def _apply_database(admin: asyncpg.Connection, found: asyncpg.Record, name: str) -> list[str]:
    differed = list[str]()
    if found["owner"] != name:
        await admin.execute(f'ALTER DATABASE "{name}" OWNER TO "{name}"')
        differed.append("the owner")
        found = await admin.fetchrow(_LOOK, name)  # the rights went over to the new owner
    if found["others"] or not found["opens"]:
        await _open_database(admin, name, revoked=found["others"])
        differed.append("who may connect")
    return differed


async def _open_database(admin: asyncpg.Connection, name: str, *, revoked: list[str]) -> None:
    await admin.execute(
        f'REVOKE ALL ON DATABASE "{name}" FROM {", ".join(revoked) or "PUBLIC"} CASCADE;'
        f'GRANT ALL ON DATABASE "{name}" TO "{name}";'
        f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true CONNECTION LIMIT -1 IS_TEMPLATE false'
    )


async def _own_role(admin: asyncpg.Connection, found: asyncpg.Record, name: str) -> None:
    """Let an admin who is no superuser act for the role: to give it a database, end its sessions, drop both."""
    if found["is_superuser"]:
        return
    # Before version 16 membership means all of this.
    options = " WITH INHERIT TRUE, SET TRUE" if admin.get_server_version().major >= 16 else ""  # noqa: PLR2004
    await admin.execute(f'GRANT "{name}" TO CURRENT_USER{options}')


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
