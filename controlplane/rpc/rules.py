"""The field rules of a request, as `buf.validate` states them in the proto."""

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
    body = call.rpc.body if call.rest else ""
    if body:
        # A REST caller sees the body itself and not the field it fills: an empty one lacks its fields, not "database".
        getattr(request, body).SetInParent()
    violations = protovalidate.collect_violations(request)
    if violations:
        raise InvalidField(*(BrokenRule(_path(violation, body), violation.proto.message) for violation in violations))
    return request


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
