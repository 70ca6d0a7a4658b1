"""Versions of functions: the one before answers until the new one is loaded, and can be gone back to; a played host."""

from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from sqlmodel import col, select

from controlplane.functions.logs import FunctionLogLine
from controlplane.functions.model import FunctionCode, FunctionVersion
from tests.events.conftest import feed_of
from tests.functions.orders import FUNCTIONS, SOURCE, create, deploy, patch, ready, versions_of, zipped
from tests.functions.played import PlayedHost, line
from tests.stack import Customer, Stack, eventually

BROKEN = "broken"
ERROR = "NameError: name 'broken' is not defined\n  in main.py"


async def roll_back(customer: Customer, version: int | None = None) -> dict[str, Any]:
    """Go back to a version and wait until that is done."""
    body = {} if version is None else {"version": version}
    answer = await customer.call("POST", f"{FUNCTIONS}/thumbnails/rollback", json=body)
    assert answer.status_code == 200, answer.text
    return await customer.until("ready", f"{FUNCTIONS}/thumbnails")


async def test_the_version_before_answers_until_the_new_one_is_loaded(customer: Customer, host: PlayedHost) -> None:
    """While new code is loaded the hosts go on with the old version; then all of them switch."""
    made = await ready(customer)
    host.may_load.clear()
    try:
        changed = await patch(customer, source="x = 1", memory_mb=64)
        assert (changed["status"], changed["version"], changed["memory_mb"]) == ("updating", 1, 64)

        async def loading() -> bool:
            return host.held[made["id"]].HasField("building")

        await eventually(loading)
        held = host.held[made["id"]]
        assert (held.active.version, held.active.memory_mb, held.building.version) == (1, 128, 2)
        before = await versions_of(customer)
        assert [(each["status"], each["active"]) for each in before] == [("ready", True), ("building", False)]
    finally:
        host.may_load.set()
    found = await customer.until("ready", f"{FUNCTIONS}/thumbnails")
    assert (found["version"], found["observed_generation"]) == (2, found["generation"])
    held = host.held[made["id"]]
    assert (held.active.version, held.HasField("building")) == (2, False)


async def test_code_that_cannot_be_loaded(customer: Customer) -> None:
    """A first version that cannot be loaded has failed with its error; code that can be loaded mends that."""
    await create(customer, source=BROKEN)
    failed = await customer.until("failed", f"{FUNCTIONS}/thumbnails")
    assert (failed["progress"]["last_error"], failed.get("version")) == (ERROR, None)
    told = [event for event in await feed_of(customer) if event["type"].startswith("function.")]
    assert [event["type"] for event in told] == ["function.create", "function.failed"]
    mended = await deploy(customer, source=SOURCE)
    assert (mended["version"], "progress" in mended) == (2, False)
    assert [each["status"] for each in await versions_of(customer)] == ["failed", "ready"]


async def test_a_version_that_cannot_be_loaded_leaves_the_one_before(customer: Customer, host: PlayedHost) -> None:
    """The old version goes on answering, what failed is shown and told once, and the order is not called real."""
    made = await ready(customer)
    await patch(customer, source=BROKEN)
    found = await customer.until("ready", f"{FUNCTIONS}/thumbnails")
    assert (found["version"], found["progress"]["last_error"]) == (1, ERROR)
    assert found["observed_generation"] < found["generation"]
    held = host.held[made["id"]]
    assert (held.active.version, held.HasField("building")) == (1, False)
    shown = (await versions_of(customer))[-1]
    assert (shown["version"], shown["status"], shown["active"], shown["error"]) == (2, "failed", False, ERROR)
    told = [event for event in await feed_of(customer) if event["type"] == "function.build_failed"]
    assert [event["detail"] for event in told] == ["NameError: name 'broken' is not defined"]
    await deploy(customer, auth="public")
    assert len([event for event in await feed_of(customer) if event["type"] == "function.build_failed"]) == 1


async def test_the_same_broken_code_can_be_tried_again(customer: Customer) -> None:
    """Code that could not be loaded becomes a version once more when it is sent again; code that could does not."""
    await ready(customer)
    for _ in range(2):
        await patch(customer, source=BROKEN)
        await customer.until("ready", f"{FUNCTIONS}/thumbnails")
    assert [each["status"] for each in await versions_of(customer)] == ["ready", "failed", "failed"]


async def test_an_order_replaces_the_one_that_is_being_loaded(customer: Customer, host: PlayedHost) -> None:
    """A version that is not loaded yet when the next is ordered is given up, and what a host says of it is ignored."""
    await ready(customer)
    host.may_load.clear()
    try:
        await patch(customer, memory_mb=64)
        await patch(customer, memory_mb=96)
        given_up = (await versions_of(customer))[1]
        assert (given_up["status"], given_up["error"]) == ("failed", "It was replaced before it was loaded.")
    finally:
        host.may_load.set()
    found = await customer.until("ready", f"{FUNCTIONS}/thumbnails")
    assert (found["version"], found["memory_mb"]) == (3, 96)
    assert [each["status"] for each in await versions_of(customer)] == ["ready", "failed", "ready"]


async def test_going_back(customer: Customer, host: PlayedHost) -> None:
    """A rollback lets the version before answer, with its code, settings and variables, without loading it anew."""
    made = await ready(customer, env={"A": "1"}, memory_mb=64)
    await deploy(customer, source="x = 1", env={"A": "2", "B": "3"}, memory_mb=128)
    host.may_load.clear()
    try:
        found = await roll_back(customer)
    finally:
        host.may_load.set()
    assert (found["version"], found["memory_mb"], found["env_names"]) == (1, 64, ["A"])
    assert dict(host.held[made["id"]].active.env) == {"A": "1"}
    forward = await roll_back(customer, 2)
    assert (forward["version"], forward["memory_mb"], forward["env_names"]) == (2, 128, ["A", "B"])
    changed = await deploy(customer, timeout_ms=700)
    assert (changed["version"], changed["memory_mb"], changed["env_names"]) == (3, 128, ["A", "B"])
    assert (await roll_back(customer, 3))["generation"] == changed["generation"]


async def test_going_back_where_there_is_nothing(customer: Customer) -> None:
    """There is no way back from a first version, to one that failed, or to one that is not kept."""
    await ready(customer)
    await patch(customer, source=BROKEN)
    await customer.until("ready", f"{FUNCTIONS}/thumbnails")
    path = f"{FUNCTIONS}/thumbnails/rollback"
    for body in ({}, {"version": 2}):
        refused = await customer.call("POST", path, json=body)
        assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    refused = await customer.call("POST", path, json={"version": 3})
    assert (refused.status_code, refused.json()["fields"][0]["field"]) == (400, "version")


async def test_going_back_to_what_answers_ends_a_failed_order(customer: Customer) -> None:
    """After a version that could not be loaded, a rollback to the one that answers makes the function whole again."""
    before = await ready(customer)
    await patch(customer, source=BROKEN, memory_mb=64)
    await customer.until("ready", f"{FUNCTIONS}/thumbnails")
    found = await roll_back(customer, 1)
    assert ("progress" in found, found["memory_mb"]) == (False, before["memory_mb"])
    assert found["observed_generation"] == found["generation"]


async def test_ten_versions_are_kept_and_the_one_that_answers(
    stack: Stack, customer: Customer, host: PlayedHost
) -> None:
    """Older versions go with their code and their log lines, but not the one that answers."""
    made = await ready(customer, source="x = 0")
    await host.log(host.next_batch(), line(made["id"], 1, "of the first"))
    await deploy(customer, source="x = 1")
    await host.log(host.next_batch(), line(made["id"], 2, "of the second"))
    for number in range(11):
        await patch(customer, source=f"{BROKEN} {number}")
    await customer.until("ready", f"{FUNCTIONS}/thumbnails")
    assert [each["version"] for each in await versions_of(customer)] == [2, *range(4, 14)]
    store, of_function = stack.server.store, made["id"]
    codes = await store.fetch(select(FunctionCode.sha256).where(col(FunctionCode.function_id) == of_function))
    assert len(codes) == 11
    lines = await store.fetch(select(FunctionLogLine.text).where(col(FunctionLogLine.function_id) == of_function))
    assert [row.text for row in lines] == ["of the second"]


async def test_the_same_code_is_kept_once(stack: Stack, customer: Customer) -> None:
    """Versions with the same code share it, and each shows its digest and its size."""
    made = await ready(customer, source="x = 1")
    await deploy(customer, memory_mb=64)
    first, second = await versions_of(customer)
    assert (first["code_sha256"], first["code_bytes"]) == (second["code_sha256"], second["code_bytes"])
    assert first["code_bytes"] == len("x = 1")
    await deploy(customer, archive=zipped(main__py="x = 1"))
    codes = await stack.server.store.fetch(
        select(FunctionCode.is_archive).where(col(FunctionCode.function_id) == made["id"])
    )
    assert sorted(row.is_archive for row in codes) == [False, True]


async def test_variables_are_kept_encrypted(stack: Stack, customer: Customer) -> None:
    """No row has the value of a variable, and a sealed value opens for its own version only."""
    made = await ready(customer, env={"API_KEY": "a telling value"})
    await deploy(customer, memory_mb=64)
    rows = await stack.server.store.fetch(
        select(FunctionVersion)
        .where(col(FunctionVersion.function_id) == made["id"])
        .order_by(col(FunctionVersion.number))
    )
    assert "telling" not in str(rows)
    assert len({row.env_sealed for row in rows}) == 2
    first, second = rows
    keys, account = stack.server.keys, customer.account_id
    assert b"a telling value" in keys.decrypt(first.env_sealed, bound_to=f"{account}/{first.id}/env")
    with pytest.raises(InvalidTag):
        keys.decrypt(first.env_sealed, bound_to=f"{account}/{second.id}/env")
