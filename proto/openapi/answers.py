"""What an operation answers with: its success, and the errors that operations share."""

from http import HTTPStatus
from typing import Any

from comments import Comments
from schemas import Schemas

from controlplane import errors
from controlplane.rpc.contract import Rpc, rpcs

HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-Id": {
        "description": "The id of this request, the same as in an error's `request_id`; what is not HTTP has none.",
        "schema": {"type": "string"},
    },
    "ETag": {
        "description": "The version of the resource, for `If-Match`.",
        "schema": {"type": "string", "examples": ['"db_06fq2v9n7ke4w0xg5s1dzr8tbc.1"']},
    },
    "Link": {
        "description": 'The address of the next page, as `<…>; rel="next"`; absent on the last one.',
        "schema": {"type": "string"},
    },
    "Idempotent-Replayed": {
        "description": "`true` when this is the first answer again, and nothing was done.",
        "schema": {"type": "string", "enum": ["true"]},
    },
    "RateLimit-Limit": {
        "description": "How many requests the token may make in any 60 seconds; absent for a login.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "RateLimit-Remaining": {
        "description": "How many of them are left; absent for a login.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "RateLimit-Reset": {
        "description": "Seconds until there is one more; absent for a login.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Location": {"description": "Where to go on.", "schema": {"type": "string", "format": "uri-reference"}},
    "Set-Cookie": {"description": "What the browser is to send along from now on.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds to wait before trying again.", "schema": {"type": "integer", "minimum": 1}},
    "WWW-Authenticate": {"description": "How to authenticate.", "schema": {"type": "string", "examples": ["Bearer"]}},
}
_RATE_LIMIT = ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
# A rate is not known where the edge answers, or before the caller is known.
_WITHOUT_RATE_LIMIT = {401, 413, 415, 431, 503, 504}
_OTHER_HEADERS = {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After",)}


def _error(code: str, sentence: str) -> dict[str, Any]:
    return {"error": sentence, "code": code, "request_id": "06fq2v9n7ke4w0xg5s1dzr8tbc"}


def _as_json(error: errors.PortalError) -> dict[str, Any]:
    return _error(error.code, str(error))


_BROKEN = errors.BrokenRule("name", "must be lower-case letters, digits and hyphens")
# By status: the component's name, what the status means, and an example.
_FAILURES: dict[int, tuple[str, str, dict[str, Any]]] = {
    400: (
        "BadRequest",
        "The request cannot be read (`invalid_request`), or fields break their rules (`invalid_field`).",
        _as_json(errors.InvalidField(_BROKEN)) | {"fields": [{"field": _BROKEN.field, "error": _BROKEN.error}]},
    ),
    401: (
        "Unauthorized",
        "No credential, or one that is malformed, unknown, expired or revoked (`unauthenticated`).",
        _as_json(errors.Unauthenticated()),
    ),
    402: (
        "QuotaExceeded",
        "Plan quota reached (`quota_exceeded`).",
        _as_json(errors.QuotaExceeded("databases", limit=3, used=3)),
    ),
    403: (
        "Forbidden",
        "The caller is known and may not do this.",
        _as_json(errors.ScopeDenied("databases:create", scope="read")),
    ),
    404: (
        "NotFound",
        "There is no such resource in this account (`not_found`).",
        _as_json(errors.NotFound("database", "analytics")),
    ),
    409: (
        "Conflict",
        "The name is taken (`already_exists`), or the state of things forbids it for now (`conflict`).",
        _as_json(errors.AlreadyExists("database", "analytics")),
    ),
    412: (
        "PreconditionFailed",
        "`If-Match` does not hold: the resource has changed since it was read (`stale`).",
        _as_json(errors.Stale('"db_06fq2v9n7ke4w0xg5s1dzr8tbc.2"')),
    ),
    413: ("TooLarge", "The body is too large (`too_large`).", _as_json(errors.TooLarge(65536))),
    415: (
        "UnsupportedMediaType",
        "The body is not `application/json` (`unsupported_media_type`).",
        _error("unsupported_media_type", "Send the body as JSON, with 'Content-Type: application/json'."),
    ),
    422: (
        "IdempotencyMismatch",
        "The `Idempotency-Key` was used before with another request (`idempotency_mismatch`).",
        _as_json(errors.IdempotencyMismatch()),
    ),
    429: (
        "RateLimited",
        "Rate limit exceeded, see `Retry-After` (`rate_limited`).",
        _as_json(errors.RateLimited(120, retry_after=7)),
    ),
    431: (
        "HeadersTooLarge",
        "The headers are too large, or the path with its query is (`headers_too_large`).",
        _error("headers_too_large", "The headers are too large: send at most 64, of 16 KB together."),
    ),
    503: (
        "Unavailable",
        "The service cannot answer right now, see `Retry-After` (`unavailable`).",
        _as_json(errors.Unavailable()),
    ),
    504: (
        "Timeout",
        "The service took too long; a write may have happened all the same (`timeout`).",
        _error("timeout", "The service took too long to answer. Look whether it happened before you repeat it."),
    ),
}


def failures(error: dict[str, Any]) -> dict[str, Any]:
    """Return the component responses of all errors; `error` refers to the schema of their JSON."""
    return {
        name: {
            "description": description,
            "headers": _headers(
                "X-Request-Id",
                *_OTHER_HEADERS.get(status, ()),
                *(() if status in _WITHOUT_RATE_LIMIT else _RATE_LIMIT),
            ),
            "content": {"application/json": {"schema": error, "example": example}},
        }
        for status, (name, description, example) in _FAILURES.items()
    }


def answers(rpc: Rpc, *, takes_key: bool, schemas: Schemas, comments: Comments) -> dict[str, Any]:
    """Return the responses of an operation by status; `takes_key` tells whether it takes an `Idempotency-Key`."""
    statuses = {*rpc.errors, 400, 431, 503, 504}
    if not rpc.access.public:
        statuses |= {401, 403, 429}
    if rpc.body:
        statuses |= {413, 415}
    if takes_key:
        statuses |= {409, 422}
    made = {str(rpc.status): _success(rpc, takes_key=takes_key, schemas=schemas, comments=comments)}
    return made | {str(status): _failure(rpc, status) for status in sorted(statuses)}


def _success(rpc: Rpc, *, takes_key: bool, schemas: Schemas, comments: Comments) -> dict[str, Any]:
    message = rpc.descriptor.output_type
    headers = ["X-Request-Id"]
    if _has_versions(message.full_name):
        headers.append("ETag")
    if rpc.waits or "page_token" in rpc.descriptor.input_type.fields_by_name:
        headers.append("Link")
    if takes_key:
        headers.append("Idempotent-Replayed")
    if not (rpc.access.public or rpc.access.login):
        headers += _RATE_LIMIT
    if rpc.status == HTTPStatus.SEE_OTHER:
        return {"description": "Go on there.", "headers": _headers("X-Request-Id", "Location", "Set-Cookie")}
    if message.full_name == "google.api.HttpBody":
        description, schema = "The document.", {"type": "object"}
    elif rpc.response_body:
        field = message.fields_by_name[rpc.response_body]
        description, schema = comments[field.full_name], schemas.field(field, answer=True)
    else:
        description, schema = comments[message.full_name], schemas.refer(message, answer=True)
    return {
        "description": description,
        "headers": _headers(*headers),
        "content": {"application/json": {"schema": schema}},
    }


def _has_versions(resource: str) -> bool:
    """Tell whether some RPC takes this resource's `If-Match`; each that answers with it shows the ETag to send then."""
    return any(
        HTTPStatus.PRECONDITION_FAILED in rpc.errors and rpc.descriptor.output_type.full_name == resource
        for rpc in rpcs().values()
    )


def _failure(rpc: Rpc, status: int) -> dict[str, Any]:
    """Return a reference to the component, with a description of its own where the RPC says more than the status."""
    if status not in _FAILURES:
        raise SystemExit(f"{rpc.path} answers with {status}: describe that status in proto/openapi/answers.py.")
    made = {"$ref": f"#/components/responses/{_FAILURES[status][0]}"}
    if status == HTTPStatus.FORBIDDEN:
        made["description"] = _forbidden(rpc)
    elif status == HTTPStatus.UNAUTHORIZED and rpc.access.public:
        made["description"] = "What was shown to log in is wrong (`unauthenticated`)."
    return made


def _forbidden(rpc: Rpc) -> str:
    reasons = []
    if rpc.access.permission:
        reasons.append(
            f"Token scope does not permit this: it takes the permission `{rpc.access.permission}` (`scope_denied`)."
        )
    if rpc.access.login:
        reasons.append("A token does not do: this takes a login (`login_required`).")
    elif not rpc.access.public:
        reasons.append("The token may not be used from this address (`ip_denied`).")
    if rpc.writes:
        reasons.append("A browser sent the request from another site (`cross_site`).")
    return " ".join(reasons)


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
