"""A function's public address, through the real edge, with a real host: who may call it, and what passes."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.stack import Customer, eventually

FUNCTIONS = "/api/portal/functions"
ECHO = """
import json

def handler(event, context):
    if event["rawPath"] == "/page":
        return {
            "statusCode": 202,
            "headers": {
                "content-type": "text/html",
                "content-security-policy": "default-src 'self'",
                "clear-site-data": "*",
                "service-worker-allowed": "/",
                "strict-transport-security": "max-age=1",
                "x-own": "kept",
            },
            "cookies": ["a=b; Path=/"],
            "body": "<script>alert(1)</script>",
        }
    return event
"""

pytestmark = pytest.mark.usefixtures("functions")


async def new_function(customer: Customer, name: str = "echo", **wanted: Any) -> str:
    """Order a function and wait until it is ready; return its address."""
    made = await customer.create(FUNCTIONS, **{"name": name, "runtime": "python3", "source": ECHO, **wanted})
    path: str = made["path"]
    return path


async def anybody(customer: Customer, method: str, path: str, **request: Any) -> httpx.Response:
    """Call without a credential."""
    return await customer.stack.rest.request(method, path, **request)


async def test_a_request_is_an_event(customer: Customer) -> None:
    """Method, path, query, headers and body of a request are what the handler gets, as AWS Lambda has it."""
    path = await new_function(customer, auth="public")
    headers = {"x-own": "yes", "content-type": "text/plain", "user-agent": "me"}
    answer = await anybody(customer, "PUT", f"{path}/a/b?x=1&x=2&y=%20", content="hello", headers=headers)
    assert answer.status_code == 200, answer.text
    event = answer.json()
    assert (event["version"], event["rawPath"], event["rawQueryString"]) == ("2.0", "/a/b", "x=1&x=2&y=%20")
    assert event["queryStringParameters"] == {"x": "1,2", "y": " "}
    assert (event["body"], event["isBase64Encoded"]) == ("hello", False)
    assert event["headers"].items() >= headers.items()
    http = event["requestContext"]["http"]
    assert (http["method"], http["sourceIp"], http["userAgent"]) == ("PUT", "127.0.0.1", "me")
    assert event["requestContext"]["requestId"] == answer.headers["x-request-id"]


async def test_nothing_of_the_portal_passes(customer: Customer) -> None:
    """No cookie and no header of ours reaches a function, and no header of its answer holds for the whole origin."""
    path = await new_function(customer, auth="public")
    sent = {"cookie": customer.cookie, "x-htx-client-ip": "203.0.113.9", "x-envoy-original-path": "/", "x-own": "1"}
    event = (await anybody(customer, "GET", path, headers=sent)).json()
    assert not {"cookie", "x-htx-host", "x-htx-client-ip", "x-envoy-original-path"} & set(event["headers"])
    assert "cookies" not in event
    assert event["requestContext"]["http"]["sourceIp"] == "127.0.0.1"
    page = await anybody(customer, "GET", f"{path}/page")
    assert (page.status_code, page.text, page.headers["x-own"]) == (202, "<script>alert(1)</script>", "kept")
    policies = page.headers.get_list("content-security-policy")
    assert any(policy.startswith("sandbox ") and "allow-same-origin" not in policy for policy in policies), policies
    assert any("default-src" in policy for policy in policies), policies
    lost = {"set-cookie", "clear-site-data", "service-worker-allowed", "strict-transport-security"}
    assert not lost & set(page.headers)


async def test_a_token_is_asked_for(customer: Customer) -> None:
    """By default only a token of the account that may call functions gets in, and the function never sees it."""
    path = await new_function(customer)
    tokens = {
        "nobody": (None, 401),
        "wrong": ("htx_" + "0" * 36, 401),
        "read": ((await customer.new_token(scope="read"))["token"], 403),
        "elsewhere": ((await customer.new_token(allowed_ips=["203.0.113.7"]))["token"], 403),
        "other": ((await customer.stack.customer()).token, 401),
        "own": (customer.token, 200),
        "functions": ((await customer.new_token(scope="functions"))["token"], 200),
        "just this": ((await customer.new_token(permissions=["functions:invoke"]))["token"], 200),
    }
    for name, (token, status) in tokens.items():
        headers = {"authorization": f"Bearer {token}"} if token else {}
        answer = await anybody(customer, "GET", path, headers=headers)
        assert answer.status_code == status, (name, answer.text)
        if status == 200:
            assert "authorization" not in answer.json()["headers"]
            assert answer.headers["ratelimit-limit"]
        else:
            assert set(answer.json()) >= {"error", "code", "request_id"}, name
    assert (await anybody(customer, "GET", path)).headers["www-authenticate"] == "Bearer"
    # A browser's login is no way in: any page could have it call.
    assert (await customer.by_login("GET", path)).status_code == 401


async def test_a_token_ends_at_once(customer: Customer) -> None:
    """From the moment a token is revoked or over its rate, no call by it gets through."""
    path = await new_function(customer)
    slow = await customer.new_token(rate_limit_per_minute=3)
    headers = {"authorization": f"Bearer {slow['token']}"}
    answers = await asyncio.gather(*(anybody(customer, "GET", path, headers=headers) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 5
    limited = next(answer for answer in answers if answer.status_code == 429)
    assert (limited.json()["code"], int(limited.headers["retry-after"]) >= 1) == ("rate_limited", True)
    other = await customer.new_token()
    headers = {"authorization": f"Bearer {other['token']}"}
    assert (await anybody(customer, "GET", path, headers=headers)).status_code == 200
    await customer.by_login("DELETE", f"/api/portal/tokens/{other['id']}")
    assert (await anybody(customer, "GET", path, headers=headers)).status_code == 401


async def test_what_cannot_be_called(customer: Customer) -> None:
    """Unknown functions are 404, a body that is too large is 413 before anything ran, as JSON with a request id."""
    path = await new_function(customer, auth="public")
    for unknown in (f"{path}x", f"/f/ac_none{path[path.rindex('/') :]}", "/f/", "/f/x"):
        answer = await anybody(customer, "GET", unknown)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), unknown
    large = await anybody(customer, "POST", path, content=b"x" * (6 * 1024 * 1024 + 1))
    assert (large.status_code, large.json()["code"]) == (413, "too_large")
    assert large.json()["request_id"] == large.headers["x-request-id"]


async def test_the_owner_calls(customer: Customer) -> None:
    """The owner gets what the handler returned, or what it raised and where, and how long it took."""
    source = "def handler(event, context):\n    return {'doubled': event['n'] * 2, 'name': context.function_name}\n"
    await new_function(customer, "double", source=source, memory_mb=64)
    done = (await customer.call("POST", f"{FUNCTIONS}/double/invoke", json={"n": 21})).json()
    assert (done["status"], done["result"]) == ("succeeded", {"doubled": 42, "name": "double"})
    assert (done["version"], done["duration_ms"] > 0, 0 < done["memory_mb"] < 64) == (1, True, True)
    failed = (await customer.call("POST", f"{FUNCTIONS}/double/invoke", json={})).json()
    assert (failed["status"], failed["error"]) == ("failed", "KeyError: 'n'")
    assert "main.py" in failed["trace"]
    stranger = await customer.stack.customer()
    assert (await stranger.call("POST", f"{FUNCTIONS}/double/invoke", json={})).status_code == 404


async def test_a_large_event_comes_back(customer: Customer) -> None:
    """An event of several megabytes goes there and back; one beyond 6 MiB is 413."""
    await new_function(customer, "echo-event", source="def handler(event, context):\n    return event\n")
    event = {"text": "x" * 4_000_000, "n": 1.5, "list": [None, True, "é"]}
    answer = await customer.call("POST", f"{FUNCTIONS}/echo-event/invoke", json=event)
    assert answer.status_code == 200, answer.text[:200]
    assert answer.json()["result"] == event
    answer = await customer.call("POST", f"{FUNCTIONS}/echo-event/invoke", json={"text": "x" * 6_500_000})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert "6291456" in answer.json()["error"]


async def test_what_is_printed_is_in_the_log(customer: Customer) -> None:
    """A call's lines and its own line are in the log, with its request id; whoever waits gets them as they come."""
    source = "import sys\ndef handler(event, context):\n    print('out')\n    print('err', file=sys.stderr)\n"
    await new_function(customer, "talks", source=source)
    waiting = asyncio.create_task(customer.call("GET", f"{FUNCTIONS}/talks/logs", params={"wait": 20}))
    called = (await customer.call("POST", f"{FUNCTIONS}/talks/invoke")).json()
    assert (await waiting).json()

    async def lines() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await customer.call("GET", f"{FUNCTIONS}/talks/logs")).json()
        return found if {line["stream"] for line in found} >= {"stdout", "stderr", "request"} else []

    of = {line["stream"]: line for line in await eventually(lines)}
    assert (of["stdout"]["text"], of["stderr"]["text"], of["request"]["outcome"]) == ("out", "err", "ok")
    assert {line["request_id"] for line in of.values()} == {called["request_id"]}


async def test_no_variable_shows(customer: Customer) -> None:
    """A function's environment reaches it, and its values show nowhere else, as its names do."""
    source = "import os\ndef handler(event, context):\n    return len(os.environ['KEY'])\n"
    secret = "hunter2-hunter2"
    await new_function(customer, "keyed", source=source, env={"KEY": secret, "OTHER": "x"})
    assert (await customer.call("POST", f"{FUNCTIONS}/keyed/invoke")).json()["result"] == len(secret)
    shown = await customer.call("GET", f"{FUNCTIONS}/keyed")
    assert shown.json()["env_names"] == ["KEY", "OTHER"]
    versions = await customer.call("GET", f"{FUNCTIONS}/keyed/versions")
    assert secret not in shown.text + versions.text
    if customer.stack.server.store.is_sqlite:
        files = customer.stack.settings.data_dir.glob("controlplane.db*")
        assert not any(secret.encode() in file.read_bytes() for file in files)
    changed = await customer.call("PATCH", f"{FUNCTIONS}/keyed", json={"env": {"OTHER": None, "KEY": "abc"}})
    assert changed.json()["env_names"] == ["KEY"]
    await customer.until("ready", f"{FUNCTIONS}/keyed")
    assert json.loads((await customer.call("POST", f"{FUNCTIONS}/keyed/invoke")).text)["result"] == 3
