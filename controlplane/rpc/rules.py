"""The field rules of a request, as `buf.validate` states them in the proto."""

from collections.abc import Mapping, Sequence

import protovalidate
from google.protobuf.message import DecodeError, Message

from controlplane.errors import BrokenRule, InvalidField, InvalidRequest
from controlplane.rpc.call import Call


def read_request(raw: bytes, call: Call) -> Message:
    """Parse a request and hold it against its rules.

    Raises InvalidRequest for bytes that are no such message, InvalidField for a broken rule.
    """
    try:
        request = call.rpc.request.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest("The request cannot be read: it is malformed, or a text in it is not UTF-8.") from error
    if b"\0" in raw and _has_nul(request):
        # PostgreSQL keeps no such text, and would say so in the middle of a statement.
        raise InvalidRequest("A text in the request has the character U+0000, which no text may have: leave it out.")
    body = call.rpc.body if call.rest else ""
    if body:
        # A REST caller sees the body itself and not the field it fills: an empty one lacks its fields, not "database".
        getattr(request, body).SetInParent()
    violations = protovalidate.collect_violations(request)
    if violations:
        raise InvalidField(*(BrokenRule(_path(violation, body), violation.proto.message) for violation in violations))
    return request


def _has_nul(value: object) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, Message):
        return any(_has_nul(inner) for _, inner in value.ListFields())
    if isinstance(value, Mapping):
        return any(_has_nul(part) for pair in value.items() for part in pair)
    return isinstance(value, Sequence) and any(map(_has_nul, value))


def _path(violation: protovalidate.Violation, body: str) -> str:
    """Return the field's path as the caller wrote it, such as `name`, `tags.env` or `allowed_ips[2]`."""
    names = []
    elements = violation.proto.field.elements if violation.proto.field else []
    for element in elements:
        key = element.subscript.value if element.subscript else None
        suffix = "" if key is None else f"[{key}]" if isinstance(key, int) else f".{key}"
        names.append(f"{element.field_name}{suffix}")
    if names and names[0] == body:
        names = names[1:]
    return ".".join(names)
