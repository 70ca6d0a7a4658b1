"""What the edge refuses by itself: always JSON in our form, never past the edge."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from controlplane.rpc.contract import rpcs
from tests.edge.conftest import Edge
from tests.edge.upstream import Upstream

DATABASES = "/api/portal/databases"
POST = b"POST /api/portal/databases HTTP/1.1\r\nhost: a\r\n"
JSON = {"content-type": "application/json"}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error after checking its form."""
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()
    if "x-request-id" in answer.headers:
        assert error["request_id"] == answer.headers["x-request-id"]
    assert set(error) - {"request_id"} == {"error", "code"}
    assert len(error["error"]) > 10
    assert not [name for name in answer.headers if name.startswith(("grpc-", "x-envoy-"))]
    return error


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"name', "byte 7"),
        (b'{"name": "a"', "byte 13"),
        (b'{"name": "a",}', "byte 14"),
        (b"{'name': 'a'}", "byte 2"),
        (b"{name: 1}", "byte 2"),
        (b'{"name": "a"} x', "byte 15"),
        (b'{"name": "a"}{}', "byte 14"),
        (b'{"name": nul}', "byte 10"),
        (b'{"name": "a\nb"}', "byte 12"),
        (b'{"name": "\\x"}', "byte 11"),
        (b'{"name": "\\ud800"}', "surrogate"),
        (b'{"name": "\xff"}', "UTF-8"),
        (b"\xef\xbb\xbf{}", "object"),
        (b" ", "object"),
        (b"null", "object"),
        (b"[]", "object"),
        (b'"x"', "object"),
        (b'{"name": 5}', "name"),
        (b'{"name": ["a"]}', "list"),
        (b'{"tags": {"a": 1}}', "tags"),
        (b'{"nme": "a"}', "'nme'"),
        (b'{"deletionProtection": true}', "'deletionProtection'"),
        (b'{"<script>": 1}', "a key"),
        (b'{"name": "a", "name": "b"}', "'name' twice"),
        (b'{"name": "a", "n\\u0061me": "b"}', "'name' twice"),
        (b'{"tags": {"a": "1", "a": "2"}}', "'a' twice"),
        (b'{"name": ' + b"[" * 17 + b"]" * 17 + b"}", "deep"),
        (b'{"tags": ' + b'{"a":' * 9000 + b"1" + b"}" * 9000 + b"}", "deep"),
        (b'{"name": ' + b"[" * 60000, "deep"),
    ],
)
async def test_a_bad_body_is_400(body: bytes, words: str, edge: Edge, upstream: Upstream) -> None:
    """A body that is not the JSON of this route is refused, and the sentence says where it is wrong."""
    answer = await edge.http.post(DATABASES, content=body, headers=JSON)
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "invalid_request")
    assert words in error["error"]
    assert not upstream.received


@pytest.mark.parametrize("number", ["1e999", "-1", "1.5", "9" * 400, "4294967296", "1.2.3"])
async def test_a_bad_number_is_400(number: str, edge: Edge, upstream: Upstream) -> None:
    """A number that does not fit its field is refused."""
    body = f'{{"rate_limit_per_minute": {number}}}'
    answer = await edge.http.post("/api/portal/tokens", content=body.encode(), headers=JSON)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_request")
    assert not upstream.received


async def test_good_json_of_any_shape_passes(edge: Edge, upstream: Upstream) -> None:
    """Escapes, spaces, nesting and any keys where any may be are no reason to refuse."""
    body = ' {\t"tags" : {"a\\/b": null, "c": [1, -2.5e3, true, false, {"d": "\\u00fc\\n"}, [], {}]}\r\n} '
    answer = await edge.http.patch(f"{DATABASES}/a", content=body.encode(), headers=JSON)
    assert answer.status_code == 200, answer.text
    assert upstream.received[0].request.database.tags["c"][4]["d"] == "ü\n"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (f"{DATABASES}?bogus=1", "bogus"),
        (f"{DATABASES}?page_size=x", "page_size"),
        (f"{DATABASES}?page_size=99999999999", "page_size"),
        (f"{DATABASES}?page_token=%ff", "UTF-8"),
        (f"{DATABASES}?page_token=%c0%af", "UTF-8"),
        (f"{DATABASES}?page_token=%ed%a0%80", "UTF-8"),
        (f"{DATABASES}/%ff", "UTF-8"),
        (f"{DATABASES}/%e2%82", "UTF-8"),
        (f"{DATABASES}/a%zz", "UTF-8"),
        (f"{DATABASES}/a?name=b", "'name'"),
        (f"{DATABASES}/a?x=1&name=b", "'name'"),
        (f"{DATABASES}/a?n%61me=b", "names of query parameters"),
        (f"{DATABASES}/a/backups/b?id=c", "'id'"),
        (f"{DATABASES}/a%2fb", "slashes"),
        (f"{DATABASES}/..%2f..%2fetc", "slashes"),
        (f"{DATABASES}/a%5cb", "slashes"),
        (f"{DATABASES}/a%00b", "control"),
    ],
)
async def test_a_bad_path_or_query_is_400(path: str, words: str, edge: Edge, upstream: Upstream) -> None:
    """A path or query that cannot be read, or that says one thing twice, is refused."""
    answer = await edge.http.get(httpx.URL(str(edge.http.base_url).rstrip("/") + path))
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["code"] == "invalid_request"
    assert words in error["error"]
    assert not upstream.received


async def test_other_scripts_and_tokens_pass_in_path_and_query(edge: Edge, upstream: Upstream) -> None:
    """UTF-8 of two, three and four bytes passes, as do escaped signs in a value."""
    answer = await edge.http.get(f"{DATABASES}/%c3%bc%E2%82%AC%F0%9F%98%80")
    assert answer.status_code == 200
    assert upstream.received[0].request.name == "ü€😀"
    answer = await edge.http.get(f"{DATABASES}?page_token=a%2Fb%26c%3D+d")
    assert upstream.received[1].request.page_token == "a/b&c= d"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nope",
        "/api",
        "/api/nope",
        "/api/portal/databases//backups",
        "/api/portal/databases/a/b/c",
        "/controlplane.api.v1.DatabaseService/ListDatabases",
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/metrics",
        "/quitquitquit",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_unknown_path_is_404(method: str, path: str, edge: Edge, upstream: Upstream) -> None:
    """What is not in the contract is not there, and JSON to a gRPC path is no back door."""
    answer = await edge.http.request(method, path, json={})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")
    assert not upstream.received


@pytest.mark.parametrize("route", sorted({rpc.route for rpc in rpcs().values()}))
async def test_a_method_that_a_path_lacks_is_405(route: str, edge: Edge, upstream: Upstream) -> None:
    """A known path names the methods that it has in Allow; HEAD and OPTIONS are not among them."""
    allowed = sorted(rpc.verb for rpc in rpcs().values() if rpc.route == route)
    path = route.replace("{name}", "a").replace("{id}", "b")
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        if method not in allowed:
            answer = await edge.http.request(method, f"{path}?x=1")
            assert (answer.status_code, error_of(answer)["code"]) == (405, "method_not_allowed")
            assert answer.headers.get_list("allow") == [", ".join(allowed)]
    head = await edge.http.head(path)
    assert (head.status_code, head.content, head.headers["allow"]) == (405, b"", ", ".join(allowed))
    assert not upstream.received


@pytest.mark.parametrize("media", ["application/x-www-form-urlencoded", "text/plain", "application/jsonp", ""])
@pytest.mark.parametrize("method", ["POST", "PATCH"])
async def test_a_body_that_is_not_json_is_415(method: str, media: str, edge: Edge, upstream: Upstream) -> None:
    """Only application/json is read, so that a form on another site cannot write."""
    path = DATABASES if method == "POST" else f"{DATABASES}/a"
    answer = await edge.http.request(method, path, content=b'{"name":"a"}', headers={"content-type": media})
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_media_type")
    assert not upstream.received


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_body_that_is_too_large_is_413(method: str, edge: Edge, upstream: Upstream) -> None:
    """A body over the limit is refused, with its length announced or not, also where none is expected."""
    body = b'{"name": "' + b"a" * edge.settings.max_body_bytes + b'"}'

    async def chunks() -> Any:
        yield body[:1000]
        yield body[1000:]

    for content in (body, chunks()):
        answer = await edge.http.request(method, DATABASES, content=content, headers=JSON)
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (413, "too_large")
        assert str(edge.settings.max_body_bytes) in error["error"]
    assert not upstream.received


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"x-big": "a" * 20000}, 431, "headers_too_large"),
        ({f"h{number}": "x" for number in range(80)}, 431, "headers_too_large"),
        ({"a_b": "1"}, 400, "invalid_request"),
    ],
    ids=["size", "count", "underscore"],
)
async def test_bad_headers_are_refused(
    headers: dict[str, str], status: int, code: str, edge: Edge, upstream: Upstream
) -> None:
    """Headers that are too large, too many or ambiguous are refused."""
    answer = await edge.http.get(DATABASES, headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    assert not upstream.received


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GARBAGE\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: a\x01b\r\n\r\n", 400, "invalid_request"),
        (b"GET /api/portal/databases/\xff HTTP/1.1\r\nhost: a\r\n\r\n", 400, "invalid_request"),
        (
            POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            "invalid_request",
        ),
        (b"GET / HTTP/1.1\r\nhost: a\r\n", 408, "timeout"),
        (
            POST + b"content-type: application/json\r\ncontent-length: 50\r\n\r\n{",
            408,
            "timeout",
        ),
    ],
    ids=["garbage", "control", "bytes", "smuggling", "slow-headers", "slow-body"],
)
async def test_bad_http_is_refused(sent: bytes, status: int, code: str, edge: Edge, upstream: Upstream) -> None:
    """What is no HTTP, or comes too slowly, gets an error in our form before the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.settings.http_port)
    writer.write(sent)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    error = json.loads(await reader.readexactly(length))
    writer.close()
    assert head.startswith(f"http/1.1 {status} ")
    assert "content-type: application/json" in head
    assert error["code"] == code
    assert not upstream.received
