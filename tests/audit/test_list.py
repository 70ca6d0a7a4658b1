"""The record as the API lists it: who may, which entries, in which pages."""

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.audit.conftest import AUDIT, Entry, record_of
from tests.doors import Door, Native
from tests.stack import Customer, Stack

NEW = {"name": "listed", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}


@pytest.fixture(scope="module")
async def owner(stack: Stack) -> Customer:
    """A customer in whose record are changes and refusals, by a login and by two tokens."""
    customer = await stack.customer()
    reader = await customer.new_token(name="reader", scope="read")
    assert (await customer.call("POST", "/api/portal/databases", json=NEW)).status_code == 201
    for token in (customer.token, reader["token"]):
        for name in ("gone", "lost"):
            await customer.call("DELETE", f"/api/portal/databases/{name}", token=token)
    await customer.new_token(name="last")
    return customer


@pytest.fixture(scope="module")
async def whole(owner: Customer) -> list[Entry]:
    """That customer's whole record."""
    return await record_of(owner)


async def test_the_record_is_in_its_order(whole: list[Entry]) -> None:
    """Entries are numbered from 1 on without a gap, and listed by that."""
    assert [entry["sequence"] for entry in whole] == list(range(1, 10))
    assert {entry["outcome"] for entry in whole} == {"ok", "not_found", "scope_denied"}


@pytest.mark.parametrize("field", ["action", "outcome", "credential", "ip", "target"])
async def test_a_filter_leaves_what_fits(owner: Customer, whole: list[Entry], door: Door, field: str) -> None:
    """Each filter leaves exactly the entries that have this value, and none for a value that nothing has."""
    headers = {"authorization": f"Bearer {owner.token}"}
    for value in {entry[field] for entry in whole if field in entry}:
        answer = await door.call("ListAuditEntries", {field: value}, **headers)
        assert answer.result == [entry for entry in whole if entry.get(field) == value], value
    assert (await door.call("ListAuditEntries", {field: "none"}, **headers)).result == []


async def test_a_target_is_found_by_its_name_too(owner: Customer, whole: list[Entry]) -> None:
    """The filter by target takes an id or a name."""
    found = await record_of(owner, target="listed")
    assert [entry["action"] for entry in found] == ["database.create"]
    assert await record_of(owner, target=found[0]["target"]) == found
    assert await record_of(owner, target="gone") == [entry for entry in whole if entry.get("target_name") == "gone"]


async def test_all_filters_must_fit(owner: Customer, whole: list[Entry]) -> None:
    """Several filters leave what fits each of them."""
    wanted = {"action": "database.delete", "outcome": "scope_denied", "target": "lost"}
    (found,) = await record_of(owner, **wanted)
    assert found["outcome"] == "scope_denied"
    assert found in whole
    assert await record_of(owner, **{**wanted, "credential": whole[0].get("credential", "none")}) == []


async def test_a_time_is_from_and_before(owner: Customer, whole: list[Entry]) -> None:
    """`since` has the entry of that very time, `until` has not."""
    by_time = sorted(whole, key=lambda entry: datetime.fromisoformat(entry["created_at"]))
    for index in (0, 4, len(by_time) - 1):
        moment = by_time[index]["created_at"]
        since, until = await record_of(owner, since=moment), await record_of(owner, until=moment)
        assert by_time[index] in since
        assert by_time[index] not in until
        assert sorted([*since, *until], key=lambda entry: int(entry["sequence"])) == whole
    last = datetime.fromisoformat(by_time[-1]["created_at"])
    assert await record_of(owner, since=(last + timedelta(seconds=1)).isoformat()) == []
    window = await record_of(owner, since=by_time[2]["created_at"], until=by_time[3]["created_at"])
    assert window == [entry for entry in by_time if entry["created_at"] == by_time[2]["created_at"]]


async def test_the_links_keep_the_filters(owner: Customer, whole: list[Entry], native: Native) -> None:
    """Following `Link` gives every entry that fits, once; a native caller gets the same pages by their token."""
    wanted = {"outcome": "not_found", "ip": "127.0.0.1", "since": "2020-01-01T00:00:00Z"}
    fitting = [entry for entry in whole if entry["outcome"] == "not_found"]
    answer = await owner.call("GET", AUDIT, params={**wanted, "page_size": 1})
    token = answer.links["next"]["url"].rpartition("=")[2]
    pages = [answer.json()]
    while "next" in answer.links:
        answer = await owner.call("GET", answer.links["next"]["url"])
        pages.append(answer.json())
    assert pages == [[entry] for entry in fitting]
    page = await native.call(
        "ListAuditEntries", {**wanted, "page_size": 1, "page_token": token}, authorization=f"Bearer {owner.token}"
    )
    assert page.result == pages[1]


async def test_nobody_sees_anothers_record(stack: Stack, owner: Customer, whole: list[Entry]) -> None:
    """A record shows its own account's entries only, whatever is asked for."""
    stranger = await stack.customer()
    ids = {entry["request_id"] for entry in whole}
    for filters in ({}, {"target": "listed"}, {"credential": whole[-1]["credential"]}, {"page_token": "MQ"}):
        assert not ids & {entry["request_id"] for entry in await record_of(stranger, **filters)}
    assert await record_of(owner) == whole


async def test_who_may_read_it(owner: Customer, door: Door) -> None:
    """A login may, and a token of any scope; one with other permissions may not."""
    scopes: list[dict[str, Any]] = [{"scope": "read"}, {"scope": "databases"}, {"permissions": ["audit:list"]}]
    *allowed, refused = await asyncio.gather(
        *(owner.new_token(**wanted) for wanted in (*scopes, {"permissions": ["databases:list"]}))
    )
    for made in allowed:
        answer = await door.call("ListAuditEntries", authorization=f"Bearer {made['token']}")
        assert (answer.code, answer.result[0]["sequence"]) == ("ok", 1)
    assert (await door.call("ListAuditEntries", cookie=owner.cookie)).code == "ok"
    answer = await door.call("ListAuditEntries", authorization=f"Bearer {refused['token']}")
    assert (answer.code, "audit:list" in answer.sentence) == ("scope_denied", True)


@pytest.mark.parametrize(
    "query",
    [
        {"page_size": -1},
        {"page_size": 1001},
        {"page_token": "!"},
        {"page_token": "dGtfMQ"},  # an id, where a number belongs
        {"action": "x" * 65},
        {"target": "x" * 129},
        {"since": "yesterday"},
        {"until": "0000-01-01T00:00:00Z"},
        {"limit": 1},
    ],
)
async def test_what_cannot_be_asked(owner: Customer, query: dict[str, Any]) -> None:
    """A filter that is too long, no time, or none that there is, is refused."""
    answer = await owner.call("GET", AUDIT, params=query)
    assert (answer.status_code, answer.json()["code"] in {"invalid_field", "invalid_request"}) == (400, True)
