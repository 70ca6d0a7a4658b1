"""Calls of functions by their owners, through the control plane to a host; a test plays the host."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct
from sqlmodel import col, select

from controlplane.api.hosts.v1 import hosts_pb2
from controlplane.api.v1 import functions_pb2
from controlplane.functions.invocations import Invocations
from controlplane.functions.model import Function
from controlplane.keys import Keys
from tests.doors import RPCS, Door, Native
from tests.functions.orders import FUNCTIONS, create, patch, ready
from tests.functions.played import Answer, PlayedHost, played_host, succeeded
from tests.stack import Customer, Stack

INVOKE = f"{FUNCTIONS}/thumbnails/invoke"


def answers(status: int, body: Any, **headers: str) -> Answer:
    """Return what answers every call like this; `_` in a header's name stands for `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _id, _event: (status, body, named)


def refusal(sentence: str) -> dict[str, str]:
    """Return the body of a host's refusal."""
    return {"error": sentence, "code": "of_the_host", "request_id": "r-1"}


@pytest.fixture(autouse=True)
def as_before(host: PlayedHost) -> None:
    """Let the host answer with what came, whatever the test before has had it do."""
    host.answer = PlayedHost.echo
    host.asked.clear()


async def test_an_event_goes_in_and_the_answer_comes_out(host: PlayedHost, customer: Customer) -> None:
    """The handler gets the event as it was sent, whole numbers as whole ones, and its answer comes as it was given."""
    made = await ready(customer)
    event = {"n": 7, "f": 1.5, "large": 1e300, "s": "ü\n", "l": [1, None, True, []], "o": {"": {}}}
    answer = await customer.call("POST", INVOKE, json=event)
    assert answer.status_code == 200, answer.text
    function_id, headers, got = host.asked[-1]
    assert (function_id, json.dumps(got, sort_keys=True)) == (made["id"], json.dumps(event, sort_keys=True))
    assert headers["x-request-id"] == answer.headers["x-request-id"]
    told = answer.json()
    assert told.pop("result") == {"got": event}
    assert told == {
        "status": "succeeded",
        "version": 1,
        "duration_ms": 1.5,
        "memory_mb": 20.5,
        "cold_start": True,
        "request_id": "r-1",
    }


@pytest.mark.parametrize("result", [None, 0, "text", [], [[1], {"a": None}], True], ids=str)
async def test_any_json_is_an_answer(host: PlayedHost, customer: Customer, result: Any) -> None:
    """Whatever JSON a handler returns is shown as that, null too."""
    await ready(customer)
    host.answer = answers(200, succeeded(result))
    answer = (await customer.call("POST", INVOKE)).json()
    assert (answer["status"], answer["result"]) == ("succeeded", result)
    assert host.asked[-1][2] == {}


async def test_a_handler_that_fails(host: PlayedHost, customer: Customer, door: Door) -> None:
    """What the handler raised is the answer and no error, and so is how its process ended."""
    await ready(customer)
    credential = {"authorization": f"Bearer {customer.token}"}
    raised = {"status": "failed", "result": None, "error": "KeyError: 'name'", "trace": "in handler"}
    host.answer = answers(200, succeeded(None) | raised)
    answer = await door.call("InvokeFunction", {"name": "thumbnails"}, **credential)
    assert answer.code == "ok", answer.sentence
    assert answer.result.items() >= {"status": "failed", "error": "KeyError: 'name'", "trace": "in handler"}.items()
    assert "result" not in answer.result
    host.answer = answers(502, refusal("The process could not be started."))
    answer = await door.call("InvokeFunction", {"name": "thumbnails"}, **credential)
    expected = {"status": "failed", "error": "The process could not be started.", "version": 1}
    assert answer.result.items() >= expected.items()
    assert answer.result["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (413, "too_large", "The request is too large: at most 6291456 bytes are accepted."),
        (429, "too_many_calls", "All 10 workers are busy."),
        (504, "timeout", "The function did not answer within 10 seconds."),
        (503, "unavailable", "The service cannot answer right now. Retry in a moment."),
        (404, "unavailable", "The service cannot answer right now. Retry in a moment."),
        (500, "unavailable", "The service cannot answer right now. Retry in a moment."),
    ],
)
async def test_what_a_host_refuses(  # noqa: PLR0917 - pytest passes them by name
    host: PlayedHost, customer: Customer, door: Door, status: int, code: str, sentence: str
) -> None:
    """Too large, too many and too late are told as such, with when to try again; all else is the service's fault."""
    await ready(customer)
    host.answer = answers(status, refusal(sentence), retry_after="7")
    answer = await door.call("InvokeFunction", {"name": "thumbnails"}, authorization=f"Bearer {customer.token}")
    assert (answer.code, answer.sentence) == (code, sentence)
    if code == "too_many_calls":
        assert answer.headers["retry-after"] == "7"


@pytest.mark.parametrize("nonsense", ["", [], {"status": "succeeded"}, {**succeeded(1), "version": "one"}], ids=str)
async def test_an_answer_that_is_none(host: PlayedHost, customer: Customer, nonsense: Any) -> None:
    """A host's answer that cannot be read is the service's fault."""
    await ready(customer)
    host.answer = answers(200, nonsense)
    answer = await customer.call("POST", INVOKE)
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")


async def test_what_cannot_be_shown(host: PlayedHost, customer: Customer, native: Native) -> None:
    """What protobuf or JSON cannot have is told as the function's failure, and an event like that is refused."""
    await ready(customer)
    deep: Any = 1
    for _ in range(60):
        deep = [deep]
    for result in (deep, float("nan"), "\ud800", 10**400):
        host.answer = answers(200, succeeded(result))
        answer = (await customer.call("POST", INVOKE)).json()
        assert (answer["status"], "result" in answer) == ("failed", False)
        assert "cannot be shown" in answer["error"]
    event = Struct()
    event.fields["n"].number_value = float("inf")
    request = functions_pb2.InvokeFunctionRequest(name="thumbnails", event=event)
    refused = await native.send(
        RPCS["InvokeFunction"], request.SerializeToString(), authorization=f"Bearer {customer.token}"
    )
    assert (refused.code, list(refused.fields)) == ("invalid_field", ["event"])


async def test_what_is_nested_as_deep_as_can_be(host: PlayedHost, customer: Customer, door: Door) -> None:
    """Forty-five lists in each other, or thirty objects, are shown by both doors."""
    await ready(customer)
    lists: Any = 1
    for _ in range(45):
        lists = [lists]
    objects: Any = 1
    for _ in range(30):
        objects = {"a": objects}
    for result in (lists, objects):
        host.answer = answers(200, succeeded(result))
        answer = await door.call("InvokeFunction", {"name": "thumbnails"}, authorization=f"Bearer {customer.token}")
        assert (answer.code, answer.result.get("result")) == ("ok", result)


async def test_much_of_it(customer: Customer) -> None:
    """A megabyte goes in and comes out again."""
    await ready(customer)
    event = {"rows": [{"n": number, "s": "ü" * 20} for number in range(15_000)]}
    answer = await customer.call("POST", INVOKE, json=event)
    assert answer.status_code == 200, answer.text
    assert answer.json()["result"] == {"got": event}


async def test_a_function_that_does_not_answer_yet(host: PlayedHost, customer: Customer) -> None:
    """Until a version answers there is nothing to call; while a change is loaded or has failed, the one before is."""
    host.may_load.clear()
    try:
        await create(customer)
        refused = await customer.call("POST", INVOKE)
        assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
        assert "is building" in refused.json()["error"]
    finally:
        host.may_load.set()
    await customer.until("ready", f"{FUNCTIONS}/thumbnails")
    await patch(customer, source="broken")
    assert (await customer.call("POST", INVOKE)).status_code == 200
    await customer.until("ready", f"{FUNCTIONS}/thumbnails")
    assert (await customer.call("POST", INVOKE)).status_code == 200


async def test_another_host_takes_the_call(stack: Stack, folder: Path, host: PlayedHost, customer: Customer) -> None:
    """Where one host cannot be reached, or does not take the call, another one does; each call runs once."""
    async with played_host(stack, folder) as other:
        await ready(customer)
        one_by_one = []
        for _ in range(4):
            assert (await customer.call("POST", INVOKE, json={"n": 1})).status_code == 200
            one_by_one.append(len(other.asked))
        assert one_by_one in ([0, 0, 0, 0], [1, 2, 3, 4])  # always the same one, whose workers are warm
        for away, there in ((host, other), (other, host)):
            taken = len(there.asked)
            away.answer = answers(503, refusal("not ready"))
            assert (await customer.call("POST", INVOKE)).status_code == 200
            away.answer = PlayedHost.echo
            await away.restart(address=f"unix:{folder}/nobody.sock")
            assert (await customer.call("POST", INVOKE)).status_code == 200
            await away.restart()
            assert len(there.asked) == taken + 2


async def test_a_new_key_of_ours_is_no_end(stack: Stack, customer: Customer) -> None:
    """A host that started under a key of before is called all the same once there is a newer one."""
    made = await ready(customer)
    keys = stack.server.keys
    newer = Keys(mac={"k2": base64.b64encode(bytes(32)).decode(), **keys.mac}, seal=keys.seal)
    invocations = Invocations(store=stack.server.store, clock=stack.clock, keys=newer)
    row = (await stack.server.store.fetch(select(Function).where(col(Function.id) == made["id"])))[0]
    try:
        answer = await invocations.invoke(row, Struct(), request_id="r-1")
    finally:
        await invocations.close()
    assert answer.status == "succeeded"


async def test_calls_do_not_wait_for_each_other(host: PlayedHost, customer: Customer) -> None:
    """Many calls at once are with the host at once, and each gets its own answer."""
    await ready(customer)
    host.together = asyncio.Barrier(30)
    try:
        async with asyncio.timeout(20):
            told = await asyncio.gather(*(customer.call("POST", INVOKE, json={"n": number}) for number in range(30)))
    finally:
        host.together = None
    assert [answer.json()["result"]["got"]["n"] for answer in told] == list(range(30))


async def test_the_address_is_the_hosts_own(host: PlayedHost) -> None:
    """A start of a host is shown a secret of its own: not that of the start before."""
    former = host.call_secret
    answer = await host.ask("StartFunctionHost", hosts_pb2.StartFunctionHostRequest(**host.offers))
    assert answer.call_secret != former
    await host.restart()
