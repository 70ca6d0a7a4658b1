"""The lease of a row: who holds it is alone with it, until it runs out."""

import secrets
from datetime import datetime, timedelta
from typing import Any

from sqlmodel import col, select

from controlplane.clock import Clock
from controlplane.reconcile.model import Reconciled
from controlplane.reconcile.step import NotYet
from controlplane.sql import Store

LEASE = timedelta(seconds=30)


def new_lease(now: datetime) -> tuple[str, datetime]:
    """Return a token that nobody has, and until when it holds."""
    return secrets.token_hex(16), now + LEASE


def is_mine(row: Reconciled) -> tuple[Any, ...]:
    """Return the conditions under which a row is still leased as it was when it was read."""
    model = type(row)
    return col(model.id) == row.id, col(model.lease_token) == row.lease_token


async def check_lease(store: Store, clock: Clock, row: Reconciled) -> None:
    """Raise NotYet unless the row is still ours: for whoever holds a lock that keeps all others from what he changes.

    A process that was paused may have been overtaken meanwhile. An order that has come since changes nothing: nobody
    else takes its step before we have ended ours.
    """
    model = type(row)
    mine = select(model.id).where(*is_mine(row), col(model.lease_until) > clock.now())
    if not await store.fetch(mine):
        raise NotYet("another server", "Another server goes on with this.")
