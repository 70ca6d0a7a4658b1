"""A password is changed: what that ends, what goes on, and who may not."""

import asyncio
from typing import Any

import httpx
import pytest
from sqlalchemy import delete, update
from sqlmodel import col

from controlplane.accounts.model import Account
from controlplane.sessions.model import Session
from tests.clock import MovableClock
from tests.doors import Door, read_response
from tests.stack import PASSWORD, Customer, Stack

NEW = "a longer horse with 2 batteries"
SESSION, CHANGE = "/api/portal/session", "/api/portal/account/password"


async def log_in(stack: Stack, email: str, password: str = PASSWORD) -> httpx.Response:
    """Try to log in."""
    answer = await stack.rest.post(SESSION, json={"email": email, "password": password})
    stack.rest.cookies.clear()
    return answer


def cookie_of(answer: Any) -> str:
    """Return the cookie that an answer sets."""
    return str(answer.headers["set-cookie"].partition(";")[0])


async def change(door: Door, customer: Customer, current: str, new: str, **more: Any) -> Any:
    """Change the password as our own page would."""
    request = {"password": {"current_password": current, "new_password": new}, **more}
    return await door.call("ChangePassword", request, cookie=customer.cookie, sec_fetch_site="same-origin")


async def by_rest(customer: Customer, current: str, new: str) -> httpx.Response:
    """Change the password through the edge."""
    return await customer.by_login("PUT", CHANGE, json={"current_password": current, "new_password": new})


async def test_a_change_ends_every_other_login(stack: Stack, customer: Customer, door: Door) -> None:
    """The other logins and the old cookie are over at once; this login, in a new cookie, and the token go on."""
    other = cookie_of(await log_in(stack, customer.email))
    before = (await customer.by_login("GET", SESSION)).json()
    changed = await change(door, customer, PASSWORD, NEW)
    assert (changed.code, changed.result["id"], changed.result["email"]) == ("ok", customer.account_id, customer.email)
    assert changed.result["quotas"]["tokens"]["used"] == 1
    fresh = cookie_of(changed)
    statuses = [
        (await stack.rest.get(SESSION, headers={"cookie": cookie})).status_code
        for cookie in (other, customer.cookie, fresh)
    ]
    assert statuses == [401, 401, 200]
    after = (await stack.rest.get(SESSION, headers={"cookie": fresh})).json()
    assert (after["id"], after["expires_at"]) == (before["id"], before["expires_at"])
    assert (await customer.call("GET", "/api/portal/account")).status_code == 200
    assert (await log_in(stack, customer.email)).status_code == 401
    assert (await log_in(stack, customer.email, NEW)).status_code == 200


async def test_the_new_cookie_lasts_no_longer(timed: tuple[Stack, MovableClock]) -> None:
    """A change of the password puts the login's end off neither for the server nor for the browser."""
    stack, clock = timed
    customer = await stack.customer()
    clock.let_pass(hours=1)
    changed = await by_rest(customer, PASSWORD, NEW)
    age = int(changed.headers["set-cookie"].partition("Max-Age=")[2].partition(";")[0])
    stack.rest.cookies.clear()
    assert 11 * 3600 - 60 < age <= 11 * 3600


async def test_a_change_that_cannot_be(stack: Stack, customer: Customer, door: Door) -> None:
    """A wrong current password, a new one that is short or the same, or a token instead of a login change nothing."""
    for current, new, field in (
        (NEW, NEW + "!", "current_password"),
        (PASSWORD, PASSWORD, "new_password"),
        (PASSWORD, "eleven char", "new_password"),
        (PASSWORD, "", "new_password"),
        ("", NEW, "current_password"),
    ):
        answer = await change(door, customer, current, new)
        assert (answer.code, "set-cookie" in answer.headers) == ("invalid_field", False)
        assert [each.removeprefix("password.") for each in answer.fields] == [field]
    request = {"password": {"current_password": PASSWORD, "new_password": NEW}}
    by_token = await door.call("ChangePassword", request, authorization=f"Bearer {customer.token}")
    assert by_token.code == "login_required"
    cross_site = await door.call("ChangePassword", request, cookie=customer.cookie, sec_fetch_site="cross-site")
    assert cross_site.code == "cross_site"
    assert (await log_in(stack, customer.email)).status_code == 200


async def test_a_check_changes_no_password(stack: Stack, customer: Customer, door: Door) -> None:
    """With `validate_only` the change is checked and not made, and this login keeps its cookie."""
    other = cookie_of(await log_in(stack, customer.email))
    answer = await change(door, customer, PASSWORD, NEW, validate_only=True)
    assert (answer.code, "set-cookie" in answer.headers) == ("ok", False)
    for cookie in (other, customer.cookie):
        assert (await stack.rest.get(SESSION, headers={"cookie": cookie})).status_code == 200
    assert (await log_in(stack, customer.email)).status_code == 200
    assert (await change(door, customer, NEW, NEW + "!", validate_only=True)).code == "invalid_field"


async def test_an_account_without_a_password_cannot_change_it(stack: Stack, customer: Customer, door: Door) -> None:
    """Who logs in at the provider's own login is told that there is no password to change."""
    await _set_hash(stack, customer, "")
    answer = await change(door, customer, PASSWORD, NEW)
    assert (answer.code, "no password" in answer.sentence) == ("conflict", True)


async def test_the_current_password_cannot_be_guessed(stack: Stack, customer: Customer, door: Door) -> None:
    """Guesses at it count together with failed logins: the sixth is refused, also if it is right."""
    for _ in range(2):
        assert (await log_in(stack, customer.email, "the wrong password")).status_code == 401
    for _ in range(3):
        assert (await change(door, customer, "the wrong password", NEW)).code == "invalid_field"
    for password in ("the wrong password", PASSWORD):
        refused = await change(door, customer, password, NEW)
        assert (refused.code, "5 failed logins in 15 minutes" in refused.sentence) == ("rate_limited", True)
    assert (await log_in(stack, customer.email)).status_code == 429


async def test_one_of_two_changes_at_once_wins(stack: Stack, customer: Customer) -> None:
    """The later of two is refused, and the password is the one of the change that was answered with success."""
    wanted = [f"{NEW} {number}" for number in range(3)]
    answers = await asyncio.gather(*(by_rest(customer, PASSWORD, new) for new in wanted))
    stack.rest.cookies.clear()
    done = [answer.is_success for answer in answers]
    assert done.count(True) == 1
    for answer, new in zip(answers, wanted, strict=True):
        if not answer.is_success:
            assert read_response(answer).code in {"conflict", "invalid_field", "unauthenticated"}
        assert (await log_in(stack, customer.email, new)).is_success == answer.is_success


async def test_a_login_with_the_old_password_comes_too_late(stack: Stack, customer: Customer) -> None:
    """A login whose password was changed after it was checked is refused, as the change ended all that were there."""
    async with stack.server.store.session() as session:
        await session.execute(
            update(Account).where(col(Account.id) == customer.account_id).values(password_hash="another")
        )
        login = asyncio.create_task(stack.rest.post(SESSION, json={"email": customer.email, "password": PASSWORD}))
        await _let_it_come_to_the_lock(stack)
        assert not login.done()
        await session.commit()
    assert read_response(await login).sentence == "The email address or the password is wrong."


async def test_a_login_that_is_over_changes_no_password(stack: Stack, customer: Customer) -> None:
    """A change that is under way while its own login is ended does not happen."""
    own = (await customer.by_login("GET", SESSION)).json()["id"]
    async with stack.server.store.session() as session:
        await session.execute(delete(Session).where(col(Session.id) == own))
        changing = asyncio.create_task(by_rest(customer, PASSWORD, NEW))
        await _let_it_come_to_the_lock(stack)
        assert not changing.done()
        await session.commit()
    assert read_response(await changing).code == "unauthenticated"
    assert (await log_in(stack, customer.email)).status_code == 200


async def test_a_disabled_account_gets_no_login_that_was_under_way(stack: Stack, customer: Customer) -> None:
    """A login whose account was disabled after the password was checked is refused."""
    async with stack.server.store.session() as session:
        disabled = update(Account).where(col(Account.id) == customer.account_id)
        await session.execute(disabled.values(disabled_at=stack.clock.now()))
        login = asyncio.create_task(stack.rest.post(SESSION, json={"email": customer.email, "password": PASSWORD}))
        await _let_it_come_to_the_lock(stack)
        await session.commit()
    assert (await login).status_code == 401


@pytest.mark.parametrize("password", ["ä" * 12, "\N{GRINNING FACE} and so on and on", " leading and trailing "])
async def test_a_password_is_any_text(stack: Stack, customer: Customer, password: str) -> None:
    """A password is taken as it was typed, whatever its characters are."""
    assert (await by_rest(customer, PASSWORD, password)).status_code == 200
    stack.rest.cookies.clear()
    assert (await log_in(stack, customer.email, password)).status_code == 200
    assert (await log_in(stack, customer.email, password.strip() + "x")).status_code == 401


async def _let_it_come_to_the_lock(stack: Stack) -> None:
    """Wait for what takes longer than all that a request does before it waits for a row that the test has locked.

    These logins came later, take turns with it at the same threads, and have more to do.
    """
    for number in range(4):
        assert (await log_in(stack, f"nobody-{number}@example.com", "the wrong password")).status_code == 401


async def _set_hash(stack: Stack, customer: Customer, password_hash: str) -> None:
    async with stack.server.store.session() as session:
        await session.execute(
            update(Account).where(col(Account.id) == customer.account_id).values(password_hash=password_hash)
        )
        await session.commit()
