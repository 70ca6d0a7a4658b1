"""What the operator does with accounts."""

import asyncio

import pytest

from controlplane.accounts import admin
from controlplane.accounts.admin import AccountError
from tests.stack import PASSWORD, Stack


async def create(stack: Stack, **wanted: str) -> str:
    """Open an account and return its id."""
    wanted = {"password": PASSWORD, **wanted}
    made = await admin.create_account(stack.server.store, stack.server.catalog, stack.clock, **wanted)
    return made.id


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"email": "nobody"}, "'nobody' is not an email address"),
        ({"email": "@example.com"}, "not an email address"),
        ({"email": "a@"}, "not an email address"),
        ({"email": "a@b@c"}, "not an email address"),
        ({"email": "a" * 250 + "@b.de"}, "not an email address"),
        ({"email": ""}, "not an email address"),
        ({"email": "short@example.com", "password": "eleven char"}, "at least 12 characters"),
        ({"email": "plan@example.com", "plan": "golden"}, "no plan 'golden'; there are roomy, small"),
    ],
)
async def test_an_account_that_cannot_be(stack: Stack, wanted: dict[str, str], words: str) -> None:
    """A wrong address, a short password or an unknown plan is refused in words, and no account is made."""
    before = await admin.count_accounts(stack.server.store)
    with pytest.raises(AccountError, match=words):
        await create(stack, **wanted)
    assert await admin.count_accounts(stack.server.store) == before


async def test_an_address_has_one_account(stack: Stack) -> None:
    """An address is taken in any spelling of its letters, also when two ask at the same time."""
    first = await create(stack, email="One@Example.com ")
    with pytest.raises(AccountError, match=r"already an account with the address one@example\.com"):
        await create(stack, email="one@example.COM")
    both = await asyncio.gather(*(create(stack, email="two@example.com") for _ in range(2)), return_exceptions=True)
    assert sorted(type(each).__name__ for each in both) == ["AccountError", "str"]
    accounts = await admin.list_accounts(stack.server.store)
    assert [account.id for account in accounts if account.email == "one@example.com"] == [first]
    assert [account.id for account in accounts] == sorted(account.id for account in accounts)
    assert next(account for account in accounts if account.id == first).plan == "roomy"


async def test_a_plan_holds_from_the_next_request(stack: Stack) -> None:
    """A smaller plan takes nothing away and lets nothing more in, a larger one does at once."""
    customer = await stack.customer()
    for _ in range(3):
        await customer.new_token()
    store, catalog = stack.server.store, stack.server.catalog
    await admin.set_plan(store, catalog, email=customer.email.upper(), plan="small")
    refused = await customer.by_login("POST", "/api/portal/tokens", json={"name": "a"})
    assert (refused.status_code, "4 of 3 tokens" in refused.json()["error"]) == (402, True)
    limit = (await customer.call("GET", "/api/portal/account")).headers["ratelimit-limit"]
    assert limit == "100000"
    await admin.set_plan(store, catalog, email=customer.email, plan="roomy")
    await customer.new_token()
    with pytest.raises(AccountError, match="no plan 'golden'"):
        await admin.set_plan(store, catalog, email=customer.email, plan="golden")


async def test_an_unknown_account_cannot_be_changed(stack: Stack) -> None:
    """The operator is told that there is no such account, and how to see those that there are."""
    store = stack.server.store
    with pytest.raises(AccountError, match="controlplane account list"):
        await admin.disable(store, stack.clock, email="nobody@example.com")
    with pytest.raises(AccountError, match="no account with the address"):
        await admin.set_plan(store, stack.server.catalog, email="nobody@example.com", plan="small")


async def test_disabling_twice_keeps_the_first_time(stack: Stack) -> None:
    """An account that is disabled already stays so from when it was."""
    await create(stack, email="leaving@example.com")
    first = await admin.disable(stack.server.store, stack.clock, email="leaving@example.com")
    again = await admin.disable(stack.server.store, stack.clock, email="leaving@example.com")
    assert first.disabled_at is not None
    assert again.disabled_at == first.disabled_at
