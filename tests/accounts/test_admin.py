"""What the operator does with accounts."""

import asyncio
import os
import pwd

import pytest
from sqlmodel import col, select

from controlplane.accounts import admin
from controlplane.accounts.admin import AccountError
from controlplane.audit.model import AuditEntry
from tests.stack import PASSWORD, Stack


async def create(stack: Stack, *, email: str, password: str | None = PASSWORD, plan: str | None = None) -> str:
    """Open an account and return its id."""
    server = stack.server
    made = await admin.create_account(
        server.store, server.catalog, stack.clock, audit=server.audit, email=email, password=password, plan=plan
    )
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
    store, catalog, audit = stack.server.store, stack.server.catalog, stack.server.audit
    await admin.set_plan(store, catalog, audit=audit, email=customer.email.upper(), plan="small")
    refused = await customer.by_login("POST", "/api/portal/tokens", json={"name": "a"})
    assert (refused.status_code, "4 of 3 tokens" in refused.json()["error"]) == (402, True)
    limit = (await customer.call("GET", "/api/portal/account")).headers["ratelimit-limit"]
    assert limit == "100000"
    await admin.set_plan(store, catalog, audit=audit, email=customer.email, plan="roomy")
    await customer.new_token()
    with pytest.raises(AccountError, match="no plan 'golden'"):
        await admin.set_plan(store, catalog, audit=audit, email=customer.email, plan="golden")


async def test_an_unknown_account_cannot_be_changed(stack: Stack) -> None:
    """The operator is told that there is no such account, and how to see those that there are."""
    store, audit = stack.server.store, stack.server.audit
    with pytest.raises(AccountError, match="controlplane account list"):
        await admin.disable(store, stack.clock, audit=audit, email="nobody@example.com")
    with pytest.raises(AccountError, match="no account with the address"):
        await admin.enable(store, audit=audit, email="nobody@example.com")
    with pytest.raises(AccountError, match="no account with the address"):
        await admin.set_plan(store, stack.server.catalog, audit=audit, email="nobody@example.com", plan="small")


async def test_disabling_ends_nothing_for_good(stack: Stack) -> None:
    """An account stays disabled from when it first was; enabled, its token and its login go on."""
    customer, server = await stack.customer(), stack.server
    first, again = [
        await admin.disable(server.store, stack.clock, audit=server.audit, email=customer.email) for _ in range(2)
    ]
    assert first.disabled_at is not None
    assert again.disabled_at == first.disabled_at
    refused = [await call("GET", "/api/portal/account") for call in (customer.call, customer.by_login)]
    assert [answer.status_code for answer in refused] == [401, 401]
    await admin.enable(server.store, audit=server.audit, email=customer.email)
    let_in = [await call("GET", "/api/portal/account") for call in (customer.call, customer.by_login)]
    assert [answer.status_code for answer in let_in] == [200, 200]


async def test_an_account_without_a_password_has_none(stack: Stack) -> None:
    """No password opens an account that has none, not even an empty one or the one that stands in for it."""
    await create(stack, email="elsewhere@example.com", password=None)
    for password in ("", PASSWORD, "the password of an account that does not exist"):
        session = {"email": "elsewhere@example.com", "password": password}
        answer = await stack.rest.post("/api/portal/session", json=session)
        assert answer.status_code == (401 if password else 400), password


async def test_the_record_says_what_the_operator_did(stack: Stack) -> None:
    """Each change of an account is a line of its record, by the system's user; what failed has none."""
    email, server = "recorded@example.com", stack.server
    account_id = await create(stack, email=email)
    with pytest.raises(AccountError):
        await create(stack, email=email)
    await admin.set_plan(server.store, server.catalog, audit=server.audit, email=email, plan="small")
    await admin.disable(server.store, stack.clock, audit=server.audit, email=email)
    await admin.enable(server.store, audit=server.audit, email=email)
    lines = await server.store.fetch(
        select(AuditEntry).where(col(AuditEntry.account_id) == account_id).order_by(col(AuditEntry.sequence))
    )
    assert [line.action for line in lines] == [
        "account.create",
        "account.set_plan",
        "account.disable",
        "account.enable",
    ]
    user = pwd.getpwuid(os.getuid()).pw_name
    said = {(line.outcome, line.actor, line.credential, line.target, line.target_name) for line in lines}
    assert said == {("ok", "operator", user, account_id, email)}
