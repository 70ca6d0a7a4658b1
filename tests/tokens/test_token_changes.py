"""A token is changed: its name, its addresses, its end."""

from datetime import datetime, timedelta
from typing import Any

import pytest

from controlplane.tokens.expiry import end_what_is_over
from tests.clock import MovableClock
from tests.doors import Door, Native, Rest
from tests.stack import Customer, Stack

ELSEWHERE = "203.0.113.7"


def login(customer: Customer) -> dict[str, str]:
    """Return the headers of a login, for a door."""
    return {"cookie": customer.cookie, "sec_fetch_site": "same-origin"}


def bearer(made: dict[str, Any]) -> dict[str, str]:
    """Return the header of a token."""
    return {"authorization": f"Bearer {made['token']}"}


def path(made: dict[str, Any]) -> str:
    """Return where a token is."""
    return f"/api/portal/tokens/{made['id']}"


async def test_what_is_not_named_stays(somebody: Customer, door: Door) -> None:
    """A change of one thing leaves the rest alone, the secret too, and each change gives another ETag."""
    made = await somebody.new_token(name="old", scope="read", allowed_ips=["127.0.0.1"], rate_limit_per_minute=9)
    secret = made.pop("token")
    changes: list[dict[str, Any]] = [
        {"name": "new"},
        {"allowed_ips": ["127.0.0.0/8", "2001:db8::1"]},
        {"expires_at": "2099-01-31T12:00:00Z"},
        {},
    ]
    expected, tags = made, set()
    for change in changes:
        answer = await door.call("UpdateToken", {"id": made["id"], "token": change}, **login(somebody))
        expected = {**expected, **change}
        assert (answer.code, answer.result) == ("ok", {**answer.result, **expected}), answer.sentence
        assert "token" not in answer.result
        tags.add(answer.headers["etag"])
    assert len(tags) == len(changes)
    assert (await somebody.by_login("GET", path(made))).json() == expected
    assert (await door.call("ListDatabases", authorization=f"Bearer {secret}")).code == "ok"


async def test_the_next_request_obeys_the_new_list(somebody: Customer, door: Door) -> None:
    """A token whose list is changed is refused or let in by the new list at once; an empty list is everywhere."""
    made = await somebody.new_token()
    for addresses, code in (
        ([ELSEWHERE], "ip_denied"),
        ([ELSEWHERE, "127.0.0.0/8"], "ok"),
        (["2001:db8::/32"], "ip_denied"),
        ([], "ok"),
        (["::ffff:127.0.0.1"], "ok"),
    ):
        change = {"id": made["id"], "token": {"allowed_ips": addresses}}
        assert (await door.call("UpdateToken", change, **login(somebody))).code == "ok"
        assert (await door.call("ListDatabases", **bearer(made))).code == code, addresses


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"name": ""}, "name", "1"),
        ({"name": "a" * 101}, "name", "100"),
        ({"allowed_ips": ["127.0.0.1", "10.0.0.1/8"]}, "allowed_ips[1]", "write '10.0.0.0/8'"),
        ({"allowed_ips": ["0.0.0.0/0"]}, "allowed_ips[0]", "leave the list empty"),
        ({"allowed_ips": [""]}, "allowed_ips[0]", "neither"),
        ({"allowed_ips": ["10.0.0.1", 7]}, "allowed_ips", "must be a list of at most 100 addresses"),
        ({"allowed_ips": [["10.0.0.1"]]}, "allowed_ips", "must be a list of at most 100 addresses"),
        ({"allowed_ips": [None]}, "allowed_ips", "must be a list of at most 100 addresses"),
        ({"allowed_ips": ["1" * 65]}, "allowed_ips", "must be a list of at most 100 addresses"),
        ({"allowed_ips": {}}, "allowed_ips", "must be a list of at most 100 addresses"),
        ({"allowed_ips": None}, "allowed_ips", "must be a list of at most 100 addresses"),
        ({"allowed_ips": ["10.0.0.1"] * 101}, "allowed_ips", "100"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at", "future"),
        ({"expires_at": "tomorrow"}, "expires_at", "such as 2027-01-31T12:00:00Z"),
        ({"expires_at": ""}, "expires_at", "such as"),
        ({"expires_at": "2099-01-31"}, "expires_at", "such as"),
        ({"expires_at": "2099-13-31T12:00:00Z"}, "expires_at", "such as"),
        ({"expires_at": "9999-12-31T23:59:59-23:59"}, "expires_at", ""),
        ({"expires_at": 4102444800}, "expires_at", "string"),
        ({"expires_at": False}, "expires_at", "null for never"),
        ({"expires_at": {}}, "expires_at", "null for never"),
    ],
)
async def test_a_change_that_cannot_be(
    somebody: Customer, door: Door, change: dict[str, Any], field: str, words: str
) -> None:
    """A change that breaks a rule is refused for the field, and nothing of it is done."""
    made = await somebody.new_token(name="kept", allowed_ips=["127.0.0.1"])
    wanted = {"id": made["id"], "token": {"name": "changed", **change}}
    answer = await door.call("UpdateToken", wanted, **login(somebody))
    assert answer.code == "invalid_field"
    assert [name.removeprefix("token.") for name in answer.fields] == [field]
    assert words in next(iter(answer.fields.values()))
    shown = (await somebody.by_login("GET", path(made))).json()
    assert (shown["name"], shown["allowed_ips"], "expires_at" in shown) == ("kept", ["127.0.0.1"], False)


async def test_only_what_can_be_changed_is_a_field(somebody: Customer) -> None:
    """What a token may do is no field of a change, and a body that names it is refused as a whole."""
    made = await somebody.new_token(name="kept", scope="read")
    for body in ({"scope": "full"}, {"permissions": ["*:*"]}, {"rate_limit_per_minute": 1}, {"status": "active"}):
        answer = await somebody.by_login("PATCH", path(made), json={"name": "changed", **body})
        assert (answer.status_code, next(iter(body)) in answer.json()["error"]) == (400, True)
    assert (await somebody.by_login("GET", path(made))).json()["name"] == "kept"


async def test_a_stale_change_is_refused(somebody: Customer, door: Door) -> None:
    """A change with an ETag from before another change is a 412 and does nothing."""
    made = await somebody.new_token(name="first")
    tag = (await somebody.by_login("GET", path(made))).headers["etag"]
    change = {"id": made["id"], "token": {"name": "second"}}
    assert (await door.call("UpdateToken", change, if_match=tag, **login(somebody))).code == "ok"
    change["token"] = {"name": "third"}
    assert (await door.call("UpdateToken", change, if_match=tag, **login(somebody))).code == "stale"
    assert (await somebody.by_login("GET", path(made))).json()["name"] == "second"


async def test_a_revoked_token_is_not_changed(somebody: Customer, stack: Stack, door: Door) -> None:
    """A revoked token keeps its name and stays revoked; another account's token is not there at all."""
    made = await somebody.new_token(name="gone")
    assert (await somebody.by_login("DELETE", path(made))).status_code == 200
    change = {"id": made["id"], "token": {"name": "back", "expires_at": None}}
    refused = await door.call("UpdateToken", change, **login(somebody))
    assert (refused.code, "revoked" in refused.sentence) == ("conflict", True)
    shown = (await somebody.by_login("GET", path(made))).json()
    assert (shown["name"], shown["status"]) == ("gone", "revoked")
    stranger = await stack.customer()
    assert (await door.call("UpdateToken", change, **login(stranger))).code == "not_found"


async def test_a_token_gets_more_or_less_time(timed: tuple[Stack, MovableClock]) -> None:
    """A token lives until the end that it was last given; with null it never ends."""
    stack, clock = timed
    customer = await stack.customer()
    made = await customer.new_token()

    async def works_until(end: datetime | None) -> bool:
        wanted = end.isoformat() if end else None
        assert (await customer.by_login("PATCH", path(made), json={"expires_at": wanted})).status_code == 200
        return (await Rest(stack.rest).call("ListDatabases", **bearer(made))).code == "ok"

    assert await works_until(clock.now() + timedelta(minutes=10))
    clock.let_pass(minutes=9)
    assert await works_until(clock.now() + timedelta(minutes=2))
    clock.let_pass(minutes=3)
    assert (await Native(stack.channel).call("ListDatabases", **bearer(made))).code == "unauthenticated"
    assert await works_until(clock.now() + timedelta(minutes=1))
    assert (await customer.by_login("GET", path(made))).json()["status"] == "active"
    assert await works_until(None)
    clock.let_pass(minutes=90)
    assert await works_until(None)
    assert "expires_at" not in (await customer.by_login("GET", path(made))).json()


async def test_a_token_that_comes_back_counts_again(timed: tuple[Stack, MovableClock]) -> None:
    """An expired token gives its place back; it comes back only where there is a place, which it takes once."""
    stack, clock = timed
    customer = await stack.customer(plan="small")
    made = await customer.new_token(expires_at=(clock.now() + timedelta(minutes=1)).isoformat())
    await customer.new_token()
    clock.let_pass(minutes=2)
    full = await customer.by_login("POST", "/api/portal/tokens", json={"name": "before it has given its place back"})
    assert full.status_code in {201, 402}  # the server itself looks every ten seconds
    await end_what_is_over(stack.server.store, clock)
    if full.status_code == 402:
        await customer.new_token()
    refused = await customer.by_login("PATCH", path(made), json={"expires_at": None})
    assert (refused.status_code, "3 of 3 tokens" in refused.json()["error"]) == (402, True)
    assert (await Rest(stack.rest).call("ListDatabases", **bearer(made))).code == "unauthenticated"
    others = [
        token for token in (await customer.by_login("GET", "/api/portal/tokens")).json() if token["id"] != made["id"]
    ]
    assert (await customer.by_login("DELETE", path(others[-1]))).status_code == 200
    for _ in range(2):
        assert (await customer.by_login("PATCH", path(made), json={"expires_at": None})).status_code == 200
    assert (await Rest(stack.rest).call("ListDatabases", **bearer(made))).code == "ok"
    account = (await customer.call("GET", "/api/portal/account")).json()
    assert account["quotas"]["tokens"]["used"] == 3
    assert (await customer.by_login("POST", "/api/portal/tokens", json={"name": "fourth"})).status_code == 402
