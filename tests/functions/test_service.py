"""Functions over REST, from the order to the end; a test plays the host."""

import asyncio
from typing import Any

import pytest

from tests.doors import Door
from tests.functions.orders import FUNCTIONS, ORDER, SOURCE, create, deploy, patch, ready, versions_of, zipped
from tests.functions.played import REGION, PlayedHost
from tests.stack import Customer, Stack

pytestmark = pytest.mark.usefixtures("host")


async def test_from_the_order_to_the_end(customer: Customer) -> None:
    """A function is ordered, becomes ready, is listed, and once it is deleted its name and its place are free again."""
    assert (await customer.call("GET", FUNCTIONS)).json() == []
    made = await create(customer)
    assert (made["status"], made.get("version")) == ("building", None)
    assert made["progress"]["waiting_on"] == "a host that runs functions"
    found = await customer.until("ready", f"{FUNCTIONS}/thumbnails")
    assert (found["version"], found["id"]) == (1, made["id"])
    assert "progress" not in found
    assert (await customer.call("GET", FUNCTIONS)).json() == [found]
    deleted = await customer.call("DELETE", f"{FUNCTIONS}/thumbnails")
    assert (deleted.status_code, deleted.json()["status"]) == (200, "deleting")
    await customer.until("gone", f"{FUNCTIONS}/thumbnails")
    quotas = (await customer.call("GET", "/api/portal/account")).json()["quotas"]
    assert quotas["functions"]["used"] == 0
    assert (await ready(customer))["id"] != made["id"]


async def test_a_function_is_shown_as_it_was_ordered(customer: Customer) -> None:
    """Everything that was ordered is in the answer but the code and the values of the variables."""
    wanted: dict[str, Any] = {
        "entrypoint": "main.run",
        "memory_mb": 256,
        "timeout_ms": 500,
        "auth": "public",
        "max_concurrency": 3,
        "region": REGION,
    }
    made = await create(customer, env={"B": "the value of B", "A": "the value of A"}, **wanted)
    assert made.items() >= wanted.items()
    assert (made["env_names"], made["allow_network"]) == (["A", "B"], False)
    assert made["path"] == f"/f/{customer.account_id}/thumbnails"
    assert "the value of" not in str(made)
    assert "handler" not in str(made)
    found = await customer.until("ready", f"{FUNCTIONS}/thumbnails")
    assert found.items() >= {**wanted, "generation": 1, "observed_generation": 1}.items()


async def test_what_an_order_does_not_say(customer: Customer) -> None:
    """An order that says no more than it must gets the defaults of the contract."""
    made = await create(customer)
    expected = {"memory_mb": 128, "timeout_ms": 10_000, "auth": "token", "max_concurrency": 10, "env_names": []}
    assert made.items() >= {**expected, "entrypoint": "main.handler"}.items()
    assert (await create(customer, "text", runtime="wasm", source="(module)"))["entrypoint"] == "main.wat"
    binary = {**ORDER, "name": "binary", "runtime": "wasm", "archive": zipped(main__wasm="")}
    del binary["source"]
    assert (await customer.call("POST", FUNCTIONS, json=binary)).json()["entrypoint"] == "main.wasm"


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"source": None}, "source"),
        ({"archive": zipped(main__py="")}, "archive"),
        ({"source": None, "archive": "bm8gYXJjaGl2ZQ=="}, "archive"),
        ({"entrypoint": "main"}, "entrypoint"),
        ({"entrypoint": "../main.handler"}, "entrypoint"),
        ({"region": "nowhere"}, "region"),
    ],
)
async def test_an_order_that_cannot_be(somebody: Customer, wanted: dict[str, Any], field: str) -> None:
    """Code that is missing, twice there or no archive, a wrong entrypoint and an unknown region are refused."""
    order = {name: value for name, value in {**ORDER, **wanted}.items() if value is not None}
    answer = await somebody.call("POST", FUNCTIONS, json=order)
    assert (answer.status_code, [each["field"] for each in answer.json()["fields"]]) == (400, [field])


async def test_a_taken_name_is_refused(customer: Customer) -> None:
    """A name is unique within an account, also when orders of it come at once; one of them is charged."""
    answers = await asyncio.gather(*(customer.call("POST", FUNCTIONS, json=ORDER) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
    assert {answer.json().get("code") for answer in answers} == {None, "already_exists"}
    quotas = (await customer.call("GET", "/api/portal/account")).json()["quotas"]
    assert quotas["functions"]["used"] == 1


async def test_the_plan_has_a_limit(stack: Stack) -> None:
    """A plan with room for one function takes one; that a name is taken is said all the same."""
    customer = await stack.customer(plan="small")
    await create(customer)
    taken = await customer.call("POST", FUNCTIONS, json=ORDER)
    assert (taken.status_code, taken.json()["code"]) == (409, "already_exists")
    refused = await customer.call("POST", FUNCTIONS, json={**ORDER, "name": "other"})
    assert (refused.status_code, refused.json()["code"]) == (402, "quota_exceeded")


async def test_what_no_host_runs_is_refused(customer: Customer) -> None:
    """A runtime that no host has is a conflict that names those there are; so is the internet where there is none."""
    refused = await customer.call("POST", FUNCTIONS, json={**ORDER, "runtime": "nodejs"})
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert "python3, wasm" in refused.json()["error"]
    refused = await customer.call("POST", FUNCTIONS, json={**ORDER, "allow_network": True})
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    await ready(customer)
    refused = await customer.call("PATCH", f"{FUNCTIONS}/thumbnails", json={"allow_network": True})
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")


async def test_a_change_that_changes_nothing(customer: Customer) -> None:
    """A change that names nothing, or what is so already, leaves the ETag and the versions as they were."""
    before = await ready(customer, env={"A": "1"})
    same: dict[str, Any] = {"source": SOURCE, "memory_mb": 128, "env": {"A": "1", "B": None}, "auth": "token"}
    for change in (dict[str, Any](), same):
        assert await patch(customer, **change) == before
    assert len(await versions_of(customer)) == 1


async def test_variables_are_merged(customer: Customer, host: PlayedHost) -> None:
    """A change sets the variables that it names, removes those that are null, and leaves the others alone."""
    made = await ready(customer, env={"KEPT": "1", "CHANGED": "2", "GONE": "3"})
    changed = await deploy(customer, env={"CHANGED": "4", "GONE": None, "NEW": "ü"})
    assert (changed["env_names"], changed["version"]) == (["CHANGED", "KEPT", "NEW"], 2)
    assert dict(host.held[made["id"]].active.env) == {"KEPT": "1", "CHANGED": "4", "NEW": "ü"}
    refused = await customer.call(
        "PATCH", f"{FUNCTIONS}/thumbnails", json={"env": {f"V{number}": "" for number in range(98)}}
    )
    assert (refused.status_code, refused.json()["fields"][0]["field"]) == (400, "env")


async def test_who_may_call_is_no_new_version(customer: Customer, host: PlayedHost) -> None:
    """Who may call and how many at once changes at the hosts, and the version stays."""
    made = await ready(customer)
    changed = await deploy(customer, auth="public", max_concurrency=2)
    assert (changed["version"], changed["generation"], changed["observed_generation"]) == (1, 2, 2)
    held = host.held[made["id"]]
    assert (held.auth, held.max_concurrency, held.active.version) == ("public", 2, 1)
    assert len(await versions_of(customer)) == 1


async def test_a_change_on_stale_knowledge_is_refused(customer: Customer) -> None:
    """A change, a rollback and a deletion with an ETag from before are refused and change nothing."""
    await ready(customer)
    stale = (await customer.call("GET", f"{FUNCTIONS}/thumbnails")).headers["etag"]
    now = await deploy(customer, memory_mb=64)
    for method, path, body in (
        ("PATCH", "", {"memory_mb": 32}),
        ("POST", "/rollback", {}),
        ("DELETE", "", None),
    ):
        answer = await customer.call(method, f"{FUNCTIONS}/thumbnails{path}", json=body, headers={"if-match": stale})
        assert (answer.status_code, answer.json()["code"]) == (412, "stale"), path
    shown = await customer.call("GET", f"{FUNCTIONS}/thumbnails")
    assert (shown.json(), shown.headers["etag"] != stale) == (now, True)


async def test_what_is_only_validated_is_not_done(customer: Customer, host: PlayedHost) -> None:
    """With validate_only each write answers what would be; no row changes and no host is told."""
    asked: dict[str, Any] = {"params": {"validate_only": "true"}}
    would_be = await customer.call("POST", FUNCTIONS, json=ORDER, **asked)
    assert (would_be.status_code, would_be.json()["status"]) == (201, "building")
    assert (await customer.call("GET", FUNCTIONS)).json() == []
    await ready(customer)
    before = await deploy(customer, memory_mb=64)
    versions, held = await versions_of(customer), dict(host.held)
    for method, path, body in (
        ("PATCH", "", {"source": "x = 1"}),
        ("POST", "/rollback", {}),
        ("DELETE", "", None),
    ):
        answer = await customer.call(method, f"{FUNCTIONS}/thumbnails{path}", json=body, **asked)
        assert (answer.status_code, answer.json()["generation"]) == (200, before["generation"] + 1), path
    assert (await customer.call("GET", f"{FUNCTIONS}/thumbnails")).json() == before
    assert (await versions_of(customer), host.held) == (versions, held)


async def test_a_deletion_is_done_once(customer: Customer, host: PlayedHost) -> None:
    """While a host still holds a function, another deletion changes nothing, and a change is refused."""
    await ready(customer)
    host.may_pull.clear()
    try:
        first = (await customer.call("DELETE", f"{FUNCTIONS}/thumbnails")).json()
        again = (await customer.call("DELETE", f"{FUNCTIONS}/thumbnails")).json()
        assert (first["status"], again["generation"]) == ("deleting", first["generation"])
        for method, path in (("PATCH", ""), ("POST", "/rollback"), ("POST", "/invoke")):
            answer = await customer.call(method, f"{FUNCTIONS}/thumbnails{path}", json={})
            assert (answer.status_code, answer.json()["code"]) == (409, "conflict"), path
    finally:
        host.may_pull.set()
    await customer.until("gone", f"{FUNCTIONS}/thumbnails")


async def test_pages(customer: Customer, door: Door) -> None:
    """Functions come oldest first, a page at a time, each once."""
    names = [(await create(customer, f"f{number}"))["name"] for number in range(3)]
    credential = {"authorization": f"Bearer {customer.token}"}
    first = await door.call("ListFunctions", {"page_size": 2}, **credential)
    assert [function["name"] for function in first.result] == names[:2]
    every = await door.call("ListFunctions", **credential)
    assert [function["name"] for function in every.result] == names


async def test_what_is_not_there(customer: Customer, stack: Stack) -> None:
    """A name that the account does not have is a 404 on every route, also if another account has it."""
    await create(customer)
    other = await stack.customer()
    for method, path in (
        ("GET", ""),
        ("PATCH", ""),
        ("DELETE", ""),
        ("GET", "/versions"),
        ("POST", "/rollback"),
        ("POST", "/invoke"),
        ("GET", "/logs"),
    ):
        body: dict[str, Any] | None = {} if method in {"PATCH", "POST"} else None
        answer = await other.call(method, f"{FUNCTIONS}/thumbnails{path}", json=body)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), (method, path)
