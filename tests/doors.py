"""The two doors, each opened by the name of an RPC: REST through Envoy, and native gRPC. Every refusal is inspected."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
import httpx
from google.protobuf.json_format import MessageToDict, ParseDict
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from controlplane.rpc.contract import Rpc, rpcs

# Of each reason: the HTTP status, gRPC's, and the details that native callers get beside the ErrorInfo.
REASONS: dict[str, tuple[int, StatusCode, set[str]]] = {
    "invalid_request": (400, StatusCode.INVALID_ARGUMENT, set()),
    "invalid_field": (400, StatusCode.INVALID_ARGUMENT, {"BadRequest"}),
    "unauthenticated": (401, StatusCode.UNAUTHENTICATED, set()),
    "quota_exceeded": (402, StatusCode.RESOURCE_EXHAUSTED, {"QuotaFailure"}),
    "scope_denied": (403, StatusCode.PERMISSION_DENIED, set()),
    "ip_denied": (403, StatusCode.PERMISSION_DENIED, set()),
    "login_required": (403, StatusCode.PERMISSION_DENIED, set()),
    "cross_site": (403, StatusCode.PERMISSION_DENIED, set()),
    "not_found": (404, StatusCode.NOT_FOUND, set()),
    "method_not_allowed": (405, StatusCode.UNIMPLEMENTED, set()),
    "already_exists": (409, StatusCode.ALREADY_EXISTS, set()),
    "conflict": (409, StatusCode.ABORTED, set()),
    "stale": (412, StatusCode.FAILED_PRECONDITION, set()),
    "too_large": (413, StatusCode.INVALID_ARGUMENT, set()),
    "unsupported_media_type": (415, StatusCode.UNIMPLEMENTED, set()),
    "idempotency_mismatch": (422, StatusCode.FAILED_PRECONDITION, set()),
    "rate_limited": (429, StatusCode.RESOURCE_EXHAUSTED, {"RetryInfo"}),
    "too_many_calls": (429, StatusCode.RESOURCE_EXHAUSTED, {"RetryInfo"}),
    "headers_too_large": (431, StatusCode.RESOURCE_EXHAUSTED, set()),
    "unavailable": (503, StatusCode.UNAVAILABLE, {"RetryInfo"}),
    "timeout": (504, StatusCode.DEADLINE_EXCEEDED, set()),
}
_INSIDES = re.compile(
    r"traceback|\.py\b|controlplane|sqlalchemy|sqlite|asyncpg|integrity|psycopg|protobuf|google\.|"
    r"\bselect\b.+\bfrom\b|insert into|exception|error:|errno|0x[0-9a-f]{6}|/home/|/tmp/|/var/|grpc-",
    re.IGNORECASE,
)
_CONTRACT = re.compile(r"(type\.googleapis\.com/)?(controlplane\.api\.v1|google\.protobuf)\.\w+")
_DETAILS: dict[str, type[Any]] = {
    kind.DESCRIPTOR.name: kind
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.QuotaFailure,
        error_details_pb2.RetryInfo,
    )
}
Door: TypeAlias = "Rest | Native"
RPCS = {rpc.name: rpc for rpc in rpcs().values()}


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: `code` is `ok` or the reason; `result` is the JSON, also of a native answer."""

    code: str
    headers: Mapping[str, str]
    result: Any = None
    sentence: str = ""
    request_id: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


class Rest:
    """REST through Envoy."""

    name = "rest"

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def call(self, rpc_name: str, request: dict[str, Any] | None = None, /, **headers: str) -> Answer:
        """Send the request by the RPC's REST route; `_` in a header's name stands for `-`."""
        rpc, rest = RPCS[rpc_name], dict(request or {})
        path = re.sub(r"\{(\w+)\}", lambda found: str(rest.pop(found[1])), rpc.route)
        body = rest.pop(rpc.body, None) if rpc.body else None
        query = {name: str(value).lower() if isinstance(value, bool) else value for name, value in rest.items()}
        response = await self._client.request(rpc.verb, path, json=body, params=query, headers=_named(headers))
        answer = read_response(response, success=rpc.status)
        assert answer.headers["x-request-id"]
        return answer


class Native:
    """Native gRPC."""

    name = "native"

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def call(self, rpc_name: str, request: dict[str, Any] | None = None, /, **headers: str) -> Answer:
        """Send the request as a message; `_` in a header's name stands for `-`."""
        rpc = RPCS[rpc_name]
        return await self.send(rpc, ParseDict(request or {}, rpc.request()).SerializeToString(), **headers)

    async def send(self, rpc: Rpc, raw: bytes, **headers: str) -> Answer:
        """Send these bytes as the request."""
        method: Any = self._channel.unary_unary(rpc.path, response_deserializer=rpc.response.FromString)
        call = method(raw, metadata=tuple(_named(headers).items()), timeout=30)
        try:
            message = await call
        except grpc.aio.AioRpcError as error:
            return read_error(error)
        got = _texts(await call.initial_metadata())
        assert got["x-request-id"]
        shown = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        return Answer("ok", got, shown[rpc.response_body] if rpc.response_body else shown)


def read_response(response: httpx.Response, *, success: int = 200) -> Answer:
    """Return the answer; a refusal is held against the one form that every error has."""
    assert response.headers["content-type"] == "application/json"
    assert not [name for name in response.headers if name.startswith(("grpc-", "x-htx-", "x-envoy-", "x-http-"))]
    if response.is_success:
        assert response.status_code == success
        return Answer("ok", response.headers, response.json())
    error = response.json()
    code = error["code"]
    # What the edge cannot even read as HTTP has no id.
    identified = {"request_id"} if "x-request-id" in response.headers else set()
    assert set(error) == {"error", "code", *identified, *(["fields"] if code == "invalid_field" else [])}
    assert (response.status_code, error.get("request_id")) == (REASONS[code][0], response.headers.get("x-request-id"))
    assert ("www-authenticate" in response.headers) == (response.status_code == 401)
    check_nothing_leaked(error["error"])
    fields = {entry["field"]: entry["error"] for entry in error.get("fields", ())}
    assert ("fields" in error) == bool(fields)
    return Answer(code, response.headers, None, error["error"], error.get("request_id", ""), fields)


def read_error(error: grpc.aio.AioRpcError) -> Answer:
    """Return the answer; its status and its details are held against each other."""
    raw = dict(error.trailing_metadata() or ())
    assert "grpc-status-details-bin" in raw, error.debug_error_string()
    status = status_pb2.Status.FromString(raw["grpc-status-details-bin"])
    headers = _texts(raw)
    details = {}
    for packed in status.details:
        kind = packed.TypeName().rpartition(".")[2]
        details[kind] = _DETAILS[kind].FromString(packed.value)
    info = details.pop("ErrorInfo")
    _, expected, kinds = REASONS[info.reason]
    assert (error.code(), status.code, set(details)) == (expected, expected.value[0], kinds)
    assert (status.message, info.domain) == (error.details(), "htx.cloud")
    assert info.metadata["request_id"] == headers["x-request-id"]
    assert ("www-authenticate" in headers) == (error.code() is StatusCode.UNAUTHENTICATED)
    check_nothing_leaked(status.message)
    broken = details["BadRequest"].field_violations if "BadRequest" in details else ()
    return Answer(
        info.reason,
        headers,
        None,
        status.message,
        info.metadata["request_id"],
        {violation.field: violation.description for violation in broken},
        {"ErrorInfo": info, **details},
    )


def check_nothing_leaked(sentence: str) -> None:
    """Fail if a sentence for customers shows what the server is made of; the contract's own names are public."""
    assert len(sentence) > 10
    assert _INSIDES.search(_CONTRACT.sub("", sentence)) is None, sentence


def _named(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def _texts(metadata: Any) -> dict[str, str]:
    return {key: value for key, value in dict(metadata or ()).items() if isinstance(value, str)}
