"""Requests become events and what handlers return becomes answers, as AWS Lambda's function URLs have them."""

import base64
import json
from typing import Any

import httpx
import pytest

from tests.functions.host.control import ACCOUNT, Control


async def test_a_request_becomes_an_event(client: httpx.AsyncClient, echo: str) -> None:
    """The event has the method, path, query, headers, cookies and body as function URLs have them."""
    answer = await client.put(
        f"{echo}/a/b%20c?x=1&y=%C3%A4&x=2&z",
        headers=[
            ("content-type", "application/json; charset=utf-8"),
            ("x-one", "1"),
            ("X-One", "2"),
            ("cookie", "a=1; b=2"),
            ("user-agent", "tests"),
            ("x-request-id", "11111111-2222-3333-4444-555555555555"),
            ("x-htx-client-ip", "203.0.113.7"),
            ("x-htx-anything", "no"),
            ("x-envoy-attempt-count", "1"),
        ],
        content='{"a": "ä"}',
    )
    returned = answer.json()
    event = returned["event"]
    context = event.pop("requestContext")
    headers = event.pop("headers")
    assert event == {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": "/a/b%20c",
        "rawQueryString": "x=1&y=%C3%A4&x=2&z",
        "cookies": ["a=1", "b=2"],
        "queryStringParameters": {"x": "1,2", "y": "ä", "z": ""},
        "body": '{"a": "ä"}',
        "isBase64Encoded": False,
    }
    assert headers["x-one"] == "1,2"
    assert headers["host"] == "functions.example.com"
    assert not [name for name in headers if name.startswith(("x-htx-", "x-envoy-", "connection", "cookie"))]
    assert context.pop("time").endswith("+0000")
    assert context.pop("timeEpoch") > 1_600_000_000_000
    assert context.pop("apiId").startswith("fn_")
    assert context == {
        "accountId": ACCOUNT,
        "domainName": "functions.example.com",
        "domainPrefix": "functions",
        "http": {
            "method": "PUT",
            "path": "/a/b%20c",
            "protocol": "HTTP/1.1",
            "sourceIp": "203.0.113.7",
            "userAgent": "tests",
        },
        "requestId": "11111111-2222-3333-4444-555555555555",
        "routeKey": "$default",
        "stage": "$default",
    }
    assert returned["request_id"] == "11111111-2222-3333-4444-555555555555"


async def test_an_event_of_nothing(client: httpx.AsyncClient, echo: str) -> None:
    """Without a path, a query, cookies and a body, the path is `/` and the others are absent."""
    event = (await client.get(echo)).json()["event"]
    assert (event["rawPath"], event["rawQueryString"], event["isBase64Encoded"]) == ("/", "", False)
    assert not {"cookies", "queryStringParameters", "body"} & event.keys()


@pytest.mark.parametrize(
    "content_type", ["application/octet-stream", "application/x-www-form-urlencoded", "text/plain"]
)
async def test_a_body_that_is_no_text_comes_as_base64(client: httpx.AsyncClient, echo: str, content_type: str) -> None:
    """Bytes that their type does not call text, or that are none, come as base64."""
    body = b"\xff\x00a=b"
    event = (await client.post(echo, content=body, headers={"content-type": content_type})).json()["event"]
    assert event["isBase64Encoded"]
    assert base64.b64decode(event["body"]) == body


async def test_the_portals_cookies_stay_ours(client: httpx.AsyncClient, echo: str) -> None:
    """A function sees no cookie of the portal's, under whose name it may answer."""
    headers = {"cookie": "__Host-htx_session=secret; a=1; __Host-htx_oidc=secret"}
    event = (await client.get(echo, headers=headers)).json()["event"]
    assert event["cookies"] == ["a=1"]
    assert "secret" not in json.dumps(event)


async def test_an_answer_has_status_headers_cookies_and_body(does: Any) -> None:
    """A dict with a `statusCode` is the HTTP answer."""
    answer = await does(
        "{'statusCode': 418, 'headers': {'X-Number': 7, 'content-type': 'text/plain', 'Content-Length': '9999'},"
        " 'cookies': ['a=1; Path=/', 'b=2'], 'body': 'ä'}"
    )
    assert (answer.status_code, answer.text) == (418, "ä")
    assert answer.headers["x-number"] == "7"
    assert answer.headers["content-type"] == "text/plain"
    assert answer.headers.get_list("set-cookie") == ["a=1; Path=/", "b=2"]
    assert answer.headers.get_list("content-length") == ["2"]


async def test_an_answer_of_bytes(does: Any) -> None:
    """A body in base64 is sent as the bytes that it stands for."""
    answer = await does("{'statusCode': 200, 'isBase64Encoded': True, 'body': '/wA='}")
    assert answer.content == b"\xff\x00"


@pytest.mark.parametrize(
    "returned", ["{'a': [1, 'ä', None]}", "'a string'", "None", "[1]", "{'a': {'statusCode': 500}}"]
)
async def test_anything_else_is_a_200_with_its_json(does: Any, returned: str) -> None:
    """What has no `statusCode` is sent as JSON."""
    answer = await does(returned)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == eval(returned)  # noqa: S307 - our own


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        ("{'statusCode': 99}", "`statusCode` must be a number from 200 to 599"),
        ("{'statusCode': 101}", "`statusCode` must be a number from 200 to 599"),
        ("{'statusCode': 600}", "`statusCode` must be a number from 200 to 599"),
        ("{'statusCode': '200'}", "`statusCode` must be a number from 200 to 599"),
        ("{'statusCode': True}", "`statusCode` must be a number from 200 to 599"),
        ("{'statusCode': 200, 'headers': {'a': 'b\\r\\nc: d'}}", "the header `a` has a line break"),
        ("{'statusCode': 200, 'headers': {'a\\r\\nb': 'c'}}", "cannot be the name of a header"),
        ("{'statusCode': 200, 'headers': {'a': 'snow \u2603'}}", "the header `a` has"),
        ("{'statusCode': 200, 'headers': {'a': ['b']}}", "the header `a` must be a string"),
        ("{'statusCode': 200, 'headers': ['a']}", "`headers` must be an object"),
        ("{'statusCode': 200, 'headers': {'Transfer-Encoding': 'chunked'}}", "is not the function's to set"),
        ("{'statusCode': 200, 'headers': {'Connection': 'close'}}", "is not the function's to set"),
        ("{'statusCode': 200, 'cookies': ['a=1\\nb: c']}", "the header `set-cookie` has a line break"),
        ("{'statusCode': 200, 'cookies': ['__Host-htx_session=mine']}", "are the portal's"),
        ("{'statusCode': 200, 'headers': {'Set-Cookie': ' __Host-htx_session=mine'}}", "are the portal's"),
        ("{'statusCode': 200, 'cookies': 'a=1'}", "`cookies` must be a list"),
        ("{'statusCode': 200, 'headers': {f'a{n}': 'b' for n in range(65)}}", "more than 64 headers"),
        ("{'statusCode': 200, 'headers': {'a': 'b' * 32768}}", "more than 32768 bytes"),
        ("{'statusCode': 200, 'body': {'a': 1}}", "`body` must be a string"),
        ("{'statusCode': 200, 'isBase64Encoded': True, 'body': '!'}", "`body` is not what"),
    ],
)
async def test_a_malformed_answer_is_a_502(does: Any, control: Control, returned: str, why: str) -> None:
    """What is no HTTP answer is never passed on; the caller gets a code, and the log says why."""
    answer = await does(returned)
    assert (answer.status_code, answer.json()["code"]) == (502, "function_bad_answer")
    assert "statusCode" not in answer.text
    request_id = answer.json()["request_id"]
    line = await control.line(lambda line: line.request_id == request_id and line.stream == "request")
    assert line.outcome == "bad_answer"
    assert why in line.text


async def test_headers_that_the_edge_would_act_upon_are_dropped(does: Any) -> None:
    """A function cannot speak to the edge by its answer's headers."""
    answer = await does(
        "{'statusCode': 200, 'headers': {'x-envoy-immediate-health-check-fail': '1', 'X-Htx-A': '1',"
        " 'x-http-status': '500', 'x-b': '1'}}"
    )
    assert answer.headers["x-b"] == "1"
    assert not [name for name in answer.headers if name.startswith(("x-envoy", "x-htx", "x-http"))]


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_without_a_body(does: Any, status: int) -> None:
    """A 204 or 304 has no body, whatever the handler returned, and its connection is used for the next call."""
    answer = await does(f"{{'statusCode': {status}, 'body': 'too much'}}")
    assert (answer.status_code, answer.content) == (status, b"")
    after = await does("1")
    used = [one.extensions["network_stream"].get_extra_info("socket").fileno() for one in (answer, after)]
    assert (after.json(), used[0] >= 0) == (1, True)
    assert used[0] == used[1]


async def test_head_has_the_headers_alone(does: Any) -> None:
    """HEAD is answered as the function does, without the body."""
    answer = await does("{'statusCode': 200, 'body': 'abc'}", method="HEAD")
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "3", b"")
