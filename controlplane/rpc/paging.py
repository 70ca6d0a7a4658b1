"""Pages of a list, oldest first (AIP-158): the token is the last id of the page before."""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Protocol, TypeVar
from urllib.parse import urlencode

from controlplane.errors import BrokenRule, InvalidField
from controlplane.rpc.call import Call

MAX_PAGE = 1000
_ID = re.compile(r"[a-z]+_[0-9a-z]+")


class PageRequest(Protocol):
    """What every List request has."""

    @property
    def page_size(self) -> int:
        """How many to answer with at the most; 0 for as many as there may be."""

    @property
    def page_token(self) -> str:
        """Where the page before ended; empty for the first."""


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


RowT = TypeVar("RowT", bound=_Identified)


def bounds(request: PageRequest) -> dict[str, str | int]:
    """Return the parameters of a List statement: `after` this id, and at most `limit` rows.

    That is one more than the page holds, to know whether there is a next page. Raises InvalidField for a token that
    is none of ours.
    """
    return {"after": _read_token(request.page_token) if request.page_token else "", "limit": _size(request) + 1}


def cut(rows: Sequence[RowT], request: PageRequest, call: Call) -> tuple[Sequence[RowT], str | None]:
    """Return the page, and the next page's token if there is one and the caller is not a REST caller.

    A REST caller gets it as a `Link` header (RFC 8288), because the answer is a bare array.
    """
    size = _size(request)
    if len(rows) <= size:
        return rows, None
    page = rows[:size]
    token = base64.urlsafe_b64encode(page[-1].id.encode()).decode().rstrip("=")
    if not call.rest:
        return page, token
    path = call.metadata["x-envoy-original-path"].partition("?")[0]
    query = urlencode({"page_size": size, "page_token": token})
    call.headers.append(("link", f'<{path}?{query}>; rel="next"'))
    return page, None


def _size(request: PageRequest) -> int:
    return request.page_size or MAX_PAGE


def _read_token(token: str) -> str:
    try:
        last = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        last = ""
    if _ID.fullmatch(last) is None:
        raise InvalidField(
            BrokenRule("page_token", "is not one that a list has answered with: leave it out to begin again")
        )
    return last
