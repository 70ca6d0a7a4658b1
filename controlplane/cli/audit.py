"""`controlplane audit`: the record of who did what, held against its chains."""

import asyncio
import sys
from pathlib import Path

import click
from sqlalchemy import make_url
from sqlmodel import col, select

from controlplane.accounts.model import Account
from controlplane.audit.verify import Verdict, verify
from controlplane.cli.settings import read_settings
from controlplane.cli.store import check_schema
from controlplane.keys import Keys
from controlplane.operator_error import OperatorError
from controlplane.settings import Settings
from controlplane.sql import Store


@click.group()
def audit() -> None:
    """Look after the record of who did what."""


@audit.command("verify")
def verify_audit() -> None:
    """Hold each account's record against its chain, and name the first entry of each that is not as it was written.

    Nothing is changed; the server may be running.
    """
    verdict, emails = asyncio.run(_verify(read_settings()))
    for broken in verdict.broken:
        whose = broken.account_id or "what belongs to no account"
        known = f" ({emails[broken.account_id]})" if broken.account_id in emails else ""
        click.echo(f"The record of {whose}{known} is broken at entry {broken.sequence}: {broken.reason}.")
    if verdict.broken:
        sys.exit(1)
    click.echo(f"{verdict.entries} entries in {verdict.records} records are whole.")


async def _verify(settings: Settings) -> tuple[Verdict, dict[str, str]]:
    """Return what holds of the records, and the address of each account whose record does not."""
    keys = settings.keys_path
    url = make_url(settings.storage_url)
    needed = [keys, Path(url.database or "")] if url.get_backend_name() == "sqlite" else [keys]
    for file in needed:
        if not file.exists():  # it would be made now
            raise OperatorError(f"{file} is not there: what is to be verified?")
    store = Store(settings.storage_url)
    try:
        await check_schema(store)
        verdict = await verify(store, Keys.load(keys))
        is_broken = col(Account.id).in_([broken.account_id for broken in verdict.broken])
        rows = await store.fetch(select(Account.id, Account.email).where(is_broken))
        return verdict, {row.id: row.email for row in rows}
    finally:
        await store.close()
