"""The host's HTTP side: functions' public addresses, and the calls that the control plane passes on; an ASGI app."""

import json
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import grpc
import structlog

from controlplane.api.hosts.v1 import hosts_pb2
from controlplane.functions.host.directory import Directory, Function
from controlplane.functions.host.http import Answer, BadAnswer, Request, answer_of, event_of, is_json
from controlplane.functions.host.logs import Logs
from controlplane.functions.host.pool import Ended, NotReady, TooManyCalls

LARGEST_BODY = 6 * 1024 * 1024
_LARGEST_BODIES = 256 * 1024 * 1024  # of all calls together; who sends slowly must not fill the memory
_PUBLIC = "/f/"
_INVOKE = "/invoke/"
_REQUEST_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_WITHOUT_LENGTH = {204, 304}
_RETRY = {"retry-after": "1"}

# What a caller who is not the owner learns of a call that failed; the log has the rest.
_FAILURES = {
    "error": (502, "function_error", "The function raised an error."),
    "too_large": (502, "function_bad_answer", "The function's answer is too large."),
    "bad_answer": (502, "function_bad_answer", "The function's answer is no HTTP answer."),
    "crashed": (502, "function_crashed", "The function's process ended before it answered."),
    "start_failed": (502, "function_crashed", "The function's process could not be started."),
    "out_of_memory": (502, "function_out_of_memory", "The function needs more memory than it may use."),
    "timeout": (504, "timeout", "The function did not answer in time."),
}
# What is no answer for the owner either; of the others he gets to know what his handler did.
_WITHOUT_INVOCATION = {"timeout", "start_failed"}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
# Asks the control plane whether a call may go on; raises gRPC's errors.
Authorize = Callable[[hosts_pb2.AuthorizeFunctionCallRequest], Awaitable[hosts_pb2.AuthorizeFunctionCallResponse]]

_log = structlog.get_logger("functions")


class Calls:
    """The ASGI app. `call_secret` is what the control plane shows; as long as there is none, it is not let in."""

    call_secret = ""

    def __init__(self, *, directory: Directory, authorize: Authorize, logs: Logs) -> None:
        self._directory = directory
        self._authorize = authorize
        self._logs = logs
        self._bodies = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        try:
            answer = await self._answer(scope, receive, headers, request_id)
        except _Refused as refused:
            answer = refused.answer(request_id)
        except _HungUp:
            return
        except Exception:  # noqa: BLE001 - whatever it is, the caller gets an answer of ours
            _log.exception("a call failed by a fault of ours", request_id=request_id)
            answer = _Refused(500, "internal", "Something failed on our side: try again.").answer(request_id)
        await _send(answer, send, is_head=scope["method"] == "HEAD")

    async def _answer(self, scope: Scope, receive: Receive, headers: Mapping[str, str], request_id: str) -> Answer:
        path = scope["raw_path"].decode("latin-1")
        if path.startswith(_PUBLIC):
            return await self._answer_anybody(scope, receive, headers, request_id)
        if path.startswith(_INVOKE) and scope["method"] == "POST":
            shown = headers.get("x-htx-call-secret", "").encode("latin-1")
            if self.call_secret and secrets.compare_digest(shown, self.call_secret.encode()):
                return await self._answer_owner(path.removeprefix(_INVOKE), receive, headers, request_id)
        raise _Refused(404, "not_found", "There is nothing here.")

    async def _answer_anybody(
        self, scope: Scope, receive: Receive, headers: Mapping[str, str], request_id: str
    ) -> Answer:
        """Answer at a function's own address, in the format of function URLs."""
        path = scope["raw_path"].decode("latin-1")
        account_id, _, rest = path.removeprefix(_PUBLIC).partition("/")
        name, _, rest = rest.partition("/")
        function = self._directory.find(account_id, name)
        if function is None:
            raise _Refused(404, "not_found", "There is no function at this address.")
        client_ip = headers.get("x-htx-client-ip", "")
        with_token = function.auth != "public"
        passed = await self._check_caller(function, scope, client_ip) if with_token else {}
        request = Request(
            function_id=function.id,
            account_id=function.account_id,
            method=scope["method"],
            path=f"/{rest}",
            query=scope["query_string"].decode("latin-1"),
            protocol=f"HTTP/{scope['http_version']}",
            headers=scope["headers"],
            client_ip=client_ip,
            request_id=request_id,
        )
        # A token of the account is not for its functions: whoever may change one could take it from there.
        without = ("authorization",) if with_token else ()
        ended = await self._call(
            function, receive, headers, request_id, lambda body: event_of(request, body, without=without)
        )
        answer = Answer(500, b"")
        if ended.outcome == "ok":
            try:
                answer = answer_of(ended.payload)
            except BadAnswer as bad:
                ended = replace(ended, outcome="bad_answer", message=f"The handler's answer is no HTTP answer: {bad}.")
        self._note(function, ended, request_id)
        if ended.outcome != "ok":
            raise _Refused(*_FAILURES[ended.outcome], headers=passed)
        answer.headers += passed.items()
        return answer

    async def _answer_owner(
        self, function_id: str, receive: Receive, headers: Mapping[str, str], request_id: str
    ) -> Answer:
        """Answer the control plane, which calls for the function's owner: the body is the event."""
        function = self._directory.get(function_id)
        if function is None:
            raise _Refused(404, "not_found", "There is no such function.")
        ended = await self._call(function, receive, headers, request_id, lambda body: body or b"null")
        if ended.outcome == "ok" and not is_json(ended.payload):
            ended = replace(ended, outcome="bad_answer", payload=b"", message="The handler's answer is not JSON.")
        self._note(function, ended, request_id)
        if ended.outcome in _WITHOUT_INVOCATION:
            status, code, sentence = _FAILURES[ended.outcome]
            raise _Refused(status, code, ended.message or sentence)
        facts = {
            "status": "succeeded" if ended.outcome == "ok" else "failed",
            "error": ended.message or None,
            "trace": ended.trace,
            "version": ended.version,
            "duration_ms": ended.seconds * 1000,
            "memory_mb": ended.memory_mb,
            "cold_start": ended.cold_start,
            "request_id": request_id,
        }
        # The result is JSON already, of up to 6 MiB.
        body = b"".join((json.dumps(facts).encode()[:-1], b', "result": ', ended.payload or b"null", b"}"))
        return Answer(200, body, [("content-type", "application/json")])

    async def _check_caller(self, function: Function, scope: Scope, client_ip: str) -> dict[str, str]:
        """Ask the control plane whether the caller may call; return headers that the answer shall have."""
        credentials = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        question = hosts_pb2.AuthorizeFunctionCallRequest(
            function_id=function.id, authorization=",".join(credentials), client_ip=client_ip
        )
        try:
            verdict = await self._authorize(question)
        except grpc.aio.AioRpcError as error:
            _log.warning("nobody could say whether a call is allowed", function=function.id, error=error.details())
            raise _unavailable() from error
        if verdict.status:
            raise _Refused(verdict.status, verdict.code, verdict.error, headers=verdict.headers)
        return dict(verdict.headers)

    async def _call(
        self,
        function: Function,
        receive: Receive,
        headers: Mapping[str, str],
        request_id: str,
        event: Callable[[bytes], bytes],
    ) -> Ended:
        """Read the body and call the function; raises _Refused, and nothing was run then."""
        body = bytearray()
        try:
            await self._read(receive, headers, into=body)
            return await function.pool.call(event(bytes(body)), request_id)
        except TooManyCalls as many:
            function.metrics.count_refusal("too_many_calls")
            raise _Refused(429, "too_many_calls", f"{many} Retry in a moment.", headers=_RETRY) from None
        except NotReady as not_ready:
            function.metrics.count_refusal("not_ready")
            retry = {"retry-after": str(math.ceil(not_ready.retry_after))}
            raise _Refused(503, "not_ready", str(not_ready), headers=retry) from None
        finally:
            self._bodies -= len(body)

    async def _read(self, receive: Receive, headers: Mapping[str, str], *, into: bytearray) -> None:
        expected = int(headers.get("content-length") or 0)
        more = True
        while more and expected <= LARGEST_BODY:
            if self._bodies > _LARGEST_BODIES:
                raise _unavailable()
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _HungUp
            chunk = message.get("body", b"")
            into += chunk
            self._bodies += len(chunk)
            expected = max(expected, len(into))
            more = message.get("more_body", False)
        if expected > LARGEST_BODY:
            raise _Refused(413, "too_large", f"The request is too large: at most {LARGEST_BODY} bytes are accepted.")

    def _note(self, function: Function, ended: Ended, request_id: str) -> None:
        """Write down how a call ended."""
        self._logs.add_call(function.id, ended, request_id)
        function.metrics.count(
            ended.outcome, seconds=ended.seconds, memory_mb=ended.memory_mb, cold_start=ended.cold_start
        )


class _HungUp(Exception):
    """The caller went away before all of the request was there."""


class _Refused(Exception):
    """A call that gets no answer of the function's."""

    def __init__(self, status: int, code: str, sentence: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self._status = status
        self._code = code
        self._headers = headers or {}

    def answer(self, request_id: str) -> Answer:
        body = {"error": str(self), "code": self._code, "request_id": request_id}
        headers = [*self._headers.items(), ("content-type", "application/json")]
        return Answer(self._status, json.dumps(body, ensure_ascii=False).encode(), headers)


def _unavailable() -> _Refused:
    return _Refused(503, "unavailable", "The service cannot answer right now. Retry in a moment.", headers=_RETRY)


async def _send(answer: Answer, send: Send, *, is_head: bool) -> None:
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
    if answer.status not in _WITHOUT_LENGTH:
        headers.append((b"content-length", str(len(answer.body)).encode()))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if is_head else answer.body})
