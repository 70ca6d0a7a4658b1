"""Users and databases of the embedded ClickHouse: what the admin's statements change, kept in one file."""

import json
import os
import re
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from xml.sax.saxutils import escape

_FIRST_UID = 700_000  # what each database's engine runs as, if we are root: nobody else's number
# In an engine the admin is the same user, and a session that waits for its next request counts.
_COUNTED_BY_GATEWAY = {"max_sessions_for_user", "max_concurrent_queries_for_user"}


@dataclass
class User:
    """A user. `grants` are statements without their TO; `host` is ANY or NONE."""

    hash: str = ""
    salt: str = ""
    method: str = "sha256_password"
    host: str = "ANY"
    database: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    grants: list[str] = field(default_factory=list)

    def opens_with(self, password: str) -> bool:
        """Return whether he gets in with this password."""
        if self.host != "ANY":
            return False
        given = sha256(f"{password}{self.salt}".encode()).hexdigest()
        return self.method == "no_password" or compare_digest(given, self.hash)


class NotUnderstood(Exception):
    """A statement that is none of the driver's."""


class Accounts:
    """All users, and the uid of each database. What was executed is on the disk when `execute` returns."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.users: dict[str, User] = {}
        self.databases: dict[str, int] = {}
        if file.exists():
            stored = json.loads(file.read_text())
            self.users = {name: User(**user) for name, user in stored["users"].items()}
            self.databases = stored["databases"]

    def execute(self, sql: str) -> str:
        """Carry out a statement; return the name of the user or database that it is about."""
        text = " ".join(sql.split())
        for pattern, action in _STATEMENTS:
            if found := pattern.fullmatch(text):
                action(self, found)
                self._write()
                return found["name"]
        raise NotUnderstood(f"The embedded ClickHouse does not know this statement: {text[:100]}")

    def system_table(self, name: str, about: str, sizes: dict[str, int], running: dict[str, int]) -> str | None:
        """Return a `system` table as a table function, with the columns that the driver reads; None for another.

        It has the rows of the databases and users whose names begin with `about`.
        """
        rows: list[dict[str, object]]
        users = {user_name: user for user_name, user in self.users.items() if user_name.startswith(about)}
        if name == "databases":
            rows = [{"name": database} for database in self.databases if database.startswith(about)]
        elif name == "tables":
            rows = [{"database": database, "total_bytes": size} for database, size in sizes.items()]
        elif name == "users":
            rows = [
                {
                    "name": user_name,
                    "auth_type": [user.method],
                    "host_ip": ["::/0"] if user.host == "ANY" else [],
                    "default_database": user.database,
                }
                for user_name, user in users.items()
            ]
        elif name == "settings_profile_elements":
            rows = [
                {
                    "user_name": user_name,
                    "setting_name": key,
                    "value": words.split()[0],
                    "writability": _writability(words),
                }
                for user_name, user in users.items()
                for key, words in user.settings.items()
            ]
        elif name == "grants":
            rows = [
                row for user_name, user in users.items() for grant in user.grants for row in _rows(user_name, grant)
            ]
        elif name == "processes":
            rows = [{"user": user_name} for user_name, count in running.items() for _ in range(count)]
        elif name == "role_grants":
            rows = []
        else:
            return None
        data = "".join(json.dumps(row) for row in rows).replace("\\", "\\\\").replace("'", "\\'")
        return f"format(JSONEachRow, '{_COLUMNS[name]}', '{data}')"

    def users_xml(self, database: str) -> str:
        """Return the configuration of a database's engine: what its only user may do, and how much.

        Whoever may not log in has no rights; then only the admin reads there.
        """
        user = self.users.get(database, User())
        grants = [f"GRANT CREATE DATABASE ON {database}.*"]  # for its own, at the first start
        grants += user.grants or [f"GRANT SHOW, SELECT ON {database}.*, CREATE TEMPORARY TABLE ON *.*"]
        kept = {key: words for key, words in user.settings.items() if key not in _COUNTED_BY_GATEWAY}
        settings = "".join(f"<{key}>{escape(words.split()[0])}</{key}>" for key, words in kept.items())
        constant = "".join(f"<{key}><const/></{key}>" for key, words in kept.items() if words.endswith("CONST"))
        queries = "".join(f"<query>{escape(grant)}</query>" for grant in grants)
        return (
            f"<clickhouse><profiles><default>{settings}<constraints>{constant}</constraints></default></profiles>"
            "<quotas><default/></quotas><users><default><password/><networks><ip>::/0</ip></networks>"
            f"<profile>default</profile><quota>default</quota><grants>{queries}</grants></default></users></clickhouse>"
        )

    def _write(self) -> None:
        new = self._file.with_suffix(".new")
        new.touch(0o600)
        with new.open("w") as file:
            users = {name: asdict(user) for name, user in self.users.items()}
            json.dump({"users": users, "databases": self.databases}, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._file)

    def _create_database(self, found: re.Match[str]) -> None:
        self.databases.setdefault(found["name"], max([_FIRST_UID, *self.databases.values()]) + 1)

    def _drop_database(self, found: re.Match[str]) -> None:
        self.databases.pop(found["name"], None)

    def _create_user(self, found: re.Match[str]) -> None:
        self.users[found["name"]] = User()
        self._alter_user(found)

    def _alter_user(self, found: re.Match[str]) -> None:
        user = self._user(found["name"])
        if method := found["method"]:
            user.method = "no_password" if method == "no_password" else "sha256_password"
            user.hash, user.salt = found["hash"] or "", found["salt"] or ""
        user.host = found["host"] or user.host
        user.database = found["database"] or user.database
        if settings := found["settings"]:
            user.settings = dict(re.split(r"\s*=\s*", setting, maxsplit=1) for setting in re.split(r",\s*", settings))

    def _drop_user(self, found: re.Match[str]) -> None:
        self.users.pop(found["name"], None)

    def _grant(self, found: re.Match[str]) -> None:
        self._user(found["name"]).grants.append(f"GRANT {found['rights']}")

    def _revoke(self, found: re.Match[str]) -> None:
        self._user(found["name"]).grants = []

    def _kill(self, found: re.Match[str]) -> None:
        """Nothing to keep: the gateway ends the engine."""

    def _user(self, name: str) -> User:
        if name not in self.users:
            raise NotUnderstood(f"There is no user {name}.")
        return self.users[name]


_CLAUSES = (
    r"(?P<name>\w+)(?: IDENTIFIED WITH (?P<method>no_password|sha256_hash BY '(?P<hash>[0-9a-f]{64})'"
    r" SALT '(?P<salt>[0-9a-f]*)'))?(?: HOST (?P<host>ANY|NONE))?(?: DEFAULT DATABASE (?P<database>\w+))?"
    r"(?: SETTINGS (?P<settings>\w+ = \w+(?: CONST)?(?:, \w+ = \w+(?: CONST)?)*))?"
)
_STATEMENTS = [
    (re.compile(pattern), action)
    for pattern, action in (
        (r"CREATE DATABASE IF NOT EXISTS (?P<name>\w+)", Accounts._create_database),  # noqa: SLF001
        (r"DROP DATABASE IF EXISTS (?P<name>\w+) SYNC", Accounts._drop_database),  # noqa: SLF001
        (rf"CREATE USER OR REPLACE {_CLAUSES}", Accounts._create_user),  # noqa: SLF001
        (rf"ALTER USER {_CLAUSES}", Accounts._alter_user),  # noqa: SLF001
        (r"DROP USER IF EXISTS (?P<name>\w+)", Accounts._drop_user),  # noqa: SLF001
        (r"GRANT (?P<rights>[A-Z]\w*(?:[ ,]+(?:\w+|\w+\.\*|\*\.\*))+) TO (?P<name>\w+)", Accounts._grant),  # noqa: SLF001
        (r"REVOKE ALL ON \*\.\* FROM (?P<name>\w+)", Accounts._revoke),  # noqa: SLF001
        (r"KILL QUERY WHERE user = '(?P<name>\w+)' SYNC", Accounts._kill),  # noqa: SLF001
    )
]

_COLUMNS = {
    "databases": "name String",
    "tables": "database String, total_bytes UInt64",
    "users": "name String, auth_type Array(String), host_ip Array(String), host_names Array(String),"
    " host_names_regexp Array(String), host_names_like Array(String), default_database String",
    "settings_profile_elements": "user_name String, setting_name Nullable(String), value Nullable(String),"
    " writability Nullable(String), inherit_profile Nullable(String)",
    "grants": "user_name String, access_type String, database Nullable(String), table Nullable(String),"
    " column Nullable(String), is_partial_revoke UInt8, grant_option UInt8",
    "role_grants": "user_name String, granted_role_name String",
    "processes": "user String",
}


def _rows(user: str, grant: str) -> list[dict[str, object]]:
    """Return the rows of `system.grants` for a statement: GRANT A, B ON db.*, C ON *.*, TABLE ENGINE ON Log."""
    rows: list[dict[str, object]] = []
    waiting = 0
    for part in grant.removeprefix("GRANT ").split(", "):
        right, _, where = part.partition(" ON ")
        rows.append({"user_name": user, "access_type": right})
        waiting += 1
        if where.endswith(".*") and where != "*.*":
            for row in rows[-waiting:]:
                row["database"] = where.removesuffix(".*")
        waiting = 0 if where else waiting
    return rows


def _writability(words: str) -> str | None:
    return "CONST" if words.endswith(" CONST") else None
