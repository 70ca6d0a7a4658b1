"""A list as a REST caller gets it: a bare JSON array, which no message can be.

The edge's descriptors say that a List RPC answers with `google.api.HttpBody` (see `proto/generate.py`), whose bytes it
hands on as they are. A native caller gets the list message. So it is one RPC still, and Envoy neither transcodes twenty
rows nor cuts the array out of its wrapper, which together cost it as much as everything else.
"""

import json
from typing import Any

from google.api.httpbody_pb2 import HttpBody
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message


def bare_list(response: Message, field: str) -> HttpBody:
    """Return the items in this field of a list answer as the edge prints messages: every field without presence too."""
    items = [_in_order(item) for item in getattr(response, field)]
    text = json.dumps(items, separators=(",", ":"), ensure_ascii=False)
    return HttpBody(content_type="application/json", data=text.encode())


def _in_order(item: Message) -> dict[str, Any]:
    """Return the item with its fields in the order of the proto, where the library puts defaults last.

    A double that is a whole number is printed as one, as Envoy does it.
    """
    printed = MessageToDict(item, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return {field.name: _whole(printed[field.name]) for field in item.DESCRIPTOR.fields if field.name in printed}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
