"""The operation of each RPC: who may call it, what it takes, and what it answers."""

import re
from http import HTTPStatus
from typing import Any

from answers import answers
from comments import Comments
from examples import examples
from google.protobuf.descriptor import FieldDescriptor
from rules import is_required
from schemas import Schemas

from controlplane.access.permissions import SCOPES, permissions_of, permits
from controlplane.rpc.contract import Rpc

PARAMETERS: dict[str, dict[str, Any]] = {
    "IdempotencyKey": {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "A key of your own making, such as a UUID, under which this very request can be sent again.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 255},
        "example": "5b0f9d0e-8a34-4f51-b7ce-2c5d0d6b1f55",
    },
    "IfMatch": {
        "name": "If-Match",
        "in": "header",
        "description": "The `ETag` that the resource had when it was read; nothing happens if it has another one now.",
        "schema": {"type": "string"},
        "example": '"db_06fq2v9n7ke4w0xg5s1dzr8tbc.1"',
    },
}


class Operations:
    """Describes RPCs one by one; their messages go to `schemas`."""

    def __init__(self, *, schemas: Schemas, comments: Comments) -> None:
        self._schemas = schemas
        self._comments = comments

    def describe(self, rpc: Rpc) -> dict[str, Any]:
        """Return the RPC's operation."""
        summary, _, description = self._comments[rpc.descriptor.full_name].partition("\n\n")
        takes_key = rpc.verb == "POST" and not rpc.access.public
        parameters = self._parameters(rpc, takes_key=takes_key)
        made: dict[str, Any] = {
            "operationId": rpc.name,
            "tags": [tag(rpc)],
            "summary": summary,
            "description": f"{description}\n\n{_who(rpc)}".strip(),
            "security": _security(rpc),
        }
        if rpc.access.permission:
            made["x-permission"] = rpc.access.permission
            made["x-scopes"] = _scopes(rpc)
        if parameters:
            made["parameters"] = parameters
        if rpc.body:
            made["requestBody"] = self._body(rpc)
        made["responses"] = answers(
            rpc,
            takes_key=takes_key,
            schemas=self._schemas,
            comments=self._comments,
        )
        return made

    def _parameters(self, rpc: Rpc, *, takes_key: bool) -> list[dict[str, Any]]:
        in_path = re.findall(r"\{(\w+)\}", rpc.route)
        fields = rpc.descriptor.input_type.fields
        made = [self._parameter(field, place="path") for field in fields if field.name in in_path]
        made += [self._parameter(field, place="query") for field in fields if field.name not in {*in_path, rpc.body}]
        if takes_key:
            made.append({"$ref": "#/components/parameters/IdempotencyKey"})
        if HTTPStatus.PRECONDITION_FAILED in rpc.errors:
            made.append({"$ref": "#/components/parameters/IfMatch"})
        return made

    def _parameter(self, field: FieldDescriptor, *, place: str) -> dict[str, Any]:
        return {
            "name": field.name,
            "in": place,
            "required": place == "path" or is_required(field, answer=False),
            "description": self._schemas.description(field),
            "schema": self._schemas.field(field, answer=False),
        }

    def _body(self, rpc: Rpc) -> dict[str, Any]:
        field = rpc.descriptor.input_type.fields_by_name[rpc.body]
        message = field.message_type
        if message is None:
            raise SystemExit(f"The body of {rpc.path} is its field '{rpc.body}': make that field a message.")
        schema = self._schemas.field(field, answer=False)
        example = schema["examples"][0] if "examples" in schema else examples(message, answer=False)[0]
        return {
            "description": self._schemas.description(field),
            "required": any(is_required(part, answer=False) for part in message.fields),
            "content": {"application/json": {"schema": schema, "example": example}},
        }


def tag(rpc: Rpc) -> str:
    """Return the name under which the operations of the RPC's service stand together."""
    return rpc.service.rpartition(".")[2].removesuffix("Service")


def _who(rpc: Rpc) -> str:
    if rpc.access.public:
        return "Takes no credential."
    if rpc.access.login:
        return "Takes a login; a token is refused."
    if rpc.access.authenticated:
        return "Takes any valid token, or a login."
    scopes = ", ".join(f"`{scope}`" for scope in _scopes(rpc))
    return (
        f"Takes a login, or a token with the permission `{rpc.access.permission}`, which is in these scopes: {scopes}."
    )


def _scopes(rpc: Rpc) -> list[str]:
    return [scope for scope in SCOPES if permits(permissions_of(scope), rpc.access.permission)]


def _security(rpc: Rpc) -> list[dict[str, list[str]]]:
    if rpc.access.public:
        return []
    if rpc.access.login:
        return [{"sessionCookie": []}]
    return [{"bearerAuth": []}, {"sessionCookie": []}]
