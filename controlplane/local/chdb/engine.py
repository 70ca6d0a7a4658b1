"""One database's engine: a process that runs its queries in chDB, with ClickHouse's HTTP interface on a Unix socket.

It is started by the gateway, which has told who is there: whoever reaches the socket is the database's user. The
folder has what the gateway wrote, `config.xml` and `users.xml`, and what is the engine's own, `data`.
"""

import asyncio
import ctypes
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import lz4.frame
import uvicorn

from controlplane.local.chdb.confine import CannotConfine, confine
from controlplane.local.chdb.http import Receive, Scope, Send, answer, body_of, fail, headers_of

T = TypeVar("T")

_SESSION_SECONDS = 60
_MAX_SESSIONS = 100
_MAX_STATEMENT = 16 << 20
_PIECE = 1 << 20
# chDB makes each piece of a stream a whole file of its format, with head and tail: these formats have none.
_STREAMED = {
    "tabseparated", "tsv", "tabseparatedraw", "tsvraw", "csv", "jsoneachrow", "jsoncompacteachrow", "rowbinary",
    "native", "lineasstring", "rawblob",
}  # fmt: skip
_NOT_STREAMED = "Streaming query is not supported"
# What is about the request and no setting of the query; progress and compression are for slow networks.
_REQUEST = re.compile(
    r"query|query_id|database|default_format|session_\w+|user|password|role|quota_key|compress|decompress|buffer_size"
    r"|wait_end_of_query|client_protocol_version|enable_http_compression|http_\w+|send_progress_in_http_headers"
    r"|cancel_http_readonly_queries_on_client_close|stacktrace|param_\w+"
)
_INSERT = re.compile(
    r"\s*(INSERT\s+INTO\s(?:(?!\bSELECT\b|\bVALUES\b).)*?)\sFORMAT\s+(\w+)[ \t]*(?:;\s*)?(?:\r?\n)?",
    re.IGNORECASE | re.DOTALL,
)
_FORMAT = re.compile(r"\sFORMAT\s+(\w+)\s*(?:SETTINGS\s.*)?;?\s*$", re.IGNORECASE | re.DOTALL)
_CODE = re.compile(r"Code: (\d+)\.")
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4


@dataclass
class _Session:
    """What a `session_id` keeps between requests: settings, temporary tables, the current database."""

    chdb: Any
    busy: bool = False
    until: float = field(default_factory=lambda: time.monotonic() + _SESSION_SECONDS)


class Engine:
    """The ASGI application. `connect` opens a session of chDB; `database` is where each begins."""

    def __init__(self, connect: Callable[[], Any], *, database: str, threads: int) -> None:
        self._connect = connect
        self._database = database
        self._threads = ThreadPoolExecutor(threads)
        self._control = connect()
        self._control.query(f"CREATE DATABASE IF NOT EXISTS {database}")
        self._sessions: dict[str, _Session] = {}
        self._number = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        parameters = dict(parse_qsl(scope["query_string"].decode(), keep_blank_values=True))
        headers = headers_of(scope)
        body = _decoded(body_of(receive), headers.get("content-encoding", ""))
        try:
            async with self._session(parameters) as session:
                await self._run(session, _Request(parameters, headers, body), receive, send)
        except _Refused as error:
            await fail(send, error.code, str(error))

    async def _run(self, session: Any, request: "_Request", receive: Receive, send: Send) -> None:
        parameters, headers, body = request.parameters, request.headers, request.body
        self._number += 1
        comment = f"request {self._number}"
        await self._prepare(session, parameters, headers, comment)
        sql = parameters.get("query", "")
        if not sql:
            sql, body = await _statement(body)
        if insert := _INSERT.match(sql):
            await self._insert(session, insert[1], insert[2], _after(sql[insert.end() :].encode(), body))
            await answer(send, b"", {})
            return
        sql += await _text(body)
        explicit = _FORMAT.search(sql)
        wanted = explicit[1] if explicit else parameters.get("default_format") or headers.get("x-clickhouse-format")
        format_ = wanted or "TabSeparated"
        values = {key[len("param_") :]: value for key, value in parameters.items() if key.startswith("param_")}
        pieces = self._pieces(session, sql, format_, values)
        # Who goes away ends the query. Nothing else can come: the body was read to its end.
        gone = asyncio.ensure_future(receive())
        try:
            await self._send(send, pieces, gone, comment, {"x-clickhouse-format": format_})
        finally:
            gone.cancel()
            await pieces.aclose()

    async def _send(
        self, send: Send, pieces: AsyncIterator[bytes], gone: asyncio.Future[Any], comment: str, headers: dict[str, str]
    ) -> None:
        begun = False
        while True:
            piece = asyncio.ensure_future(anext(pieces, None))
            await asyncio.wait({piece, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                await self._in_thread(
                    self._control.query, f"KILL QUERY WHERE Settings['log_comment'] = '{comment}' ASYNC"
                )
                with suppress(_Refused):
                    await piece
                return
            # An error later than the first piece breaks the connection: an answer that ends in order is whole.
            data = await piece
            if not begun:
                await answer(send, None, headers)
                begun = True
            await send({"type": "http.response.body", "body": data or b"", "more_body": data is not None})
            if data is None:
                return

    async def _pieces(self, session: Any, sql: str, format_: str, values: dict[str, str]) -> Any:
        """Yield the answer; in pieces where chDB can."""
        if format_.lower() in _STREAMED:
            try:
                stream = await self._in_thread(session.send_query, sql, format_, values)
                try:
                    while (piece := await self._in_thread(stream.fetch)) is not None:
                        yield piece.bytes() or b""
                finally:
                    await self._in_thread(stream.close)
            except _Refused as error:
                if _NOT_STREAMED not in str(error):
                    raise
            else:
                return
        result = memoryview((await self._in_thread(session.query, sql, format_, "", values)).bytes() or b"")
        for start in range(0, len(result), _PIECE):
            yield bytes(result[start : start + _PIECE])

    async def _insert(self, session: Any, sql: str, format_: str, data: AsyncIterator[bytes]) -> None:
        inserter = await self._in_thread(session.send_insert, sql, format_)
        try:
            async for piece in data:
                if piece:
                    await self._in_thread(inserter.append, piece)
            await self._in_thread(inserter.finish)
        except BaseException:
            with suppress(Exception):
                await self._in_thread(inserter.cancel)
            raise

    async def _prepare(self, session: Any, parameters: dict[str, str], headers: dict[str, str], comment: str) -> None:
        database = parameters.get("database") or headers.get("x-clickhouse-database") or ""
        if database:
            await self._in_thread(session.query, f"USE {_quoted(database)}")
        settings = {key: value for key, value in parameters.items() if not _REQUEST.fullmatch(key)}
        settings["log_comment"] = comment
        for key, value in settings.items():
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            await self._in_thread(session.query, f"SET {_quoted(key)} = '{escaped}'")

    @asynccontextmanager
    async def _session(self, parameters: dict[str, str]) -> AsyncIterator[Any]:
        """Open a session of its own for this request, or the one that it names."""
        name = parameters.get("session_id", "")
        for other, held in list(self._sessions.items()):
            if held.until < time.monotonic() and not held.busy:
                await self._in_thread(self._sessions.pop(other).chdb.close)
        if not name:
            chdb = await self._open()
            try:
                yield chdb
            finally:
                await self._in_thread(chdb.close)
            return
        if name not in self._sessions:
            if len(self._sessions) >= _MAX_SESSIONS:
                raise _Refused("Code: 700. DB::Exception: Too many sessions are open. (USER_SESSION_LIMIT_EXCEEDED)")
            self._sessions[name] = _Session(await self._open())
        session = self._sessions[name]
        if session.busy:
            raise _Refused("Code: 373. DB::Exception: Session is locked by a concurrent client. (SESSION_IS_LOCKED)")
        session.busy = True
        try:
            yield session.chdb
        finally:
            session.busy = False
            session.until = time.monotonic() + float(parameters.get("session_timeout") or _SESSION_SECONDS)

    async def _open(self) -> Any:
        chdb = await self._in_thread(self._connect)
        await self._in_thread(chdb.query, f"USE {self._database}")
        return chdb

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call chDB, which holds a thread for as long as a query runs."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        except Exception as error:
            raise _Refused(str(error)) from error


@dataclass(frozen=True)
class _Request:
    parameters: dict[str, str]
    headers: dict[str, str]
    body: AsyncIterator[bytes]


class _Refused(Exception):
    """What chDB said to a query."""

    @property
    def code(self) -> str:
        found = _CODE.search(str(self))
        return found[1] if found else "1002"


async def _statement(body: AsyncIterator[bytes]) -> tuple[str, AsyncIterator[bytes]]:
    """Read a statement from the top of the body; return it, and the rest if it may be an INSERT's data."""
    head = b""
    async for piece in body:
        head += piece
        text = head[: 1 << 16].decode("utf-8", "ignore")
        found = _INSERT.match(text)
        if found and found.end() < len(text):
            length = len(text[: found.end()].encode())
            return text[: found.end()], _after(head[length:], body)
        if len(head) > _MAX_STATEMENT:
            raise _Refused("Code: 62. DB::Exception: The statement is too long. (SYNTAX_ERROR)")
    return head.decode("utf-8", "replace"), body


async def _text(body: AsyncIterator[bytes]) -> str:
    pieces, size = [], 0
    async for piece in body:
        pieces.append(piece)
        size += len(piece)
        if size > _MAX_STATEMENT:
            raise _Refused("Code: 62. DB::Exception: The statement is too long. (SYNTAX_ERROR)")
    return b"".join(pieces).decode("utf-8", "replace")


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


async def _decoded(body: AsyncIterator[bytes], encoding: str) -> AsyncIterator[bytes]:
    """Unpack a body; lz4 is what clickhouse-connect sends. No piece gets larger, however well it was packed."""
    if encoding in {"", "identity"}:
        async for piece in body:
            yield piece
        return
    if encoding == "lz4":
        unpacker = lz4.frame.LZ4FrameDecompressor()
        async for piece in body:
            yield unpacker.decompress(piece, _PIECE)
            while not unpacker.needs_input and not unpacker.eof:
                yield unpacker.decompress(b"", _PIECE)
        return
    if encoding not in {"gzip", "deflate"}:
        raise _Refused(f"Code: 48. DB::Exception: Data cannot be packed with {encoding} here. (NOT_IMPLEMENTED)")
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
    async for piece in body:
        rest = piece
        while rest:
            yield inflate.decompress(rest, _PIECE)
            rest = inflate.unconsumed_tail


def _quoted(identifier: str) -> str:
    return "`" + identifier.replace("\\", "\\\\").replace("`", "\\`") + "`"


def main(folder: Path, *, database: str, uid: int, threads: int) -> None:
    """Run until the end. `uid` is whom to become once all is loaded; the own one if that stays."""
    own = [Path(__file__).parents[3], Path(sys.prefix), Path(sys.base_prefix)]
    system = [Path(path) for path in ("/usr", "/lib", "/lib64", "/proc/self", "/proc/meminfo", "/sys/fs/cgroup")]
    # A thread keeps what it was born with, and chDB starts some when it is loaded.
    confine(readable=[*own, *system, folder], writable=[folder / "data", Path("/dev/null"), Path("/dev/urandom")])
    os.environ["TMPDIR"] = f"{folder}/data"
    # chDB would load the config.xml of whatever folder it is started in; and the socket's path stays short.
    os.chdir(folder / "data")
    from chdb import session  # noqa: PLC0415 - 530 MB, and not before the confinement

    libc = ctypes.CDLL(None)
    if uid != os.getuid():
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self is root's
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    url = f"{folder}/data/store?config-file={folder}/config.xml"
    engine = Engine(partial(session.Session, url), database=database, threads=threads)
    server = uvicorn.Server(
        uvicorn.Config(engine, uds="socket", lifespan="off", log_config=None, log_level="critical", access_log=False)
    )
    asyncio.run(_serve(server))


async def _serve(server: uvicorn.Server) -> None:
    serving = asyncio.create_task(server.serve())
    while not server.started and not serving.done():  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.01)
    print("ready", flush=True)  # noqa: T201 - to the gateway
    await serving


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), database=sys.argv[2], uid=int(sys.argv[3]), threads=int(sys.argv[4]))
    except (CannotConfine, ImportError, OSError, RuntimeError) as error:
        print(str(error).splitlines()[0], flush=True)  # noqa: T201 - to the gateway
        sys.exit(1)
