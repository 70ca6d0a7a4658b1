"""What an operator does with accounts. Each change goes into the account's record, with the change itself."""

import os
import pwd
from collections.abc import Sequence

from sqlalchemy import func
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.accounts.model import Account
from controlplane.accounts.passwords import hash_password
from controlplane.audit.log import AuditLog
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.ids import new_id
from controlplane.operator_error import OperatorError
from controlplane.sql import Store

SHORTEST_PASSWORD = 12  # characters; NIST SP 800-63B asks for 8, and a provider's customer has more to lose
_LONGEST_EMAIL = 254  # RFC 5321


class AccountError(OperatorError):
    """An account cannot be made or changed; the message says why."""


async def create_account(
    store: Store,
    catalog: Catalog,
    clock: Clock,
    *,
    audit: AuditLog,
    email: str,
    password: str | None,
    plan: str | None = None,
    first_name: str | None = None,
    last_name: str | None = None,
    company_name: str | None = None,
) -> Account:
    """Open an account, with the catalogue's default plan when none is named.

    Without a password it is logged in to at the provider's own login only.

    Raises AccountError for a plan that does not exist, an address that is taken or is none, or a short password.
    """
    email = email.strip().lower()
    if email.count("@") != 1 or email.startswith("@") or email.endswith("@") or len(email) > _LONGEST_EMAIL:
        raise AccountError(f"'{email}' is not an email address.")
    if password is not None and len(password) < SHORTEST_PASSWORD:
        raise AccountError(f"The password is too short: it needs at least {SHORTEST_PASSWORD} characters.")
    account = Account(
        id=new_id("ac"),
        email=email,
        password_hash="" if password is None else hash_password(password),
        plan=_checked_plan(catalog, plan or catalog.default_plan),
        first_name=first_name,
        last_name=last_name,
        company_name=company_name,
        created_at=clock.now(),
    )
    async with store.session() as session:
        session.add(account)
        try:
            await session.flush()
        except IntegrityError:
            raise AccountError(f"There is already an account with the address {email}.") from None
        await _record(audit, session, "account.create", account)
        await session.commit()
    return account


async def list_accounts(store: Store) -> Sequence[Account]:
    """Return all accounts, oldest first."""
    async with store.session() as session:
        return (await session.scalars(select(Account).order_by(col(Account.id)))).all()


async def count_accounts(store: Store) -> int:
    """Return how many accounts there are."""
    async with store.session() as session:
        return (await session.execute(select(func.count()).select_from(Account))).scalar_one()


async def set_plan(store: Store, catalog: Catalog, *, audit: AuditLog, email: str, plan: str) -> Account:
    """Give an account another plan. Nothing that it has is taken away, also when the plan allows less.

    Raises AccountError for a plan or an account that does not exist.
    """
    async with store.session() as session:
        account = await _get(session, email)
        account.plan = _checked_plan(catalog, plan)
        await _record(audit, session, "account.set_plan", account)
        await session.commit()
    return account


async def disable(store: Store, clock: Clock, *, audit: AuditLog, email: str) -> Account:
    """Refuse every token and login of an account from now on. What it has is left alone.

    Raises AccountError for an account that does not exist.
    """
    async with store.session() as session:
        account = await _get(session, email)
        account.disabled_at = account.disabled_at or clock.now()
        await _record(audit, session, "account.disable", account)
        await session.commit()
    return account


async def enable(store: Store, *, audit: AuditLog, email: str) -> Account:
    """Let the tokens and logins of a disabled account in again, those that have not ended meanwhile.

    Raises AccountError for an account that does not exist.
    """
    async with store.session() as session:
        account = await _get(session, email)
        account.disabled_at = None
        await _record(audit, session, "account.enable", account)
        await session.commit()
    return account


async def _get(session: AsyncSession, email: str) -> Account:
    account = (await session.scalars(select(Account).where(Account.email == email.strip().lower()))).one_or_none()
    if account is None:
        raise AccountError(f"There is no account with the address {email}. `controlplane account list` shows them.")
    return account


async def _record(audit: AuditLog, session: AsyncSession, action: str, account: Account) -> None:
    await audit.add(
        session,
        account_id=account.id,
        action=action,
        outcome="ok",
        actor="operator",
        credential=_operator(),
        target=account.id,
        target_name=account.email,
    )


def _operator() -> str:
    """Return the name of the system's user that runs this program, or his number; variables could say anything."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _checked_plan(catalog: Catalog, plan: str) -> str:
    plans = [known.name for known in catalog.plans]
    if plan not in plans:
        raise AccountError(f"There is no plan '{plan}'; there are {', '.join(plans)}.")
    return plan
