"""A PortalError as the answer to both kinds of caller: `google.rpc.Status`, and the JSON that the edge makes of it."""

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from controlplane.api.v1 import errors_pb2
from controlplane.errors import (
    BadLogin,
    InvalidField,
    PortalError,
    QuotaExceeded,
    RateLimited,
    ScopeDenied,
    Unauthenticated,
    Unavailable,
)
from controlplane.rpc.call import Call

DOMAIN = "htx.cloud"


def trailing_metadata(error: PortalError, call: Call) -> tuple[tuple[str, str | bytes], ...]:
    """Return what an aborted RPC answers with: the details, and headers for a REST caller."""
    metadata: list[tuple[str, str | bytes]] = [*call.headers, ("grpc-status-details-bin", _details(error, call))]
    if isinstance(error, Unauthenticated | BadLogin):
        metadata.append(("www-authenticate", "Bearer"))
    if isinstance(error, RateLimited | Unavailable):
        metadata.append(("retry-after", str(error.retry_after)))
    if call.rest:
        metadata.append(("x-http-status", str(error.http)))
    else:
        metadata.append(("x-request-id", call.request_id))
    return tuple(metadata)


def _details(error: PortalError, call: Call) -> bytes:
    """Return the Status, with the fields of our own `Error` appended.

    Protobuf messages are joined by joining their bytes. A native client reads the Status and ignores the fields that
    it does not know; the edge's descriptors know only those, and print them (see `proto/generate.py`).
    """
    status = status_pb2.Status(
        code=error.status.value[0],
        message=str(error),
        details=[_packed(detail) for detail in _standard_details(error, call)],
    )
    ours = errors_pb2.Error(code=error.code, request_id=call.request_id)
    if isinstance(error, InvalidField):
        ours.fields.extend(errors_pb2.FieldError(field=rule.field, error=rule.error) for rule in error.rules)
    joined: bytes = status.SerializeToString() + ours.SerializeToString()
    return joined


def _standard_details(error: PortalError, call: Call) -> list[Message]:
    metadata = {"request_id": call.request_id}
    if isinstance(error, ScopeDenied):
        metadata |= {"needed": error.needed, "scope": error.scope}
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.code, domain=DOMAIN, metadata=metadata)]
    if isinstance(error, InvalidField):
        violation = error_details_pb2.BadRequest.FieldViolation
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[violation(field=rule.field, description=rule.error) for rule in error.rules]
            )
        )
    if isinstance(error, QuotaExceeded):
        quota = error_details_pb2.QuotaFailure.Violation(subject=error.kind, description=str(error))
        details.append(error_details_pb2.QuotaFailure(violations=[quota]))
    if isinstance(error, RateLimited | Unavailable):
        details.append(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=error.retry_after)))
    return details


def _packed(message: Message) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed
