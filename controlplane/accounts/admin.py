"""What an operator does with accounts."""

from collections.abc import Sequence

from sqlalchemy import func
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.accounts.model import Account
from controlplane.accounts.passwords import hash_password
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.ids import new_id
from controlplane.sql import Store

SHORTEST_PASSWORD = 12  # characters; NIST SP 800-63B asks for 8, and a provider's customer has more to lose
_LONGEST_EMAIL = 254  # RFC 5321


class AccountError(Exception):
    """An account cannot be made or changed; the message says why."""


async def create_account(
    store: Store,
    catalog: Catalog,
    clock: Clock,
    *,
    email: str,
    password: str,
    plan: str | None = None,
    first_name: str | None = None,
    last_name: str | None = None,
    company_name: str | None = None,
) -> Account:
    """Open an account, with the catalogue's default plan when none is named.

    Raises AccountError for a plan that does not exist, an address that is taken or is none, or a short password.
    """
    email = email.strip().lower()
    if email.count("@") != 1 or email.startswith("@") or email.endswith("@") or len(email) > _LONGEST_EMAIL:
        raise AccountError(f"'{email}' is not an email address.")
    if len(password) < SHORTEST_PASSWORD:
        raise AccountError(f"The password is too short: it needs at least {SHORTEST_PASSWORD} characters.")
    account = Account(
        id=new_id("ac"),
        email=email,
        password_hash=hash_password(password),
        plan=_checked_plan(catalog, plan or catalog.default_plan),
        first_name=first_name,
        last_name=last_name,
        company_name=company_name,
        created_at=clock.now(),
    )
    async with store.session() as session:
        session.add(account)
        try:
            await session.commit()
        except IntegrityError:
            raise AccountError(f"There is already an account with the address {email}.") from None
    return account


async def list_accounts(store: Store) -> Sequence[Account]:
    """Return all accounts, oldest first."""
    async with store.session() as session:
        return (await session.scalars(select(Account).order_by(col(Account.id)))).all()


async def count_accounts(store: Store) -> int:
    """Return how many accounts there are."""
    async with store.session() as session:
        return (await session.execute(select(func.count()).select_from(Account))).scalar_one()


async def set_plan(store: Store, catalog: Catalog, *, email: str, plan: str) -> Account:
    """Give an account another plan. Nothing that it has is taken away, also when the plan allows less.

    Raises AccountError for a plan or an account that does not exist.
    """
    async with store.session() as session:
        account = await _get(session, email)
        account.plan = _checked_plan(catalog, plan)
        await session.commit()
    return account


async def disable(store: Store, clock: Clock, *, email: str) -> Account:
    """Refuse every token and login of an account from now on. What it has is left alone.

    Raises AccountError for an account that does not exist.
    """
    async with store.session() as session:
        account = await _get(session, email)
        account.disabled_at = account.disabled_at or clock.now()
        await session.commit()
    return account


async def _get(session: AsyncSession, email: str) -> Account:
    account = (await session.scalars(select(Account).where(Account.email == email.strip().lower()))).one_or_none()
    if account is None:
        raise AccountError(f"There is no account with the address {email}. `controlplane account list` shows them.")
    return account


def _checked_plan(catalog: Catalog, plan: str) -> str:
    plans = [known.name for known in catalog.plans]
    if plan not in plans:
        raise AccountError(f"There is no plan '{plan}'; there are {', '.join(plans)}.")
    return plan
