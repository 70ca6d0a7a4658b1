"""Pages of a list, oldest first (AIP-158): the token is the last id, or number, of the page before."""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable
from urllib.parse import parse_qsl, urlencode

from controlplane.errors import BrokenRule, InvalidField
from controlplane.rpc.call import Call

MAX_PAGE = 1000
_ID = re.compile(r"[a-z]+_[0-9a-z]+")
_NUMBER = re.compile(r"[0-9]{1,9}")


class PageRequest(Protocol):
    """What every List request has."""

    @property
    def page_size(self) -> int:
        """How many to answer with at the most; 0 for as many as there may be."""

    @property
    def page_token(self) -> str:
        """Where the page before ended; empty for the first."""


@runtime_checkable
class _Identified(Protocol):
    @property
    def id(self) -> str: ...


class _Numbered(Protocol):
    @property
    def sequence(self) -> int: ...


RowT = TypeVar("RowT", bound=_Identified | _Numbered)


def bounds(request: PageRequest) -> dict[str, str | int]:
    """Return the parameters of a List statement: `after` this id, and at most `limit` rows.

    That is one more than the page holds, to know whether there is a next page. Raises InvalidField for a token that
    is none of ours.
    """
    return {"after": _read_token(request.page_token, _ID) if request.page_token else "", "limit": _size(request) + 1}


def bounds_by_number(request: PageRequest) -> tuple[int, int]:
    """Return the same of a list whose rows are numbered: after this number, and at most so many."""
    return int(_read_token(request.page_token, _NUMBER)) if request.page_token else 0, _size(request) + 1


def cut(rows: Sequence[RowT], request: PageRequest, call: Call) -> tuple[Sequence[RowT], str | None]:
    """Return the page, and the next page's token if there is one and the caller is not a REST caller.

    A REST caller gets it as a `Link` header (RFC 8288), because the answer is a bare array.
    """
    size = _size(request)
    if len(rows) <= size:
        return rows, None
    page = rows[:size]
    last = page[-1]
    place = last.id if isinstance(last, _Identified) else str(last.sequence)
    token = base64.urlsafe_b64encode(place.encode()).decode().rstrip("=")
    if not call.rest:
        return page, token
    path, _, asked = call.metadata["x-envoy-original-path"].partition("?")
    # The next page is one of the same list: whatever else was asked, such as a filter, is asked again.
    others = [(name, value) for name, value in parse_qsl(asked) if name not in {"page_size", "page_token"}]
    query = urlencode([*others, ("page_size", size), ("page_token", token)])
    call.headers.append(("link", f'<{path}?{query}>; rel="next"'))
    return page, None


def link_on(call: Call, *, after: int, **asked: int) -> None:
    """Give a REST caller the address of what comes after a place in a list that can be followed, as `Link`."""
    path = call.metadata["x-envoy-original-path"].partition("?")[0]
    query = urlencode({"after": after, **{name: value for name, value in asked.items() if value}})
    call.headers.append(("link", f'<{path}?{query}>; rel="next"'))


def _size(request: PageRequest) -> int:
    return request.page_size or MAX_PAGE


def _read_token(token: str, form: re.Pattern[str]) -> str:
    try:
        last = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        last = ""
    if form.fullmatch(last) is None:
        raise InvalidField(
            BrokenRule("page_token", "is not one that a list has answered with: leave it out to begin again")
        )
    return last
