"""`controlplane account`: customers' accounts, as their operator looks after them."""

import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from controlplane.accounts import admin
from controlplane.audit.log import AuditLog
from controlplane.catalog.model import Catalog
from controlplane.cli.settings import read_settings
from controlplane.cli.store import with_store
from controlplane.clock import SystemClock
from controlplane.keys import Keys
from controlplane.sql import Store

T = TypeVar("T")


@click.group()
def account() -> None:
    """Open, list, change, disable and enable customers' accounts."""


@account.command("create")
@click.option("--email", required=True, help="The address that the customer logs in with.")
@click.option("--plan", help="A plan of the catalogue; its default when not given.")
@click.option("--first-name", help="The holder's first name.")
@click.option("--last-name", help="The holder's last name.")
@click.option("--company-name", help="The company, if it is one.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input instead of asking.")
@click.option("--no-password", is_flag=True, help="Let the provider's own login (OpenID Connect) be the only one.")
def create_account(password_stdin: bool, no_password: bool, **given: str | None) -> None:
    """Open an account."""
    catalog = Catalog.load(read_settings().catalog)
    if password_stdin and no_password:
        raise click.UsageError("--password-stdin and --no-password exclude each other.")
    if no_password:
        password = None
    elif password_stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    made = _with_record(
        lambda store, audit: admin.create_account(
            store,
            catalog,
            SystemClock(),
            audit=audit,
            password=password,
            **given,  # type: ignore[arg-type]
        )
    )
    click.echo(f"Opened the account {made.id} for {made.email}, with the plan {made.plan}.")


@account.command("list")
def list_accounts() -> None:
    """List all accounts."""
    accounts = with_store(admin.list_accounts)
    row = "{:<30} {:<32} {:<12} {:<16} {}"
    click.echo(click.style(row.format("ID", "EMAIL", "PLAN", "OPENED", "DISABLED"), bold=True))
    for entry in accounts:
        opened, disabled = (
            time.strftime("%Y-%m-%d %H:%M") if time else "" for time in (entry.created_at, entry.disabled_at)
        )
        click.echo(row.format(entry.id, entry.email, entry.plan, opened, disabled).rstrip())


@account.command("set-plan")
@click.option("--email", required=True, help="The account's address.")
@click.option("--plan", required=True, help="A plan of the catalogue.")
def set_plan(email: str, plan: str) -> None:
    """Give an account another plan; nothing that it has is taken away."""
    catalog = Catalog.load(read_settings().catalog)
    changed = _with_record(lambda store, audit: admin.set_plan(store, catalog, audit=audit, email=email, plan=plan))
    click.echo(f"{changed.email} has the plan {changed.plan} now.")


@account.command("disable")
@click.option("--email", required=True, help="The account's address.")
def disable_account(email: str) -> None:
    """Refuse every token and login of an account from now on; what it has is left alone."""
    changed = _with_record(lambda store, audit: admin.disable(store, SystemClock(), audit=audit, email=email))
    click.echo(f"{changed.email} is disabled.")


@account.command("enable")
@click.option("--email", required=True, help="The account's address.")
def enable_account(email: str) -> None:
    """Let the tokens and logins of a disabled account in again, those that have not ended meanwhile."""
    changed = _with_record(lambda store, audit: admin.enable(store, audit=audit, email=email))
    click.echo(f"{changed.email} is enabled.")


def _with_record(work: Callable[[Store, AuditLog], Coroutine[Any, Any, T]]) -> T:
    """Do something that goes into an account's record."""
    settings = read_settings()
    keys = Keys.load(settings.keys_path)
    return with_store(lambda store: work(store, AuditLog(store=store, keys=keys, clock=SystemClock())))
