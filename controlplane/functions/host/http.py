"""HTTP requests as events and what handlers return as HTTP answers: AWS Lambda's format of function URLs, version 2.0.

https://docs.aws.amazon.com/lambda/latest/dg/urls-invocation.html says what it is like. As there, `cookies`,
`queryStringParameters` and `body` are absent where there is nothing.
"""

import base64
import binascii
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

Headers = Sequence[tuple[bytes, bytes]]

# What is between the edge and us (x-htx-, x-envoy-), and what the two say about their connection (RFC 9110, 7.6.1).
_OURS = ("x-htx-", "x-envoy-", "x-http-status")
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# The portal's own cookies: `__Host-htx_session` and those beside it. Never a function's to read or to set.
_OUR_COOKIES = "__Host-htx_"
_TEXT = re.compile(r"text/.*|application/(.+\+)?(json|xml)|application/(javascript|x-javascript|ecmascript)")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_LEAST_STATUS, _MOST_STATUS = 200, 599  # what is below 200 is no answer yet
_WITHOUT_BODY = {204, 304}
# What the edge would not take, and would cut the connection for (Envoy: 100, and 60 KiB).
_MOST_HEADERS = 64
_LARGEST_HEADERS = 32 * 1024


class BadAnswer(Exception):
    """What the handler returned is no HTTP answer; the message says why, for the customer."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request for a function; `path` and `query` are as they came, below the function's own address."""

    function_id: str
    account_id: str
    method: str
    path: str
    query: str
    protocol: str
    headers: Headers
    client_ip: str
    request_id: str


@dataclass(slots=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: bytes
    headers: list[tuple[str, str]] = field(default_factory=list)


def event_of(request: Request, body: bytes, *, without: Iterable[str] = ()) -> bytes:
    """Return the event of a request, as JSON; `without` names headers that are not the function's business."""
    headers, cookies = _read_headers(request.headers, frozenset(without))
    now = time.time()
    host = headers.get("host", "")
    event: dict[str, Any] = {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": request.path,
        "rawQueryString": request.query,
        "headers": headers,
        "requestContext": {
            "accountId": request.account_id,
            "apiId": request.function_id,
            "domainName": host,
            "domainPrefix": host.partition(".")[0],
            "http": {
                "method": request.method,
                "path": request.path,
                "protocol": request.protocol,
                "sourceIp": request.client_ip,
                "userAgent": headers.get("user-agent", ""),
            },
            "requestId": request.request_id,
            "routeKey": "$default",
            "stage": "$default",
            "time": time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(now)),
            "timeEpoch": int(now * 1000),
        },
        "isBase64Encoded": False,
    }
    if cookies:
        event["cookies"] = cookies
    if request.query:
        event["queryStringParameters"] = _joined(parse_qsl(request.query, keep_blank_values=True))
    if body:
        text = _text(body, headers.get("content-type", ""))
        event["isBase64Encoded"] = text is None
        event["body"] = base64.b64encode(body).decode() if text is None else text
    return json.dumps(event, ensure_ascii=False).encode()


def answer_of(payload: bytes) -> Answer:
    """Return what a handler's JSON says as an HTTP answer.

    An object with a `statusCode` is one, and anything else a 200 with that JSON. Raises BadAnswer.
    """
    # Most of what is large is no such object, and need not be read.
    if not payload.startswith(b"{") or b'"statusCode"' not in payload:
        return _json(payload)
    try:
        returned = json.loads(payload)
    except (ValueError, RecursionError):
        raise BadAnswer("what it returned cannot be read as JSON") from None
    if "statusCode" not in returned:
        return _json(payload)
    status = returned["statusCode"]
    if type(status) is not int or not _LEAST_STATUS <= status <= _MOST_STATUS:
        raise BadAnswer(f"`statusCode` must be a number from {_LEAST_STATUS} to {_MOST_STATUS}")
    headers = [*_written_headers(returned.get("headers") or {}), *_written_cookies(returned.get("cookies") or [])]
    if len(headers) > _MOST_HEADERS or sum(len(name) + len(value) for name, value in headers) > _LARGEST_HEADERS:
        raise BadAnswer(f"it has more than {_MOST_HEADERS} headers, or more than {_LARGEST_HEADERS} bytes of them")
    body = _body(returned.get("body"), is_base64=returned.get("isBase64Encoded") is True)
    if status in _WITHOUT_BODY:
        return Answer(status, b"", headers)
    if all(name.lower() != "content-type" for name, _ in headers):
        headers.append(("content-type", "application/json"))
    return Answer(status, body, headers)


def is_json(payload: bytes) -> bool:
    """Tell whether this is JSON (RFC 8259): a function that is out to cheat can answer with anything."""
    try:
        json.loads(payload.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_headers(given: Headers, without: frozenset[str]) -> tuple[dict[str, str], list[str]]:
    """Return the headers that a function may see, and the cookies."""
    headers, cookies = [], []
    for raw_name, raw_value in given:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("utf-8", "replace")
        if name == "cookie":
            pairs = (pair.strip() for pair in value.split(";"))
            cookies += [pair for pair in pairs if pair and not pair.startswith(_OUR_COOKIES)]
        elif not name.startswith(_OURS) and name not in _HOP_BY_HOP and name not in without:
            headers.append((name, value))
    return _joined(headers), cookies


def _joined(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return pairs as an object, in which what comes several times is joined by commas."""
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return {name: ",".join(values) for name, values in found.items()}


def _text(body: bytes, content_type: str) -> str | None:
    """Return a body that is text, as its type says; else None, and it goes as base64."""
    if _TEXT.fullmatch(content_type.partition(";")[0].strip().lower()) is None:
        return None
    try:
        return body.decode()
    except UnicodeDecodeError:
        return None


def _json(payload: bytes) -> Answer:
    return Answer(200, payload, [("content-type", "application/json")])


def _written_headers(given: Any) -> list[tuple[str, str]]:
    if not isinstance(given, Mapping):
        raise BadAnswer("`headers` must be an object")
    headers = []
    for name, value in given.items():
        if not _HEADER_NAME.fullmatch(name):
            raise BadAnswer(f"{name[:64]!r} cannot be the name of a header")
        if name.lower() in _HOP_BY_HOP:
            raise BadAnswer(f"the header `{name}` is not the function's to set")
        # The length is that of what we send; the others would mean something to the edge.
        if name.lower() != "content-length" and not name.lower().startswith(_OURS):
            headers.append((name, _header_value(name, value)))
    return headers


def _written_cookies(given: Any) -> list[tuple[str, str]]:
    if not isinstance(given, list):
        raise BadAnswer("`cookies` must be a list")
    return [("set-cookie", _header_value("set-cookie", cookie)) for cookie in given]


def _header_value(name: str, value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise BadAnswer(f"the header `{name}` must be a string")
    text = value if isinstance(value, str) else json.dumps(value)
    if not _HEADER_VALUE.fullmatch(text):
        raise BadAnswer(f"the header `{name}` has a line break, or a character that no header can have")
    if name.lower() == "set-cookie" and text.lstrip("= \t").startswith(_OUR_COOKIES):
        raise BadAnswer(f"cookies whose names begin with `{_OUR_COOKIES}` are the portal's")
    return text


def _body(given: Any, *, is_base64: bool) -> bytes:
    if given is None:
        return b""
    if not isinstance(given, str):
        raise BadAnswer("`body` must be a string: turn an object into JSON first")
    try:
        return base64.b64decode(given, validate=True) if is_base64 else given.encode()
    except (binascii.Error, ValueError):
        raise BadAnswer("`body` is not what `isBase64Encoded` says that it is") from None
