"""The MongoDB driver: a user in a database of one name, with rights on that database only.

Import this module only where a cluster needs it: its library takes 14 MB.
"""

import asyncio
import re
import secrets
from base64 import b64decode
from collections.abc import AsyncIterator, Mapping, MutableMapping
from contextlib import aclosing, asynccontextmanager, nullcontext
from functools import lru_cache
from hashlib import pbkdf2_hmac, sha256
from hmac import compare_digest, digest
from time import monotonic
from typing import Any
from urllib.parse import quote

from bson.errors import BSONError
from pymongo import AsyncMongoClient, ReturnDocument, WriteConcern
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import ConnectionFailure, ExecutionTimeout, OperationFailure, PyMongoError
from pymongo.saslprep import saslprep

from controlplane.databases.engines.engine import (
    Busy,
    Check,
    ClusterUnavailable,
    Connection,
    Contents,
    EngineError,
    Observation,
    Target,
    unchecked,
)
from controlplane.databases.engines.mongodb_dump import Dump, definition_of, load

Document = dict[str, Any]

_NAME = re.compile(r"[a-z][a-z0-9_]{2,31}")
_OURS = "controlplane"  # the database with our locks
_SYSTEM_NAMES = {"admin", "config", "local", _OURS}
_MECHANISM = "SCRAM-SHA-256"

_CONNECT_TIMEOUT = 3.0
# For longer than that. Not for as long: pymongo tries to connect each half second, and forgets the socket of a try that
# its end cuts off (PYTHON-5867).
_SELECTION_EXTRA = 0.25
_STATEMENT_TIMEOUT = 10.0
_DATA_TIMEOUT = 300.0  # to build one index, or read one batch
_SESSIONS_TIMEOUT = 5.0
# What began before the lock's time was up ends, by the server's own timeout, before another worker can have the lock.
_LOCK_SECONDS = 60.0
_WORK_SECONDS = _LOCK_SECONDS - 2 * _STATEMENT_TIMEOUT

_TRY_LATER = {
    24,  # LockTimeout
    43,  # CursorNotFound, after a restart
    46,  # LockBusy
    64,  # WriteConcernFailed
    112,  # WriteConflict
    189,  # PrimarySteppedDown
    202,  # NetworkInterfaceExceededTimeLimit
    215,  # DatabaseDropPending
    246,  # SnapshotUnavailable
    262,  # ExceededTimeLimit
    14031,  # OutOfDiskSpace
}


class MongoDB:
    """One MongoDB cluster, version 5 or later.

    `admin_url` is a URL as the drivers take it: `mongodb://admin:secret@host:27017/?replicaSet=main&tls=true`, or
    `mongodb+srv://…`. The admin has the role `root`. `host` and `port` are what customers connect to.

    Enforced: a tenant reads and writes his own database only. Advice: connections, memory and storage, for which
    MongoDB has no limits per user; watch `observe`, and take the login from who takes too much. A password crosses the
    wire as it is (use TLS); the server keeps a SCRAM verifier, and blots the password out of its logs.

    There is no database without a collection, so one is there as soon as its user is, and `Missing` is never raised: a
    lost database looks like one that nothing was put into. A lost user is made again, and sees what data there is.

    On a replica set a dump is as of one moment, for as long as the server keeps old versions
    (`minSnapshotHistoryWindowInSeconds`, 5 minutes unless set); elsewhere each document is as of its reading.
    """

    def __init__(self, *, admin_url: str, host: str, port: int) -> None:
        if not admin_url.startswith(("mongodb://", "mongodb+srv://")):
            raise ValueError("The admin URL must be one of MongoDB: mongodb://user:password@host:port/")
        self._url = admin_url
        self._host = host
        self._port = port

    async def apply(self, target: Target, *, check: Check = unchecked) -> tuple[str, ...]:
        """Make the cluster match the target; see `Engine.apply`.

        Who still uses an old password is cut off: a new one, or no login, ends the user's sessions.
        """
        _check_name(target.name)
        async with self._connected() as client:
            # A lock is two writes to most of the cluster: too much for a look after which there is nothing to do.
            if target.login and not await _differences(_Admin(client), target):
                return ()
            async with _locked(client, target.name, check) as admin:
                differed = await _differences(admin, target)
                if differed == ("the rights",):
                    await admin.run(target.name, "updateUser", target.name, roles=_roles(target.name))
                elif differed:
                    await _make_user(admin, target)
                if not target.login:
                    await _end_sessions(admin, target.name)
                return differed

    async def drop(self, name: str, *, check: Check = unchecked) -> None:
        """Remove database and user; see `Engine.drop`."""
        _check_name(name)
        async with self._connected() as client, _locked(client, name, check) as admin:
            # Commands that succeed on nothing. Sessions end before the data goes, or a late write would bring it back.
            await admin.run(name, "dropAllUsersFromDatabase")
            await admin.run(name, "dropAllRolesFromDatabase")
            await _end_sessions(admin, name)
            await admin.run(name, "dropDatabase")

    async def observe(self, name: str) -> Observation | None:
        """Return what the database is like; see `Engine.observe`."""
        _check_name(name)
        async with self._connected() as client:
            admin = _Admin(client)
            user = await admin.find_user(name)
            if user is None:
                return None
            sessions = await admin.find_sessions(name)
            size = (await admin.run(name, "dbStats"))["totalSize"]
            return Observation(login=bool(user["roles"]), connections=len(sessions), size_bytes=int(size))

    async def names(self, prefix: str) -> set[str]:
        """Return the names of all databases and users; see `Engine.names`."""
        ours = {"$regex": "^" + re.escape(prefix)}
        async with self._connected() as client:
            found = await _Admin(client).run("admin", "listDatabases", nameOnly=True, filter={"name": ours})
            # usersInfo has no filter on all servers, and the users of a full cluster may not fit into its one answer.
            users = client["admin"]["system.users"].find({"user": ours}, {"user": True})
            return {database["name"] for database in found["databases"]} | {user["user"] async for user in users}

    @asynccontextmanager
    async def dump(self, name: str) -> AsyncIterator[Dump]:
        """Open a dump; see `Engine.dump`."""
        _check_name(name)
        async with self._connected(answers_within=_DATA_TIMEOUT) as client:
            if await _Admin(client).find_user(name) is None:
                raise EngineError("The database could not be dumped, as it is not there; contact support.")
            definitions = [
                definition_of(found, await _indexes(client[name], found))
                async for found in await client[name].list_collections()
                if not found["name"].startswith("system.")
            ]
            hello = await client["admin"].command("hello")
            keeps_versions = "setName" in hello or hello.get("msg") == "isdbgrid"
            async with (
                client.start_session(snapshot=True) if keeps_versions else nullcontext() as session,
                aclosing(Dump(client[name], definitions, session)) as dump,
            ):
                yield dump

    async def restore(self, name: str, password: str, chunks: AsyncIterator[bytes]) -> None:
        """Read a dump into an empty database; see `Engine.restore`."""
        _check_name(name)
        login = {"username": name, "password": password, "authSource": name, "authMechanism": _MECHANISM}
        async with self._connected(answers_within=_DATA_TIMEOUT, **login) as client:
            if await client[name].list_collection_names():
                raise EngineError("A backup is read only into an empty database.")
            await load(client[name], chunks)

    async def contents(self, name: str) -> Contents:
        """Return what is in a database now."""
        async with self.dump(name) as dump:
            async for _ in dump.chunks():
                pass
            return dump.contents()

    def connection(self, name: str, password: str) -> Connection:
        """Return how a customer reaches the database."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return Connection(
            host=self._host,
            port=self._port,
            database=name,
            username=name,
            password=password,
            uri=f"mongodb://{name}:{quote(password, safe='')}@{host}:{self._port}/{name}",
        )

    @asynccontextmanager
    async def _connected(
        self, *, answers_within: float = _STATEMENT_TIMEOUT + 5, **login: Any
    ) -> AsyncIterator[AsyncMongoClient[Document]]:
        """Connect, as the admin unless told otherwise, and tell what goes wrong meanwhile in the terms of the seam."""
        try:
            async with AsyncMongoClient[Document](
                self._url,
                appname="controlplane",
                maxPoolSize=2,
                serverSelectionTimeoutMS=int((_CONNECT_TIMEOUT + _SELECTION_EXTRA) * 1000),
                connectTimeoutMS=int(_CONNECT_TIMEOUT * 1000),
                socketTimeoutMS=int(answers_within * 1000),
                # Whoever called us tries again, after looking at what is there.
                retryReads=False,
                retryWrites=False,
                **login,
            ) as client:
                yield client
        except (ConnectionFailure, ExecutionTimeout) as error:
            raise _unavailable() from error
        except OperationFailure as error:
            if error.code in _TRY_LATER:
                raise _unavailable() from error
            raise EngineError("The database cluster refused a change; contact support if this stays so.") from error
        except (PyMongoError, BSONError) as error:
            raise EngineError("The work on the database failed; contact support if this stays so.") from error


class _Admin:
    """The admin's way to a cluster, which sends nothing any more once its time is up."""

    def __init__(self, client: AsyncMongoClient[Document], until: float = float("inf")) -> None:
        self._client = client
        self._until = until

    async def run(self, database: str, command: str, value: object = 1, **options: object) -> Document:
        """Run a command."""
        if monotonic() > self._until:
            raise ClusterUnavailable("The change took too long; try again later.")
        timeout = int(_STATEMENT_TIMEOUT * 1000)
        return await self._client[database].command({command: value, **options, "maxTimeMS": timeout})

    async def find_user(self, name: str) -> Document | None:
        """Return a database's user, with the verifiers of his password."""
        users: list[Document] = (await self.run(name, "usersInfo", name, showCredentials=True))["users"]
        return users[0] if users else None

    async def find_sessions(self, name: str) -> list[Document]:
        """Return what the user's connections are doing, one entry for each."""
        user = _principal(name)
        found = await self.run(
            "admin", "currentOp", **{"$all": True, "type": "op", "effectiveUsers": {"$elemMatch": user}}
        )
        # Compared here again, as not every server heeds the filter.
        return [entry for entry in found["inprog"] if entry["type"] == "op" and user in entry.get("effectiveUsers", ())]

    async def has_collections(self, name: str) -> bool:
        """Return whether there is anything in a database."""
        found = await self.run(name, "listCollections", nameOnly=True)
        return bool(found["cursor"]["firstBatch"])


@asynccontextmanager
async def _locked(client: AsyncMongoClient[Document], name: str, check: Check) -> AsyncIterator[_Admin]:
    """Hold the lock of this name; whoever else wants it meanwhile is told Busy.

    MongoDB has no lock that goes with its session, so this one is a document with an end, by the server's clock.
    A crashed worker's lock lasts until then. A paused one wakes up without the lock, and is stopped before its next
    command; what he could still do late is a command that was on its way when he, or the network, stood still.
    """
    owner = secrets.token_hex(16)
    # A lock that only one member of the replica set knows would be lost with it.
    safe = WriteConcern("majority", wtimeout=int(_STATEMENT_TIMEOUT * 1000))
    locks = client[_OURS].get_collection("locks", write_concern=safe)
    admin = _Admin(client, until=monotonic() + _WORK_SECONDS)
    now = {"$toLong": "$$NOW"}  # in milliseconds
    free = {"$lt": ["$until", now]}  # what is missing is less than anything
    end = {"$add": [now, int(_LOCK_SECONDS * 1000)]}
    lock = await locks.find_one_and_update(
        {"_id": name},
        [{"$set": {"owner": {"$cond": [free, owner, "$owner"]}, "until": {"$cond": [free, end, "$until"]}}}],
        upsert=True,
        return_document=ReturnDocument.AFTER,
        maxTimeMS=int(_STATEMENT_TIMEOUT * 1000),
    )
    if lock is None or lock["owner"] != owner:
        raise Busy("Another change to this database is still under way; look again in a moment.")
    try:
        await check()
        yield admin
    finally:
        await locks.delete_one({"_id": name, "owner": owner})


async def _indexes(database: AsyncDatabase[Document], collection: Mapping[str, Any]) -> list[MutableMapping[str, Any]]:
    if collection["type"] == "view":  # MongoDB refuses to list what it cannot have
        return []
    return await (await database[collection["name"]].list_indexes()).to_list()


async def _differences(admin: _Admin, target: Target) -> tuple[str, ...]:
    user = await admin.find_user(target.name)
    if user is None:
        return ("the user",) if target.exists or await admin.has_collections(target.name) else ("the database",)
    # Takes some 10 ms of a core, the first time.
    has_password = await asyncio.to_thread(_has_password, user, target.password)
    if bool(user["roles"]) != target.login:
        return ("the login",)
    differed = []
    if has_password != target.login:
        differed.append("the password")
    if target.login and not _same(user["roles"], _roles(target.name)):
        differed.append("the rights")
    return tuple(differed)


async def _make_user(admin: _Admin, target: Target) -> None:
    """Make the user anew: MongoDB lets a session go on under another password, but not under another user's id.

    There is no switch for the login: without it the user has no rights, and a password that nobody knows.
    """
    await admin.run(target.name, "dropAllUsersFromDatabase")
    # Now and not later: if we crash here, the missing user tells that this must be done again.
    await _end_sessions(admin, target.name)
    await admin.run(
        target.name,
        "createUser",
        target.name,
        pwd=target.password if target.login else secrets.token_urlsafe(32),
        roles=_roles(target.name) if target.login else [],
        mechanisms=[_MECHANISM],
    )


async def _end_sessions(admin: _Admin, name: str) -> None:
    """End what the user is doing, and return once it has ended."""
    await admin.run("admin", "killAllSessions", [_principal(name)])
    give_up = monotonic() + _SESSIONS_TIMEOUT
    while running := [entry for entry in await admin.find_sessions(name) if entry["active"]]:
        if monotonic() > give_up:
            raise ClusterUnavailable("The database's sessions do not end; try again later.")
        for entry in running:
            await admin.run("admin", "killOp", op=entry["opid"])
        await asyncio.sleep(0.02)


def _has_password(user: Document, password: str) -> bool:
    """Return whether the user logs in with this password, and by our mechanism only."""
    if set(user["credentials"]) != {_MECHANISM}:
        return False
    stored = user["credentials"][_MECHANISM]
    key = _stored_key(password, b64decode(stored["salt"]), stored["iterationCount"])
    return compare_digest(key, b64decode(stored["storedKey"]))


@lru_cache(maxsize=4096)
def _stored_key(password: str, salt: bytes, rounds: int) -> bytes:
    """Return what SCRAM-SHA-256 stores; remembered, as the same is asked whenever somebody looks after a database."""
    salted = pbkdf2_hmac("sha256", saslprep(password).encode(), salt, rounds)
    return sha256(digest(salted, b"Client Key", "sha256")).digest()


def _roles(name: str) -> list[dict[str, str]]:
    return [{"role": role, "db": name} for role in ("readWrite", "dbAdmin")]


def _same(roles: list[dict[str, str]], wanted: list[dict[str, str]]) -> bool:
    return {(role["role"], role["db"]) for role in roles} == {(role["role"], role["db"]) for role in wanted}


def _principal(name: str) -> dict[str, str]:
    return {"user": name, "db": name}


def _unavailable() -> ClusterUnavailable:
    return ClusterUnavailable("The database cluster is not available at the moment; try again later.")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in _SYSTEM_NAMES:
        raise ValueError(f"{name!r} cannot be the name of a tenant's database")
