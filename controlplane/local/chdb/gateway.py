"""The embedded ClickHouse's front: tells callers apart, changes accounts for the admin, passes queries to engines."""

import asyncio
import os
import re
import secrets
import shutil
import sys
import time
from base64 import b64decode
from binascii import Error as NotBase64
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path
from urllib.parse import parse_qsl

import httpx2

from controlplane.local.chdb.accounts import Accounts, NotUnderstood, User
from controlplane.local.chdb.http import Message, Receive, Scope, Send, answer, body_of, fail, headers_of

ADMIN = "controlplane"

_ENGINE = "controlplane.local.chdb.engine"
_START_TIMEOUT = 30.0
_IDLE_SECONDS = 300.0  # an engine takes 300 MB
_SYSTEM = "system"
_SYSTEM_TABLE = re.compile(r"\bsystem\.(\w+)")
_ENGINE_MEMORY = "max_memory_usage_for_user"
_DEFAULT_MEMORY = 512 << 20
_MAX_ADMIN_STATEMENT = 1 << 20
_PASSED_ON = {"x-clickhouse-format", "x-clickhouse-database", "content-encoding"}


def admin_password(folder: Path) -> str:
    """Return the admin's password, made with the folder; nobody else reads its file."""
    folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    file = folder / "admin"
    if not file.exists():
        file.touch(0o600)
        file.write_text(secrets.token_urlsafe(32))
    return file.read_text()


@dataclass
class _Running:
    """An engine's process, what it was started with, and when it was last of use."""

    process: asyncio.subprocess.Process
    client: httpx2.AsyncClient
    configuration: str
    used: float
    busy: int = 0


class Gateway:
    """The ASGI application. Everything is in `folder`; the admin's password is `password`."""

    def __init__(self, folder: Path, password: str) -> None:
        self._folder = folder
        self._password = password
        self._accounts = Accounts(folder / "accounts.json")
        self._engines: dict[str, _Running] = {}
        self._starting: dict[str, asyncio.Lock] = {}
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["path"] == "/ping" or (scope["method"] == "GET" and not scope["query_string"]):
            await answer(send, b"Ok.\n", {})
            return
        parameters = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        headers = headers_of(scope)
        user, password = _credentials(parameters, headers)
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            if user == ADMIN and compare_digest(password.encode(), self._password.encode()):
                await self._as_admin(parameters, headers, receive, noting)
            elif user in self._accounts.users and self._accounts.users[user].opens_with(password):
                await self._as_tenant(user, parameters, headers, receive, noting)
            else:
                words = f"{user[:64]}: Authentication failed: password is incorrect, or there is no such user."
                await fail(noting, "516", f"{words} (AUTHENTICATION_FAILED)")
        except (_DoesNotStart, httpx2.TransportError) as error:
            # An answer that has begun can only be broken off, for the caller to see that it is not whole.
            if begun:
                raise
            await fail(send, "210", f"The engine does not run: {error} (NETWORK_ERROR)")

    async def tidy(self) -> None:
        """End engines that nobody has used for a while; never returns."""
        while True:
            await asyncio.sleep(_IDLE_SECONDS / 10)
            for name, engine in list(self._engines.items()):
                if not engine.busy and engine.used + _IDLE_SECONDS < time.monotonic():
                    await self._end(name)

    async def stop(self) -> None:
        """End all engines."""
        for name in list(self._engines):
            await self._end(name)

    async def _as_tenant(
        self, user: str, parameters: dict[str, str], headers: dict[str, str], receive: Receive, send: Send
    ) -> None:
        account = self._accounts.users[user]
        limit = account.settings.get("max_sessions_for_user", "0").split()[0]
        if int(limit) and self._running[user] >= int(limit):
            await fail(send, "700", f"User {user} has overflown session count {limit}. (USER_SESSION_LIMIT_EXCEEDED)")
            return
        if user not in self._accounts.databases:
            await fail(send, "81", f"Database {user} does not exist. (UNKNOWN_DATABASE)")
            return
        if parameters.get("query") == "SELECT 1":  # whether a password is right shows without an engine
            await answer(send, b"1\n", {})
            return
        self._running[user] += 1
        try:
            await self._pass_on(user, parameters, headers, receive, send, account=account)
        finally:
            self._running[user] -= 1

    async def _as_admin(
        self, parameters: dict[str, str], headers: dict[str, str], receive: Receive, send: Send
    ) -> None:
        """Read a database in its own engine; read users and databases here; and change them."""
        database = parameters.get("database", "")
        if database in self._accounts.databases:
            await self._pass_on(database, parameters, headers, receive, send)
            return
        sql = parameters.pop("query", "")
        async for piece in body_of(receive):
            sql += piece.decode()
            if len(sql) > _MAX_ADMIN_STATEMENT:
                await fail(send, "62", "The statement is too long. (SYNTAX_ERROR)")
                return
        if database:
            await fail(send, "81", f"Database {database} does not exist. (UNKNOWN_DATABASE)")
        elif sql.lstrip().upper().startswith("SELECT"):
            # The driver looks at one database: what all of them take would be long to count.
            name = parameters.get("param_name", "")
            sizes = {name: await asyncio.to_thread(self._size, name)} if name in self._accounts.databases else {}
            # With the rows that are asked for: those of all users would soon be too many.
            about = name or parameters.get("param_prefix", "")
            sql = _SYSTEM_TABLE.sub(
                lambda found: self._accounts.system_table(found[1], about, sizes, self._running) or found[0], sql
            )
            await self._pass_on(_SYSTEM, parameters, headers, receive, send, body=_whole(sql.encode()))
        else:
            await self._change(sql, send)

    async def _change(self, sql: str, send: Send) -> None:
        try:
            name = self._accounts.execute(sql)
        except NotUnderstood as error:
            await fail(send, "48", f"{error} (NOT_IMPLEMENTED)")
            return
        if sql.startswith(("KILL", "DROP")):
            async with self._starting.setdefault(name, asyncio.Lock()):
                await self._end(name)
        if sql.startswith("DROP DATABASE"):
            await asyncio.to_thread(shutil.rmtree, self._folder / "databases" / name, ignore_errors=True)
        await answer(send, b"", {})

    def _size(self, name: str) -> int:
        store = self._folder / "databases" / name / "data" / "store" / "store"
        return sum(file.stat().st_size for file in store.rglob("*") if file.is_file())

    async def _pass_on(
        self,
        name: str,
        parameters: dict[str, str],
        headers: dict[str, str],
        receive: Receive,
        send: Send,
        *,
        account: User | None = None,
        body: AsyncIterator[bytes] | None = None,
    ) -> None:
        """Let an engine answer, piece by piece. Its broken connection breaks ours, and the caller's breaks its.

        It gets the request's own body unless it is to get another.
        """
        body = body_of(receive) if body is None else body
        kept = {key: value for key, value in parameters.items() if key not in {"user", "password"}}
        wanted = {key: value for key, value in headers.items() if key in _PASSED_ON}
        begun = asyncio.Event()
        async with self._engine(name) as client:
            if account is not None and self._accounts.users.get(name) is not account:
                # Made anew while the engine started: whoever he was then, is no longer let in.
                await fail(send, "516", "Authentication failed. (AUTHENTICATION_FAILED)")
                return
            passing = asyncio.create_task(_relay(client, kept, wanted, _marked(body, begun), send))
            leaving = asyncio.create_task(_gone(begun, receive))
            try:
                await asyncio.wait({passing, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if passing.done():
                    await passing
            finally:
                for task in (passing, leaving):
                    task.cancel()
                await asyncio.gather(passing, leaving, return_exceptions=True)

    @asynccontextmanager
    async def _engine(self, name: str) -> AsyncIterator[httpx2.AsyncClient]:
        """Return the way to an engine, started anew if it ended or its configuration changed."""
        async with self._starting.setdefault(name, asyncio.Lock()):
            configuration = self._configuration(name)
            engine = self._engines.get(name)
            if engine is None or engine.process.returncode is not None or engine.configuration != configuration:
                await self._end(name)
                engine = self._engines[name] = await self._start(name, configuration)
        engine.busy += 1
        try:
            yield engine.client
        finally:
            engine.busy -= 1
            engine.used = time.monotonic()

    def _configuration(self, name: str) -> str:
        user = self._accounts.users.get(name)
        memory = user.settings.get(_ENGINE_MEMORY, str(_DEFAULT_MEMORY)).split()[0] if user else _DEFAULT_MEMORY
        folder = self._folder / "databases" / name
        return (
            f"<clickhouse><users_config>{folder}/users.xml</users_config>"
            f"<max_server_memory_usage>{memory}</max_server_memory_usage></clickhouse>\n"
            f"{self._accounts.users_xml(name)}"
        )

    async def _start(self, name: str, configuration: str) -> _Running:
        folder = self._folder / "databases" / name
        uid = self._accounts.databases.get(name, 65534) if os.geteuid() == 0 else os.geteuid()
        await asyncio.to_thread(_lay_out, folder, configuration, uid)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", _ENGINE, str(folder), name, str(uid), "64",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # where a tenant writes: SET send_logs_level = 'trace'
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "PYTHONPATH": str(Path(__file__).parents[3])},
        )  # fmt: skip
        assert process.stdout is not None  # noqa: S101
        try:
            line = await asyncio.wait_for(process.stdout.readline(), _START_TIMEOUT)
        except TimeoutError:
            line = b"it took too long"
        if line != b"ready\n":
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise _DoesNotStart(line.decode(errors="replace").strip())
        client = httpx2.AsyncClient(  # we are started in our folder, so that the path is short enough
            transport=httpx2.AsyncHTTPTransport(uds=f"databases/{name}/data/socket"),
            base_url="http://engine",
            timeout=None,
        )
        return _Running(process, client, configuration, time.monotonic())

    async def _end(self, name: str) -> None:
        engine = self._engines.pop(name, None)
        if engine is None:
            return
        with suppress(ProcessLookupError):
            engine.process.kill()
        await engine.process.wait()
        await engine.client.aclose()


class _DoesNotStart(Exception):
    """An engine said why it ended, and not that it is ready."""


async def _relay(
    client: httpx2.AsyncClient,
    parameters: dict[str, str],
    headers: dict[str, str],
    body: AsyncIterator[bytes],
    send: Send,
) -> None:
    async with client.stream("POST", "/", params=parameters, headers=headers, content=body) as response:
        kept = {
            key: value for key, value in response.headers.items() if key.startswith(("x-clickhouse", "content-type"))
        }
        await answer(send, None, kept, status=response.status_code)
        async for piece in response.aiter_raw():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _gone(begun: asyncio.Event, receive: Receive) -> None:
    """Wait until the caller goes away; before its body was read, that shows there."""
    await begun.wait()
    while (await receive())["type"] != "http.disconnect":
        pass


async def _marked(body: AsyncIterator[bytes], read: asyncio.Event) -> AsyncIterator[bytes]:
    async for piece in body:
        yield piece
    read.set()


async def _whole(content: bytes) -> AsyncIterator[bytes]:
    yield content


def _credentials(parameters: dict[str, str], headers: dict[str, str]) -> tuple[str, str]:
    """Return user and password from wherever ClickHouse takes them."""
    kind, _, encoded = headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        with suppress(NotBase64, UnicodeDecodeError):
            user, _, password = b64decode(encoded, validate=True).decode().partition(":")
            return user, password
    return (
        headers.get("x-clickhouse-user") or parameters.get("user", "default"),
        headers.get("x-clickhouse-key") or parameters.get("password", ""),
    )


def _lay_out(folder: Path, configuration: str, uid: int) -> None:
    """Write what an engine reads, and give it the folder that it writes."""
    folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    config, users = configuration.split("\n", 1)
    (folder / "config.xml").write_text(config)
    (folder / "users.xml").write_text(users)
    data = folder / "data"
    data.mkdir(mode=0o700, exist_ok=True)
    (data / "socket").unlink(missing_ok=True)
    if os.geteuid() == 0:
        os.chown(data, uid, uid)
