"""ETags: a resource's id and how often its order has changed, so that a change made on stale knowledge is refused."""

from typing import Protocol

from controlplane.errors import Stale
from controlplane.rpc.call import Call


class _Versioned(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def generation(self) -> int: ...


def show(call: Call, row: _Versioned) -> None:
    """Put the row's ETag into the answer."""
    call.headers.append(("etag", _etag(row)))


def check_match(call: Call, row: _Versioned) -> None:
    """Raise Stale if the caller's `If-Match` names other versions of the resource (RFC 9110, 13.1.1)."""
    wanted = call.metadata.get("if-match")
    if wanted is None or wanted.strip() == "*":
        return
    if _etag(row) not in {part.strip() for part in wanted.split(",")}:
        raise Stale(_etag(row))


def _etag(row: _Versioned) -> str:
    return f'"{row.id}.{row.generation}"'
