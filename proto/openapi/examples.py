"""Examples of whole messages, put together from the examples of their fields."""

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from rules import example_of, is_required, map_value, rules_of

from controlplane.api.buf.validate import validate_pb2

_TIMESTAMP = "2026-01-31T12:00:00Z"
# The examples show things that are settled, which wait for nothing.
_NOT_SHOWN = "progress"


def examples(message: Descriptor, *, answer: bool) -> list[dict[str, Any]]:
    """Return one answer, or a request with only what is required and one with everything that has an example."""
    least: dict[str, Any] = {}
    most: dict[str, Any] = {}
    for field in message.fields:
        value = _known(field, answer=answer)
        if is_required(field, answer=answer):
            least[field.name] = most[field.name] = _placeholder(field) if value is None else value
        elif value is not None and field.name != _NOT_SHOWN:
            most[field.name] = value
    return [most] if answer or not least or least == most else [least, most]


def _known(field: FieldDescriptor, *, answer: bool) -> Any:
    """Return the example that the contract gives of the field, else None."""
    rules = rules_of(field)
    entry = map_value(field)
    if entry is not None:
        key, value = example_of(rules.map.keys), _value(entry, rules.map.values, answer=answer)
        return None if key is None or value is None else {key: value}
    if field.is_repeated:
        item = _value(field, rules.repeated.items, answer=answer)
        return None if item is None else [item]
    return _value(field, rules, answer=answer)


def _value(field: FieldDescriptor, rules: validate_pb2.FieldRules, *, answer: bool) -> Any:
    message = field.message_type
    if message is None or message.file.package == "google.protobuf":
        return example_of(rules)
    return examples(message, answer=answer)[0]


def _placeholder(field: FieldDescriptor) -> Any:
    """Return something of the field's type, so that the example is valid at least."""
    if field.is_repeated:
        return [] if map_value(field) is None else {}
    if field.message_type is not None:
        return _TIMESTAMP if field.message_type.name == "Timestamp" else None
    return field.name.upper() if field.type == FieldDescriptor.TYPE_STRING else field.default_value
