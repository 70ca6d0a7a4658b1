"""A rotation with a grace: for a while, the old secret goes on beside the new one."""

import asyncio
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlmodel import col, select

from controlplane.tokens.expiry import end_what_is_over
from controlplane.tokens.model import Token
from tests.clock import MovableClock
from tests.doors import Door, Native, Rest
from tests.stack import Customer, Stack

Timed = tuple[Stack, MovableClock]


async def rotate(customer: Customer, made: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """Rotate a token and return it as the answer shows it."""
    answer = await customer.by_login("POST", f"/api/portal/tokens/{made['id']}/rotate", json=wanted)
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def show(customer: Customer, made: dict[str, Any]) -> dict[str, Any]:
    """Return a token as it is shown now."""
    await customer.stack.server.uses.flush()
    shown: dict[str, Any] = (await customer.by_login("GET", f"/api/portal/tokens/{made['id']}")).json()
    return shown


async def works(customer: Customer, *tokens: dict[str, Any]) -> list[bool]:
    """Return of each token's secret whether it works; both doors agree."""
    found = []
    for token in tokens:
        headers = {"authorization": f"Bearer {token['token']}"}
        doors = Rest(customer.stack.rest), Native(customer.stack.channel)
        codes = {(await door.call("ListDatabases", **headers)).code for door in doors}
        assert codes in ({"ok"}, {"unauthenticated"})
        found.append(codes == {"ok"})
    return found


@pytest.mark.parametrize("wanted", [{}, {"grace_seconds": 0}])
async def test_without_a_grace_the_old_secret_is_dead_at_once(somebody: Customer, wanted: dict[str, Any]) -> None:
    """The grace is none unless one is wanted."""
    made = await somebody.new_token()
    rotated = await rotate(somebody, made, **wanted)
    assert "previous_secret" not in rotated
    assert await works(somebody, made, rotated) == [False, True]


async def test_a_grace_keeps_both_and_ends(timed: Timed) -> None:
    """Both secrets work for as long as was wanted; the old one is shown with its end and its last use, then gone."""
    stack, clock = timed
    customer = await stack.customer()
    made = await customer.new_token(allowed_ips=["127.0.0.1"], scope="read")
    assert await works(customer, made) == [True]
    rotated = await rotate(customer, made, grace_seconds=60)
    ends = datetime.fromisoformat(rotated["rotated_at"]) + timedelta(seconds=60)
    previous = rotated["previous_secret"]
    assert (previous["prefix"], datetime.fromisoformat(previous["expires_at"])) == (made["prefix"], ends)
    assert "last_used_at" not in (await show(customer, made))["previous_secret"]
    assert await works(customer, made, rotated) == [True, True]
    shown = await show(customer, made)
    assert shown["rotated_at"] < shown["previous_secret"]["last_used_at"] <= shown["last_used_at"]
    assert rotated["token"] not in str(shown)
    clock.let_pass(seconds=(ends - clock.now()).total_seconds())
    assert await works(customer, made, rotated) == [False, True]
    assert "previous_secret" not in await show(customer, made)


async def test_a_grace_gives_a_token_no_more_time(timed: Timed) -> None:
    """A token that expires within the grace ends with both of its secrets, and says so."""
    stack, clock = timed
    customer = await stack.customer()
    expires_at = clock.now() + timedelta(seconds=60)
    made = await customer.new_token(expires_at=expires_at.isoformat())
    rotated = await rotate(customer, made, grace_seconds=3600)
    assert datetime.fromisoformat(rotated["previous_secret"]["expires_at"]) == expires_at
    assert rotated["previous_secret"]["expires_at"] == rotated["expires_at"]
    clock.let_pass(seconds=59)
    assert await works(customer, made, rotated) == [True, True]
    clock.let_pass(seconds=1)
    assert await works(customer, made, rotated) == [False, False]
    assert "previous_secret" not in await show(customer, made)


@pytest.mark.parametrize(("grace", "alive"), [(3600, [False, True, True]), (0, [False, False, True])])
async def test_another_rotation_within_the_grace(somebody: Customer, grace: int, alive: list[bool]) -> None:
    """There are never more than two secrets; a rotation without a grace leaves one."""
    first = await somebody.new_token()
    second = await rotate(somebody, first, grace_seconds=3600)
    third = await rotate(somebody, first, grace_seconds=grace)
    assert await works(somebody, first, second, third) == alive


async def test_a_revocation_ends_both_secrets(somebody: Customer) -> None:
    """A revoked token has no secret that works, in a grace neither."""
    made = await somebody.new_token()
    rotated = await rotate(somebody, made, grace_seconds=3600)
    revoked = await somebody.by_login("DELETE", f"/api/portal/tokens/{made['id']}")
    assert (revoked.status_code, "previous_secret" in revoked.json()) == (200, False)
    assert await works(somebody, made, rotated) == [False, False]
    assert await kept_of_previous(somebody, made) == (None, None, None)


async def test_both_secrets_are_one_token(somebody: Customer, door: Door) -> None:
    """The old secret has the list of addresses, the permissions and the rate limit that the token has now."""
    made = await somebody.new_token(scope="read", rate_limit_per_minute=5)
    rotated = await rotate(somebody, made, grace_seconds=3600)
    old, new = ({"authorization": f"Bearer {each['token']}"} for each in (made, rotated))
    assert (await door.call("DeleteDatabase", {"name": "nowhere"}, **old)).code == "scope_denied"
    left = [(await door.call("ListDatabases", **each)).headers["ratelimit-remaining"] for each in (new, old)]
    assert left == ["3", "2"]
    change = {"allowed_ips": ["203.0.113.7"]}
    assert (await somebody.by_login("PATCH", f"/api/portal/tokens/{made['id']}", json=change)).status_code == 200
    for each in (old, new):
        assert (await door.call("ListDatabases", **each)).code == "ip_denied"


@pytest.mark.parametrize("grace", [0, 3600])
async def test_of_many_rotations_at_once_the_last_two_count(somebody: Customer, grace: int) -> None:
    """Of 60 parallel rotations, more than there are connections, the last works, and in a grace the one before it."""
    first = await somebody.new_token()
    answers = await asyncio.gather(*(rotate(somebody, first, grace_seconds=grace) for _ in range(60)))
    inorder = sorted(answers, key=lambda each: datetime.fromisoformat(each["rotated_at"]))
    alive = await works(somebody, first, *inorder)
    assert alive == [False] * 59 + [bool(grace), True]
    shown = await show(somebody, first)
    assert shown["prefix"] == inorder[-1]["prefix"]
    assert shown.get("previous_secret", {}).get("prefix") == (inorder[-2]["prefix"] if grace else None)


async def test_a_grace_ends_early_once_the_old_secret_is_out_of_use(timed: Timed) -> None:
    """With the new secret in use, the old one is dead after five minutes in which nobody has used it, not before."""
    stack, clock = timed
    customer = await stack.customer()
    made = await customer.new_token()
    rotated = await rotate(customer, made, grace_seconds=86400)
    clock.let_pass(minutes=4)
    assert await works(customer, rotated, made) == [True, True]
    for minutes in (4, 0.9):
        clock.let_pass(minutes=minutes)
        await end_now(stack, clock)
        assert "previous_secret" in await show(customer, made)
    clock.let_pass(minutes=0.1)
    await end_now(stack, clock)
    assert "previous_secret" not in await show(customer, made)
    assert await works(customer, rotated, made) == [True, False]


async def test_a_grace_goes_on_while_the_new_secret_is_not_in_use(timed: Timed) -> None:
    """An old secret that nobody uses is kept until its end, if nobody has used the new one either."""
    stack, clock = timed
    customer = await stack.customer()
    made = await customer.new_token()
    assert await works(customer, made) == [True]
    await rotate(customer, made, grace_seconds=3600)
    clock.let_pass(minutes=50)
    await end_now(stack, clock)
    assert await works(customer, made) == [True]
    clock.let_pass(minutes=9)
    await end_now(stack, clock)
    assert await works(customer, made) == [True]


async def test_a_grace_that_is_over_leaves_nothing(timed: Timed) -> None:
    """Of an old secret nothing is kept once its time is over, and its place in the index is free."""
    stack, clock = timed
    customer = await stack.customer()
    made = await customer.new_token()
    await rotate(customer, made, grace_seconds=1)
    clock.let_pass(seconds=1)
    await end_now(stack, clock)
    assert await kept_of_previous(customer, made) == (None, None, None)


async def kept_of_previous(customer: Customer, made: dict[str, Any]) -> tuple[Any, ...]:
    """Return what is stored of a token's previous secret."""
    rows = await customer.stack.server.store.fetch(select(Token).where(col(Token.id) == made["id"]))
    return rows[0].previous_digest, rows[0].previous_prefix, rows[0].previous_until


async def end_now(stack: Stack, clock: MovableClock) -> None:
    """Write the uses and do what the server does every ten seconds."""
    await stack.server.uses.flush()
    await end_what_is_over(stack.server.store, clock)
