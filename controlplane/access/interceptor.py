"""The one door: every RPC passes here, in this order, and nothing that fails gets further.

credential → caller → allowlist → rate → policy → field rules → the servicer → the record and the feed → the commit
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.access.admission import Admission
from controlplane.access.uses import Uses
from controlplane.audit.log import AuditLog
from controlplane.audit.model import AuditEntry
from controlplane.errors import PortalError, TooLarge, Unavailable
from controlplane.events.feed import Feed
from controlplane.hosts.interceptor import HOST_SERVICES
from controlplane.observe.metrics import Metrics
from controlplane.observe.traces import Traces
from controlplane.rpc import call as calls
from controlplane.rpc.bare_list import bare_list
from controlplane.rpc.call import Answer, Call
from controlplane.rpc.contract import Rpc
from controlplane.rpc.idempotency import Idempotency
from controlplane.rpc.remembered import is_remembered
from controlplane.rpc.rules import read_request
from controlplane.rpc.status import trailing_metadata
from controlplane.sql import Remembered, Store, is_outage

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]  # generic only in its type stubs
else:
    Handler = grpc.RpcMethodHandler
# Services that are not ours and have no policy of their own: both tell nothing but what the proto files tell.
OPEN_SERVICES = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "grpc.reflection.v1.ServerReflection",
)

_REMEMBERED = 500  # answers; a page of 20 databases is 5 KB, the longest possible 300 KB

_log = structlog.get_logger("rpc")


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Answers for every RPC whether it may go on; and opens and commits the transaction of those that write."""

    def __init__(
        self,
        *,
        rpcs: dict[str, Rpc],
        store: Store,
        admission: Admission,
        uses: Uses,
        idempotency: Idempotency,
        audit: AuditLog,
        feed: Feed,
        metrics: Metrics,
        traces: Traces,
        max_body_bytes: int,
    ) -> None:
        self._rpcs = rpcs
        self._store = store
        self._admission = admission
        self._uses = uses
        self._idempotency = idempotency
        self._audit = audit
        self._feed = feed
        self._metrics = metrics
        self._traces = traces
        self._max_body_bytes = max_body_bytes
        self._answers = Remembered[Answer](store, most=_REMEMBERED)
        self._doors: dict[str, Handler] = {}
        self._writes: set[asyncio.Task[bytes]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the door of the RPC, made once per method."""
        path = handler_call_details.method
        door = self._doors.get(path)
        if door is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None  # gRPC's own answer: UNIMPLEMENTED
            door = self._doors[path] = self._door(path, handler)
        return door

    async def finish(self) -> None:
        """Wait for the writes whose callers have gone."""
        if self._writes:
            await asyncio.wait(self._writes)

    def _door(self, path: str, handler: Handler) -> Handler:
        rpc = self._rpcs.get(path)
        if rpc is None:
            if path.strip("/").partition("/")[0] in (*OPEN_SERVICES, *HOST_SERVICES):
                return handler
            raise LookupError(f"{path} has no policy")  # the server checked at its start that there is none
        # Bytes in, bytes out: who the caller is comes before what the bytes say.
        if handler.request_streaming:
            raise LookupError(f"{path}: a stream of requests has no rule yet for when its fields are checked")
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(rpc, handler.unary_stream))  # type: ignore[arg-type]
        return grpc.unary_unary_rpc_method_handler(self._unary(rpc, handler.unary_unary))  # type: ignore[arg-type]

    def _unary(self, rpc: Rpc, method: Callable[[Message, Context], Awaitable[Message]]) -> Callable[..., Any]:
        answer = self._write if rpc.writes else self._reread if is_remembered(method) else self._read
        done = self._metrics.rpcs.labels(rpc.name, "OK")
        seconds = self._metrics.rpc_seconds.labels(rpc.name)

        async def door(raw: bytes, context: Context) -> bytes:
            began = time.perf_counter()
            call = calls.enter(rpc, context)
            try:
                with self._traces.span(call) if self._traces.on else nullcontext():
                    await self._admit(call, raw)
                    response = await answer(call, method, raw, context)
            except Exception as error:
                await self._refuse(call, error, raw, context)
                raise
            finally:
                seconds.observe(time.perf_counter() - began)
            if call.rest:
                if rpc.status != 200:  # noqa: PLR2004
                    call.headers.append(("x-http-status", str(rpc.status)))
            else:
                call.headers.append(("x-request-id", call.request_id))
            if call.headers:
                await context.send_initial_metadata(tuple(call.headers))
            done.inc()
            return response

        return door

    def _stream(self, rpc: Rpc, method: Callable[[Message, Context], AsyncIterator[Message]]) -> Callable[..., Any]:
        done = self._metrics.rpcs.labels(rpc.name, "OK")

        async def door(raw: bytes, context: Context) -> AsyncIterator[bytes]:
            call = calls.enter(rpc, context)
            try:
                await self._admit(call, raw)
                async for message in method(read_request(raw, call), context):
                    yield message.SerializeToString()
            except Exception as error:
                await self._refuse(call, error, raw, context)
                raise
            done.inc()

        return door

    async def _admit(self, call: Call, raw: bytes) -> None:
        """Go through everything that stands between a caller and what he asks for."""
        await self._admission.admit(call)
        limit = call.rpc.max_body_bytes or self._max_body_bytes
        if len(raw) > limit:
            raise TooLarge(limit)

    async def _read(self, call: Call, method: Any, raw: bytes, context: Context) -> bytes:
        response: Message = await method(read_request(raw, call), context)
        if call.rpc.waits:
            await self._admission.identify(call)  # it may have ended while it waited
        if call.rest and call.rpc.response_body:
            response = bare_list(response, call.rpc.response_body)
        return response.SerializeToString()

    async def _reread(self, call: Call, method: Any, raw: bytes, context: Context) -> bytes:
        """Answer a read from memory, if nothing was committed since it was last answered.

        The same bytes have passed the field rules then; checking them again took as long as all the rest of this.
        """
        before = len(call.headers)

        async def read() -> Answer | None:
            message = await self._read(call, method, raw, context)
            headers = tuple(call.headers[before:])
            del call.headers[before:]
            return Answer(message, headers)

        answer = await self._answers.get((call.rpc.path, call.caller.account_id, call.rest, raw), read)
        assert answer is not None  # noqa: S101 - read() never answers with nothing
        call.headers += answer.headers
        return answer.message

    async def _write(self, call: Call, method: Any, raw: bytes, context: Context) -> bytes:
        """Answer in a transaction that no caller interrupts by hanging up: it commits or rolls back as a whole."""
        task = asyncio.create_task(self._transaction(call, method, read_request(raw, call), context))
        self._writes.add(task)
        task.add_done_callback(partial(self._written, call))
        return await asyncio.shield(task)

    def _written(self, call: Call, task: asyncio.Task[bytes]) -> None:
        self._writes.discard(task)
        if not call.committed.done():
            call.committed.set_result(False)
        if not task.cancelled():
            task.exception()  # whoever still waits has it; if nobody does, it is not worth a warning

    async def _transaction(self, call: Call, method: Any, request: Message, context: Context) -> bytes:
        key = self._idempotency.key_of(call)
        async with self._store.session() as session:
            call.maybe_session = session
            if key is not None:
                # Not the bytes as they came: the edge writes fields in the order of the JSON, and maps have none.
                before = await self._idempotency.claim(
                    session, call, key, request.SerializeToString(deterministic=True)
                )
                if before is not None:
                    call.headers += (*before.headers, ("idempotent-replayed", "true"))
                    return before.message
            headers_before = len(call.headers)
            response: Message = await method(request, context)
            answer = response.SerializeToString()
            if getattr(request, "validate_only", False):
                await session.rollback()
                return answer
            if key is not None:
                headers = call.headers[headers_before:]
                await self._idempotency.record(session, call, key, Answer(answer, tuple(headers)))
            entry = await self._tell(call, session, request, response)
            await session.commit()
        call.committed.set_result(True)
        for then in call.after_commit:
            then()
        _log.info(
            call.rpc.name,
            account=call.maybe_caller.account_id if call.maybe_caller else None,
            credential=call.maybe_caller.credential_id if call.maybe_caller else None,
            ip=call.client_ip,
            request_id=call.request_id,
            # Where an operator keeps the log elsewhere, it anchors the record: its end cannot be cut off unseen.
            record=entry.sequence,
            digest=entry.digest,
        )
        return answer

    async def _tell(self, call: Call, session: AsyncSession, request: Message, response: Message) -> AuditEntry:
        """Add a change to the account's record and feed, whose locks are the last that a transaction takes.

        Returns the entry of the record.
        """
        entry = await self._audit.record(session, call, request, response)
        account_id = call.account_id
        if account_id is None:
            return entry
        await self._feed.append(
            session,
            account_id=account_id,
            type_=call.rpc.action,
            resource_id=getattr(response, "id", call.target or account_id),
            resource_name=getattr(response, "name", None),
            status=getattr(response, "status", None),
            request_id=call.request_id,
        )
        call.after_commit.append(partial(self._feed.announce, account_id))
        return entry

    async def _refuse(self, call: Call, error: Exception, raw: bytes, context: Context) -> None:
        """Abort the RPC with what the caller may know; the rest goes to the log."""
        if not isinstance(error, PortalError):
            details = {"rpc": call.rpc.name, "request_id": call.request_id}
            if is_outage(error):
                _log.error("the control plane's database does not answer", error=str(error), **details)
                error = Unavailable()
            else:
                _log.error("a bug: an RPC failed in a way that nobody foresaw", exc_info=error, **details)
                error = PortalError("Something went wrong on our side. Quote the request id to support.")
        elif error.__cause__ is not None:
            _log.warning(str(error), rpc=call.rpc.name, request_id=call.request_id, cause=repr(error.__cause__))
        self._metrics.rpcs.labels(call.rpc.name, error.code).inc()
        self._uses.refused(call, error)
        self._audit.refused(call, error, raw)
        await context.abort(error.status, str(error), trailing_metadata(error, call))
