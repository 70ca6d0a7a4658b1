"""Permissions of a token's own; what a token has used, and the least that would have done."""

from typing import Any

import pytest

from controlplane.access.permissions import SCOPES, permissions_of
from controlplane.tokens.model import TokenPermission
from tests.doors import Door, Rest
from tests.stack import Customer, Stack

TOKENS = "/api/portal/tokens"
NEW = {"name": "a", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}


async def use(customer: Customer, made: dict[str, Any], *rpcs: str) -> dict[str, Any]:
    """Call these RPCs with a token, have it written, and return the token as it is shown then."""
    door = Rest(customer.stack.rest)
    requests = {"GetDatabase": {"name": "nowhere"}, "DeleteDatabase": {"name": "nowhere"}}
    for rpc in rpcs:
        answer = await door.call(rpc, requests.get(rpc), authorization=f"Bearer {made['token']}")
        assert answer.code in {"ok", "not_found"}, (rpc, answer.sentence)
    await customer.stack.server.uses.flush()
    shown: dict[str, Any] = (await customer.by_login("GET", f"{TOKENS}/{made['id']}")).json()
    return shown


async def rotate(customer: Customer, made: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """Rotate a token."""
    rotated: dict[str, Any] = (await customer.by_login("POST", f"{TOKENS}/{made['id']}/rotate", json=wanted)).json()
    return rotated


@pytest.mark.parametrize("scope", SCOPES)
async def test_a_scope_is_shown_with_its_permissions(somebody: Customer, scope: str) -> None:
    """A token of a scope shows what the scope stands for."""
    made = await somebody.new_token(scope=scope)
    assert (made["scope"], made["permissions"]) == (scope, sorted(permissions_of(scope)))


async def test_a_token_has_exactly_the_permissions_that_it_was_given(somebody: Customer, door: Door) -> None:
    """A token with permissions of its own has each once, its scope is `custom`, and a refusal names them."""
    wanted = ["databases:list", "account:get", "databases:list"]
    made = await somebody.new_token(permissions=wanted)
    assert (made["scope"], made["permissions"]) == ("custom", ["account:get", "databases:list"])
    assert {**made, "token": ""} == {**(await use(somebody, made)), "token": ""}
    headers = {"authorization": f"Bearer {made['token']}"}
    assert (await door.call("ListDatabases", **headers)).code == "ok"
    refused = await door.call("CreateDatabase", {"database": NEW}, **headers)
    assert refused.code == "scope_denied"
    assert "needs databases:create, and the token has the permissions account:get, databases:list" in refused.sentence


@pytest.mark.parametrize(
    ("wanted", "fields"),
    [
        ({"permissions": ["databases:list"], "scope": "read"}, {"permissions": "give the one or the other"}),
        ({"permissions": ["databases:list"], "scope": "full"}, {"permissions": "give the one or the other"}),
        (
            {"permissions": ["databases:list", "volumes:list", "databases:get", "volumes:*"]},
            {"permissions[1]": "there is no 'volumes:list'", "permissions[3]": "there is no 'volumes:*'"},
        ),
        ({"permissions": ["databases:drop"]}, {"permissions[0]": "there is no 'databases:drop'"}),
        ({"permissions": ["tokens:create"]}, {"permissions[0]": "there is no 'tokens:create'"}),
        ({"permissions": ["*:list"]}, {"permissions": "a list of 1 to 100 permissions"}),
        ({"permissions": ["*"]}, {"permissions": "a list of 1 to 100 permissions"}),
        ({"permissions": ["Databases:list"]}, {"permissions": "a list of 1 to 100 permissions"}),
        ({"permissions": ["databases:list "]}, {"permissions": "a list of 1 to 100 permissions"}),
        ({"permissions": ["databases:list"] * 101}, {"permissions": "a list of 1 to 100 permissions"}),
        ({"permissions": []}, {"permissions": "a list of 1 to 100 permissions"}),
        ({"permissions": {}}, {"permissions": "a list of 1 to 100 permissions"}),
    ],
)
async def test_permissions_that_cannot_be(somebody: Customer, wanted: dict[str, Any], fields: dict[str, str]) -> None:
    """A permission that no RPC needs, or one beside a scope, is refused by its place in the list."""
    answer = await Rest(somebody.stack.rest).call(
        "CreateToken", {"token": {"name": "a", **wanted}}, cookie=somebody.cookie, sec_fetch_site="same-origin"
    )
    assert (answer.code, set(answer.fields)) == ("invalid_field", set(fields))
    assert all(words in answer.fields[field] for field, words in fields.items())


@pytest.mark.parametrize(
    ("wanted", "used", "least"),
    [
        ({"scope": "full"}, [], None),
        ({"scope": "full"}, ["ListDatabases"], {"scope": "read", "permissions": ["databases:list"]}),
        ({"scope": "full"}, ["DeleteDatabase"], {"scope": "databases", "permissions": ["databases:delete"]}),
        ({"scope": "databases"}, ["ListDatabases"], {"scope": "read", "permissions": ["databases:list"]}),
        ({"scope": "databases"}, ["DeleteDatabase"], {"permissions": ["databases:delete"]}),
        ({"scope": "read"}, ["ListPlans", "GetAccount"], {"permissions": ["account:get", "catalog:list"]}),
        ({"permissions": ["databases:*"]}, ["GetDatabase"], {"permissions": ["databases:get"]}),
        ({"permissions": ["databases:list", "databases:get"]}, ["ListDatabases"], {"permissions": ["databases:list"]}),
        ({"permissions": ["databases:list"]}, ["ListDatabases"], None),
        ({"permissions": ["functions:*"]}, ["ListFunctions"], {"permissions": ["functions:list"]}),
        ({"permissions": ["*:*"]}, ["ListFunctions"], {"scope": "read", "permissions": ["functions:list"]}),
        ({"scope": "full"}, ["GetMe"], None),
    ],
)
async def test_the_least_that_would_have_done(
    somebody: Customer, wanted: dict[str, Any], used: list[str], least: dict[str, Any] | None
) -> None:
    """A token shows what it has used, and of narrower scopes the narrowest; nothing where it has no more than that."""
    made = await somebody.new_token(**wanted)
    shown = await use(somebody, made, *used)
    assert shown.get("least_privilege") == least
    if least is not None:
        assert shown["used_permissions"] == least["permissions"]
    assert shown in (await somebody.by_login("GET", TOKENS)).json()


async def test_what_was_refused_was_not_used(somebody: Customer, door: Door) -> None:
    """A permission that a token lacked is not among those that it has used."""
    made = await somebody.new_token(scope="read")
    headers = {"authorization": f"Bearer {made['token']}"}
    assert (await door.call("DeleteDatabase", {"name": "nowhere"}, **headers)).code == "scope_denied"
    assert (await use(somebody, made, "ListDatabases"))["used_permissions"] == ["databases:list"]


async def test_a_rotation_narrows_to_a_scope(somebody: Customer, door: Door) -> None:
    """`narrow` gives a token the narrower scope that would have done; both secrets have it, also in a grace."""
    made = await somebody.new_token(scope="full")
    await use(somebody, made, "ListDatabases")
    rotated = await rotate(somebody, made, narrow=True, grace_seconds=60)
    assert (rotated["scope"], rotated["permissions"]) == ("read", sorted(permissions_of("read")))
    for secret in (made["token"], rotated["token"]):
        headers = {"authorization": f"Bearer {secret}"}
        assert (await door.call("DeleteDatabase", {"name": "nowhere"}, **headers)).code == "scope_denied"
        assert (await door.call("ListDatabases", **headers)).code == "ok"


async def test_a_rotation_narrows_to_permissions(somebody: Customer) -> None:
    """Where no narrower scope would have done, `narrow` leaves exactly what was used; once more changes nothing."""
    made = await somebody.new_token(scope="databases")
    await use(somebody, made, "DeleteDatabase", "ListDatabases")
    for _ in range(2):
        rotated = await rotate(somebody, made, narrow=True)
        assert (rotated["scope"], rotated["permissions"]) == ("custom", ["databases:delete", "databases:list"])
        assert "least_privilege" not in rotated
    shown = await use(somebody, rotated, "DeleteDatabase")
    assert shown["used_permissions"] == ["databases:delete", "databases:list"]


async def test_a_rotation_narrows_only_when_it_is_asked_to(somebody: Customer) -> None:
    """Without `narrow`, or before a token was used, a rotation leaves it what it has."""
    made = await somebody.new_token(scope="full")
    assert (await rotate(somebody, made, narrow=True))["scope"] == "full"
    rotated = await rotate(somebody, made)
    await use(somebody, rotated, "ListDatabases")
    again = await rotate(somebody, made)
    assert (again["scope"], again["least_privilege"]["scope"]) == ("full", "read")


async def test_narrowing_never_widens(somebody: Customer, stack: Stack) -> None:
    """What a token used and may use no more comes back by no rotation."""
    made = await somebody.new_token(permissions=["databases:list", "databases:get"])
    async with stack.server.store.session() as session:
        session.add(TokenPermission(token_id=made["id"], permission="databases:delete"))
        await session.commit()
    shown = await use(somebody, made, "ListDatabases")
    assert shown["used_permissions"] == ["databases:delete", "databases:list"]
    assert shown["least_privilege"] == {"permissions": ["databases:list"]}
    assert (await rotate(somebody, made, narrow=True))["permissions"] == ["databases:list"]
