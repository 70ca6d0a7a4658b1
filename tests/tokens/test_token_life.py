"""The life of an API token: made, used, rotated, revoked, expired."""

import asyncio
import time
from datetime import timedelta
from typing import Any

import pytest
from sqlmodel import col, update

from controlplane.access.credentials import Credentials
from controlplane.access.secrets import is_well_formed_token, new_token
from controlplane.accounts.model import Account
from controlplane.errors import Unauthenticated
from controlplane.sql import Store
from controlplane.tokens.model import Token
from tests.clock import MovableClock
from tests.doors import Door, Rest
from tests.stack import PASSWORD, Customer, Stack, eventually, free_port

TOKENS = "/api/portal/tokens"


def bearer(token: str) -> dict[str, str]:
    """Return the header of a token."""
    return {"authorization": f"Bearer {token}"}


async def shown(customer: Customer, token_id: str) -> dict[str, Any]:
    """Return a token as the API shows it."""
    found: dict[str, Any] = (await customer.by_login("GET", f"{TOKENS}/{token_id}")).json()
    return found


async def test_a_token_is_shown_once_and_works_at_once(somebody: Customer, door: Door) -> None:
    """The create answers with the whole secret, which nothing shows again."""
    made = await somebody.new_token(name="ci", scope="databases", allowed_ips=["127.0.0.1"], rate_limit_per_minute=9)
    secret = made.pop("token")
    assert is_well_formed_token(secret)
    assert made["prefix"] == secret[:8]
    assert (made["name"], made["scope"], made["status"]) == ("ci", "databases", "active")
    assert (made["allowed_ips"], made["rate_limit_per_minute"]) == (["127.0.0.1"], 9)
    assert not {"expires_at", "revoked_at", "rotated_at"} & set(made)
    assert (await door.call("ListDatabases", **bearer(secret))).code == "ok"
    listed = await somebody.by_login("GET", TOKENS)
    assert listed.json()[-1] == await shown(somebody, made["id"]) == made
    assert secret not in listed.text


async def test_a_mistyped_token_costs_no_query(stack: Stack) -> None:
    """A token whose checksum does not fit is refused though there is no database to ask; another needs one."""
    nowhere = Store(f"postgresql+asyncpg://nobody@127.0.0.1:{free_port()}/nothing")
    credentials = Credentials(store=nowhere, keys=stack.server.keys, catalog=stack.server.catalog)
    token = new_token()
    mistyped = token[:10] + ("a" if token[10] != "a" else "b") + token[11:]
    with pytest.raises(Unauthenticated):
        await credentials.find_caller(bearer(mistyped))
    with pytest.raises(OSError, match="Connect call failed"):
        await credentials.find_caller(bearer(token))
    await nowhere.close()


async def test_a_token_without_a_scope_is_full(somebody: Customer, stack: Stack) -> None:
    """The scope is `full` when none is wanted, and for rows from before there were scopes."""
    made = await somebody.new_token()
    assert made["scope"] == "full"
    async with stack.server.store.session() as session:
        await session.execute(update(Token).where(col(Token.id) == made["id"]).values(scope=None))
        await session.commit()
    body = {"name": "by-old-token", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}
    created = await somebody.call("POST", "/api/portal/databases", json=body, token=made["token"])
    assert (created.status_code, (await shown(somebody, made["id"]))["scope"]) == (201, "full")


async def test_a_rotated_token_is_another_secret_of_the_same_token(somebody: Customer, door: Door) -> None:
    """A rotation keeps id, name, scope and addresses; the old secret is dead when the answer arrives."""
    made = await somebody.new_token(name="ci", scope="read", allowed_ips=["127.0.0.0/8"])
    rotated = (await somebody.by_login("POST", f"{TOKENS}/{made['id']}/rotate")).json()
    assert is_well_formed_token(rotated["token"])
    assert rotated["token"] != made["token"]
    assert rotated["prefix"] == rotated["token"][:8]
    assert rotated["rotated_at"] >= made["created_at"]
    same = ("id", "name", "scope", "allowed_ips", "rate_limit_per_minute", "status", "created_at")
    assert {name: rotated[name] for name in same} == {name: made[name] for name in same}
    assert (await door.call("ListDatabases", **bearer(made["token"]))).code == "unauthenticated"
    assert (await door.call("ListDatabases", **bearer(rotated["token"]))).code == "ok"


async def test_one_of_many_rotations_at_once_is_the_last(somebody: Customer) -> None:
    """Twenty parallel rotations all answer, and exactly one of their secrets works: the one that is stored."""
    made = await somebody.new_token()
    rotate = (somebody.by_login("POST", f"{TOKENS}/{made['id']}/rotate") for _ in range(20))
    answers = await asyncio.gather(*rotate)
    assert {answer.status_code for answer in answers} == {200}
    secrets = [answer.json()["token"] for answer in answers]
    assert len(set(secrets)) == 20
    tried = await asyncio.gather(*(somebody.call("GET", "/api/portal/account", token=secret) for secret in secrets))
    alive = [secret for secret, answer in zip(secrets, tried, strict=True) if answer.status_code == 200]
    assert len(alive) == 1
    assert (await shown(somebody, made["id"]))["prefix"] == alive[0][:8]


@pytest.mark.parametrize("end", ["revoke", "rotate"])
async def test_the_next_request_is_refused_while_others_are_under_way(somebody: Customer, door: Door, end: str) -> None:
    """No request that is sent after the answer to a revocation gets in, however many others are being answered."""
    made = await somebody.new_token()
    headers, stopped = bearer(made["token"]), asyncio.Event()
    outcomes: list[tuple[float, float, str]] = []

    async def ask() -> None:
        while not stopped.is_set():
            began = time.monotonic()
            code = (await door.call("ListDatabases", **headers)).code
            outcomes.append((began, time.monotonic(), code))

    async def asked_since(start: float) -> bool:
        return sum(began > start for began, _, _ in outcomes) >= 40

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(ask())
        await eventually(lambda: asked_since(0))
        sent = time.monotonic()
        path = f"{TOKENS}/{made['id']}"
        ending = ("DELETE", path) if end == "revoke" else ("POST", f"{path}/rotate")
        assert (await somebody.by_login(*ending)).status_code == 200
        dead = time.monotonic()
        await eventually(lambda: asked_since(dead))
        stopped.set()
    assert {code for _, ended, code in outcomes if ended < sent} == {"ok"}
    assert {code for began, _, code in outcomes if began > dead} == {"unauthenticated"}


async def test_a_revoked_token_stays_listed(somebody: Customer) -> None:
    """A revocation keeps the token in the list, once more changes nothing, and there is no way back."""
    made = await somebody.new_token(name="gone")
    path = f"{TOKENS}/{made['id']}"
    revoked = (await somebody.by_login("DELETE", path)).json()
    assert revoked["status"] == "revoked"
    assert revoked["revoked_at"] >= made["created_at"]
    assert (await somebody.by_login("DELETE", path)).json() == revoked
    assert revoked in (await somebody.by_login("GET", TOKENS)).json()
    rotated = await somebody.by_login("POST", f"{path}/rotate")
    assert (rotated.status_code, rotated.json()["code"]) == (409, "conflict")
    assert "revoked" in rotated.json()["error"]


async def test_a_revoked_token_gives_its_place_back(stack: Stack) -> None:
    """The quota of tokens counts those that are not revoked, and a second revocation frees nothing more."""
    customer = await stack.customer(plan="small")
    second, _ = await customer.new_token(), await customer.new_token()
    full = await customer.by_login("POST", TOKENS, json={"name": "fourth"})
    assert (full.status_code, full.json()["code"]) == (402, "quota_exceeded")
    for _ in range(2):
        assert (await customer.by_login("DELETE", f"{TOKENS}/{second['id']}")).status_code == 200
    await customer.new_token()
    assert (await customer.by_login("POST", TOKENS, json={"name": "fifth"})).status_code == 402


async def test_an_expired_token_is_refused_from_that_moment(timed: tuple[Stack, MovableClock]) -> None:
    """A token works until it expires; then it is refused, listed as expired, and cannot be rotated."""
    stack, clock = timed
    customer = await stack.customer()
    made = await customer.new_token(expires_at=(clock.now() + timedelta(minutes=5)).isoformat())
    clock.let_pass(minutes=4)
    assert (await customer.call("GET", "/api/portal/account", token=made["token"])).status_code == 200
    clock.let_pass(minutes=1)
    assert (await Rest(stack.rest).call("ListDatabases", **bearer(made["token"]))).code == "unauthenticated"
    assert (await shown(customer, made["id"]))["status"] == "expired"
    rotated = await customer.by_login("POST", f"{TOKENS}/{made['id']}/rotate")
    assert (rotated.status_code, "expired" in rotated.json()["error"]) == (409, True)


async def test_a_disabled_account_is_refused_by_the_next_request(stack: Stack, customer: Customer, door: Door) -> None:
    """Whoever disables an account, in another process too, ends all its tokens and logins; enabled, they work again."""
    calls: list[tuple[str, Any, dict[str, str]]] = [
        ("ListDatabases", None, bearer(customer.token)),
        ("ListDatabases", None, {"cookie": customer.cookie}),
        ("CreateSession", {"session": {"email": customer.email, "password": PASSWORD}}, {}),
    ]
    elsewhere = Store(stack.settings.storage_url)
    for disabled_at, code in ((None, "ok"), (stack.clock.now(), "unauthenticated"), (None, "ok")):
        async with elsewhere.session() as session:
            mine = col(Account.id) == customer.account_id
            await session.execute(update(Account).where(mine).values(disabled_at=disabled_at))
            await session.commit()
        assert {(await door.call(rpc, request, **headers)).code for rpc, request, headers in calls} == {code}
    await elsewhere.close()


@pytest.mark.parametrize(
    ("wanted", "field", "words"),
    [
        ({}, "name", "required"),
        ({"name": ""}, "name", "required"),
        ({"name": "a" * 101}, "name", "100"),
        ({"scope": "admin"}, "scope", "full"),
        ({"scope": ""}, "scope", "full"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at", "future"),
        ({"rate_limit_per_minute": 0}, "rate_limit_per_minute", "1"),
        ({"allowed_ips": [""]}, "allowed_ips[0]", "1"),
        ({"allowed_ips": ["10.0.0.1"] * 101}, "allowed_ips", "100"),
        ({"allowed_ips": ["127.0.0.1", "10.0.0.1/8"]}, "allowed_ips[1]", "write '10.0.0.0/8'"),
        ({"allowed_ips": ["2001:db8::1/32"]}, "allowed_ips[0]", "write '2001:db8::/32'"),
        ({"allowed_ips": ["fe80::1%eth0"]}, "allowed_ips[0]", "zone"),
        ({"allowed_ips": ["0.0.0.0/0"]}, "allowed_ips[0]", "leave the list empty"),
        ({"allowed_ips": ["::/0"]}, "allowed_ips[0]", "leave the list empty"),
        ({"allowed_ips": ["example.com"]}, "allowed_ips[0]", "neither an IP address nor a network"),
        ({"allowed_ips": ["010.0.0.1"]}, "allowed_ips[0]", "neither"),
        ({"allowed_ips": ["10.0.0.1/255.0.0.0"]}, "allowed_ips[0]", ""),
        ({"allowed_ips": ["10.0.0"]}, "allowed_ips[0]", "neither"),
        ({"allowed_ips": [" 10.0.0.1"]}, "allowed_ips[0]", "neither"),
        ({"allowed_ips": ["::ffff:0:0/96"]}, "allowed_ips[0]", "leave the list empty"),
    ],
)
async def test_a_token_that_cannot_be_made(somebody: Customer, wanted: dict[str, Any], field: str, words: str) -> None:
    """What is wrong with a wish is said of the field that is wrong, and nothing is made."""
    named = {"name": "impossible", **wanted} if wanted else {}
    answer = await Rest(somebody.stack.rest).call(
        "CreateToken", {"token": named}, cookie=somebody.cookie, sec_fetch_site="same-origin"
    )
    assert answer.code == "invalid_field"
    assert list(answer.fields) == [field]
    assert words in answer.fields[field]
    assert not [token for token in (await somebody.by_login("GET", TOKENS)).json() if token["name"] == "impossible"]


async def test_every_wrong_address_is_named(somebody: Customer) -> None:
    """Of several wrong addresses each is named, in one answer."""
    answer = await somebody.by_login("POST", TOKENS, json={"name": "a", "allowed_ips": ["x", "10.0.0.1", "y"]})
    assert [entry["field"] for entry in answer.json()["fields"]] == ["allowed_ips[0]", "allowed_ips[2]"]


async def test_addresses_are_kept_in_one_form(somebody: Customer) -> None:
    """Addresses and networks come back in their shortest form, mapped ones as the IPv4 that they are."""
    wanted = ["::ffff:203.0.113.7", "2001:0db8:0:0::1", "198.51.100.0/24", "10.0.0.1/32", "::ffff:10.0.0.0/104"]
    made = await somebody.new_token(allowed_ips=wanted)
    assert made["allowed_ips"] == ["203.0.113.7", "2001:db8::1", "198.51.100.0/24", "10.0.0.1", "10.0.0.0/8"]


async def test_no_token_asks_more_often_than_the_plan_allows(stack: Stack) -> None:
    """A higher limit than the plan's is the plan's."""
    customer = await stack.customer(plan="small")
    assert (await customer.new_token(rate_limit_per_minute=1_000_000))["rate_limit_per_minute"] == 100_000
