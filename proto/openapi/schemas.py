"""JSON Schemas of the contract's messages: type, rules and prose of each field, and examples."""

from typing import Any

from comments import Comments
from examples import examples
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from rules import is_required, keywords, map_value, rules_of

from controlplane.api.buf.validate import validate_pb2

# What JSON shows. 64-bit integers are missing on purpose: it would show them as strings, so the contract has none.
_SCALARS: dict[int, dict[str, Any]] = {
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.TYPE_UINT32: {"type": "integer", "format": "uint32", "minimum": 0},
    FieldDescriptor.TYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "format": "byte"},
}
# The contract uses Value for a string that may be null, ListValue for strings that may be absent as a whole, and Struct
# for tags to set or, as null, to remove.
_WELL_KNOWN: dict[str, dict[str, Any]] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Value": {"type": ["string", "null"]},
    "google.protobuf.ListValue": {"type": "array", "items": {"type": "string"}},
    "google.protobuf.Struct": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
}


# Where it is a Value although only a list will do: a ListValue would take {} for an empty one.
_LISTS = {"controlplane.api.v1.UpdateToken.allowed_ips", "controlplane.api.v1.UpdateProxy.allowed_ips"}
# Where any JSON will do: what goes into a function, and what comes out.
_ANY: dict[str, dict[str, Any]] = {
    "controlplane.api.v1.InvokeFunctionRequest.event": {"type": "object", "examples": [{"name": "world"}]},
    "controlplane.api.v1.Invocation.result": {},
}


class Schemas:
    """The component schemas, collected as the operations refer to them."""

    def __init__(self, *, comments: Comments) -> None:
        self.components: dict[str, dict[str, Any]] = {}
        self._comments = comments

    def refer(self, message: Descriptor, *, answer: bool) -> dict[str, Any]:
        """Return a reference to the message's schema; `answer` tells whether the server writes or reads it."""
        if message.name not in self.components:
            made = self.components[message.name] = {"type": "object"}
            made |= self._describe(message, answer=answer)
        return {"$ref": f"#/components/schemas/{message.name}"}

    def field(self, field: FieldDescriptor, *, answer: bool) -> dict[str, Any]:
        """Return the schema of one field, without its description."""
        rules = rules_of(field)
        entry = map_value(field)
        if entry is not None:
            made = {"type": "object", "additionalProperties": self._value(entry, rules.map.values, answer=answer)}
            if rules.map.HasField("keys"):
                made["propertyNames"] = keywords(rules.map.keys)
            return made | keywords(rules)
        if field.is_repeated:
            items = self._value(field, rules.repeated.items, answer=answer)
            return {"type": "array", "items": items} | keywords(rules)
        # A required string must not be empty, as one without presence is missing then.
        least = {"minLength": 1} if rules.required and field.type == FieldDescriptor.TYPE_STRING else {}
        return least | self._value(field, rules, answer=answer)

    def description(self, field: FieldDescriptor) -> str:
        """Return the field's comment, and in words those of its rules that JSON Schema cannot say."""
        sayings = [f"Rule: {rule.message}." for rule in rules_of(field).cel]
        return "\n\n".join([self._comments[field.full_name], *sayings])

    def _describe(self, message: Descriptor, *, answer: bool) -> dict[str, Any]:
        made: dict[str, Any] = {
            "description": self._comments[message.full_name],
            # The edge refuses what it does not know; an answer may have more one day.
            "additionalProperties": None if answer else False,
            "required": [field.name for field in message.fields if is_required(field, answer=answer)],
            "properties": {
                field.name: self.field(field, answer=answer) | {"description": self.description(field)}
                for field in message.fields
            },
            "examples": examples(message, answer=answer),
        }
        return {key: value for key, value in made.items() if value not in (None, [], {})}

    def _value(self, field: FieldDescriptor, rules: validate_pb2.FieldRules, *, answer: bool) -> dict[str, Any]:
        """Return the schema of the field, or of one item of a list, or one value of a map."""
        message = field.message_type
        if message is None:
            return _SCALARS[field.type] | keywords(rules)
        if field.full_name in _ANY:
            return dict(_ANY[field.full_name])
        if field.full_name in _LISTS:
            return dict(_WELL_KNOWN["google.protobuf.ListValue"])
        if message.full_name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[message.full_name])
        return self.refer(message, answer=answer)
