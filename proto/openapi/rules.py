"""The field rules (`buf.validate`) as JSON Schema says them."""

import base64
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from controlplane.api.buf.validate import validate_pb2

_KEYWORDS = {
    "min_len": "minLength",
    "max_len": "maxLength",
    "pattern": "pattern",
    "in": "enum",
    "gte": "minimum",
    "lte": "maximum",
    "max_items": "maxItems",
    "max_pairs": "maxProperties",
}
_ELSEWHERE = {"items", "keys", "values"}  # rules of a list's or a map's parts
# Errors that the edge makes by itself have no list of fields, not even an empty one; and what it cannot even read as
# HTTP has no id.
_LEFT_OUT = {"controlplane.api.v1.Error.fields", "controlplane.api.v1.Error.request_id"}


def rules_of(field: FieldDescriptor) -> validate_pb2.FieldRules:
    """Return the field's rules, empty ones if it has none."""
    return field.GetOptions().Extensions[validate_pb2.field]


def keywords(rules: validate_pb2.FieldRules) -> dict[str, Any]:
    """Return the rules of a value as keywords.

    A rule that has no keyword here stops the program, or the document would promise less than the server demands.
    """
    made: dict[str, Any] = {}
    for rule, value in _typed(rules):
        if rule.name == "example":
            made["examples"] = [_in_json(each) for each in value]
        elif rule.name in _KEYWORDS:
            keyword = _KEYWORDS[rule.name]
            made[keyword] = list(value) if rule.is_repeated else value
            if rules.HasField("bytes"):  # JSON has them in base64: three of them are four letters
                made[keyword] = -(-value // 3) * 4
        elif rule.name not in _ELSEWHERE:
            raise SystemExit(f"The document does not know the rule {rule.full_name}: add it to proto/openapi/rules.py.")
    if "enum" in made:
        made["examples"] = made["enum"]
    return made


def example_of(rules: validate_pb2.FieldRules) -> Any:
    """Return the first example that the rules give, else None."""
    return next((_in_json(value[0]) for rule, value in _typed(rules) if rule.name == "example"), None)


def map_value(field: FieldDescriptor) -> FieldDescriptor | None:
    """Return the descriptor of a map's values, else None; to the descriptors, a map is a list of entries."""
    entry = field.message_type
    return entry.fields_by_name["value"] if entry is not None and entry.GetOptions().map_entry else None


def is_required(field: FieldDescriptor, *, answer: bool) -> bool:
    """Tell whether the JSON always has the field.

    A request must have what the rules require; an answer has everything that is not marked `optional`, also when empty.
    """
    if answer:
        return field.containing_oneof is None and field.full_name not in _LEFT_OUT
    return rules_of(field).required


def _in_json(example: Any) -> Any:
    return base64.b64encode(example).decode() if isinstance(example, bytes) else example


def _typed(rules: validate_pb2.FieldRules) -> list[tuple[FieldDescriptor, Any]]:
    kind = rules.WhichOneof("type")
    return getattr(rules, kind).ListFields() if kind else []
