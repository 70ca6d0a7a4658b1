"""What callers of a function's address and the control plane get, through a real server and the real sandbox."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from controlplane.api.hosts.v1 import hosts_pb2
from controlplane.functions.host.calls import LARGEST_BODY
from controlplane.functions.host.host import FunctionHost
from tests.functions.host.conftest import DO, ECHO
from tests.functions.host.control import ACCOUNT, Control

# Answers by itself, in the manner of the host's own protocol: `A`, the call's number, a length, and what is no JSON.
CHEAT = """
import os, stat, struct, time
def handler(event, context):
    body = b'1, "version": 99'
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.write(fd, struct.pack("!cII", b"A", 2, len(body)) + body)
        except OSError:
            pass
    time.sleep(5)
"""


class Caller:
    """Calls functions of the tests' account."""

    def __init__(self, client: httpx.AsyncClient, control: Control) -> None:
        self.client = client
        self._control = control

    async def invoke(self, function_id: str, event: bytes = b"{}", **headers: str) -> httpx.Response:
        """Call as the control plane does."""
        secret = {"x-htx-call-secret": f"secret of {self._control.instance}"}
        return await self.client.post(f"/invoke/{function_id}", content=event, headers={**secret, **headers})


@pytest.fixture
def caller(client: httpx.AsyncClient, control: Control) -> Caller:
    """Somebody who calls functions."""
    return Caller(client, control)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("1 / 0", (502, "function_error", "error")),
        ("os._exit(3)", (502, "function_crashed", "crashed")),
        ("len(bytearray(10 ** 9))", (502, "function_out_of_memory", "out_of_memory")),
        ("time.sleep(9)", (504, "timeout", "timeout")),
        ("'x' * 7_000_000", (502, "function_bad_answer", "too_large")),
    ],
)
async def test_a_call_that_fails(does: Any, control: Control, expression: str, expected: tuple[int, str, str]) -> None:
    """The public learns which way a call failed and no more, the log has the rest, and the next call is answered."""
    status, code, outcome = expected
    answer = await does(expression)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json().keys() == {"error", "code", "request_id"}
    assert not [word for word in ("Traceback", "ZeroDivision", "eval") if word in answer.text]
    request_id = answer.json()["request_id"]
    line = await control.line(lambda line: line.request_id == request_id and line.stream == "request")
    assert line.outcome == outcome
    assert ("ZeroDivisionError" in line.text) == (outcome == "error")
    assert line.duration_ms > 0
    assert (await does("1 + 1")).json() == 2


async def test_the_largest_body(client: httpx.AsyncClient, do: hosts_pb2.HostedFunction, does: Any) -> None:
    """A body of exactly 6 MiB runs, and one byte more is a 413 before anything does, said in advance or not."""
    path, text = f"/f/{ACCOUNT}/{do.name}", {"content-type": "text/plain"}
    expression = b"len(body)"
    body = expression + b" " * (LARGEST_BODY - len(expression))
    assert (await client.post(path, content=body, headers=text)).json() == LARGEST_BODY

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(LARGEST_BODY // 65536):
            yield b" " * 65536
        yield b" "

    for content in (b" " * (LARGEST_BODY + 1), chunks()):
        answer = await client.post(path, content=content, headers=text)
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert (await does("1")).status_code == 200


@pytest.mark.parametrize("path", ["/f/ac_tests/nothing", "/f/ac_others/echo", "/f/", "/f", "/", "/metrics", "/invoke/"])
async def test_an_address_of_nothing(client: httpx.AsyncClient, path: str) -> None:
    """Where there is no function, there is a 404."""
    answer = await client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_a_request_id_is_made_where_none_came(client: httpx.AsyncClient, echo: str) -> None:
    """Without an `x-request-id`, or with one that is no id, the call has one of its own."""
    for headers in ({}, {"x-request-id": "a b"}, {"x-request-id": "a" * 65}):
        request_id = (await client.get(echo, headers=headers)).json()["request_id"]
        assert len(request_id) == 32


async def test_a_function_that_wants_a_token(control: Control, client: httpx.AsyncClient, host: FunctionHost) -> None:
    """The control plane is asked with what came, the headers of its answer go along, and the token goes no further."""
    del host
    function = await control.deploy(ECHO, auth="token")
    control.authorize = lambda _: hosts_pb2.AuthorizeFunctionCallResponse(headers={"RateLimit-Remaining": "7"})
    answer = await client.get(
        f"/f/{ACCOUNT}/{function.name}", headers={"authorization": "Bearer mine", "x-htx-client-ip": "203.0.113.9"}
    )
    question = control.questions[-1]
    assert (question.function_id, question.authorization, question.client_ip) == (
        function.id,
        "Bearer mine",
        "203.0.113.9",
    )
    assert answer.status_code == 200
    assert answer.headers["ratelimit-remaining"] == "7"
    assert "Bearer" not in answer.text


async def test_a_token_that_is_refused(control: Control, client: httpx.AsyncClient, host: FunctionHost) -> None:
    """What the control plane says is the answer, and nothing runs."""
    del host
    function = await control.deploy(ECHO, auth="token")
    control.authorize = lambda _: hosts_pb2.AuthorizeFunctionCallResponse(
        status=429, code="rate_limited", error="Too much.", headers={"Retry-After": "9"}
    )
    answer = await client.get(f"/f/{ACCOUNT}/{function.name}", headers={"x-request-id": "an-id"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "9")
    assert answer.json() == {"error": "Too much.", "code": "rate_limited", "request_id": "an-id"}


async def test_a_public_function_gets_the_authorization(client: httpx.AsyncClient, echo: str, control: Control) -> None:
    """A public function may have logins of its own: it sees the header, and nobody is asked."""
    asked = len(control.questions)
    answer = await client.get(echo, headers={"authorization": "Basic abc"})
    assert answer.json()["event"]["headers"]["authorization"] == "Basic abc"
    assert len(control.questions) == asked


async def test_too_many_calls_of_a_function(control: Control, client: httpx.AsyncClient, host: FunctionHost) -> None:
    """Of calls at the same time exactly as many run as may; the others are a 429 that says when to come back."""
    del host
    function = await control.deploy(DO, max_concurrency=3)
    path = f"/f/{ACCOUNT}/{function.name}"
    answers = await asyncio.gather(*(client.post(path, content="time.sleep(1)") for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 5
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert (refused.json()["code"], refused.headers["retry-after"]) == ("too_many_calls", "1")
    assert (await client.post(path, content="1")).status_code == 200


async def test_a_function_that_is_not_built_yet(
    control: Control, client: httpx.AsyncClient, host: FunctionHost
) -> None:
    """A function without a version that answers is a 503 with Retry-After."""
    del host
    function_id, _ = await control.order("1 / 0\n")
    name = control.functions[function_id].name
    await control.until_applied(control.places[function_id])
    answer = await client.get(f"/f/{ACCOUNT}/{name}")
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "not_ready", "1")


async def test_the_owner_calls(caller: Caller, control: Control, host: FunctionHost) -> None:
    """The control plane gets the result, or what the handler raised with its trace, and what it took."""
    del host
    function = await control.deploy(
        "def handler(event, context):\n    if event is None:\n        raise KeyError('name')\n    return event\n"
    )
    answer = await caller.invoke(function.id, b'{"a": ["\xc3\xa4", 1.5, null]}', **{"x-request-id": "an-id"})
    found = answer.json()
    assert found.pop("duration_ms") > 0
    assert 1 < found.pop("memory_mb") < 64
    assert found == {
        "status": "succeeded",
        "result": {"a": ["ä", 1.5, None]},
        "error": None,
        "trace": None,
        "version": 1,
        "cold_start": False,
        "request_id": "an-id",
    }
    failed = (await caller.invoke(function.id, b"")).json()
    assert (failed["status"], failed["result"]) == ("failed", None)
    assert "KeyError" in failed["error"]
    assert "main.py" in failed["trace"]


async def test_what_the_owner_gets_when_nothing_came_of_it(
    caller: Caller, control: Control, does: Any, do: hosts_pb2.HostedFunction
) -> None:
    """A call that took too long is an error, and a crash is a call that failed."""
    del control, does
    late = await caller.invoke(do.id, b'{"body": "time.sleep(9)"}')
    assert (late.status_code, late.json()["code"]) == (504, "timeout")
    crashed = await caller.invoke(do.id, b'{"body": "os._exit(3)"}')
    assert (crashed.status_code, crashed.json()["status"]) == (200, "failed")
    assert "exit status 3" in crashed.json()["error"]
    large = await caller.invoke(do.id, b" " * (LARGEST_BODY + 1))
    assert (large.status_code, large.json()["code"]) == (413, "too_large")


async def test_an_error_that_is_no_text(caller: Caller, control: Control, do: hosts_pb2.HostedFunction) -> None:
    """An error whose message is long and has characters that no text has is answered and logged like another."""
    event = b'{"body": "(_ for _ in ()).throw(Exception(chr(0xd800) + chr(0) + 300000 * \'x\'))"}'
    answer = await caller.invoke(do.id, event, **{"x-request-id": "no-text"})
    failed = answer.json()
    assert (answer.status_code, failed["status"]) == (200, "failed")
    assert failed["error"].startswith("Exception: ?\N{REPLACEMENT CHARACTER}xxx")
    line = await control.line(lambda line: line.request_id == "no-text" and line.stream == "request")
    assert "Exception" in line.text


async def test_an_answer_that_is_no_json(caller: Caller, control: Control, host: FunctionHost) -> None:
    """A function that sends its own answer past its runtime cannot break what the control plane gets."""
    del host
    function = await control.deploy(CHEAT)
    answer = (await caller.invoke(function.id)).json()
    assert (answer["status"], answer["version"]) == ("failed", 1)


@pytest.mark.parametrize("secret", [None, "", "wrong", "secret of start"])
async def test_without_the_secret_there_is_no_call(
    client: httpx.AsyncClient, do: hosts_pb2.HostedFunction, secret: str | None
) -> None:
    """Who does not show the secret of this start finds nothing."""
    headers = {} if secret is None else {"x-htx-call-secret": secret}
    answer = await client.post(f"/invoke/{do.id}", content=b"{}", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_a_function_that_there_is_not(caller: Caller) -> None:
    """The control plane is told when a function is not here."""
    answer = await caller.invoke("fn_nothing")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize("event", [b"{", b"1}, {", b"\xff", b"1 2"])
async def test_an_event_that_is_no_json(caller: Caller, do: hosts_pb2.HostedFunction, event: bytes) -> None:
    """An event that is not JSON is a call that failed, and harms no other."""
    answer = await caller.invoke(do.id, event)
    assert answer.json()["status"] == "failed"
    assert (await caller.invoke(do.id, b'{"body": "1"}')).json()["result"] == 1
