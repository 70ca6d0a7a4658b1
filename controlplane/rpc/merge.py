"""Maps that a change names in part (RFC 7396)."""

from collections.abc import Mapping

from google.protobuf.struct_pb2 import Struct


def merged(before: Mapping[str, str], change: Struct) -> dict[str, str]:
    """Return a map of strings with a change merged in: null removes one, what is not named stays."""
    after = dict(before)
    for name, value in change.fields.items():
        if value.HasField("null_value"):
            after.pop(name, None)
        else:
            after[name] = value.string_value
    return after
