"""What one kind of resource adds to the reconciler: its next step, and what that can come to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.reconcile.model import Reconciled


@dataclass(frozen=True, slots=True)
class News:
    """What the customer is told besides a change of the state, as the event `KIND.TYPE`."""

    type: str
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """The row is as ordered, in this state; `values` are further columns that were learned.

    It is looked at again at `look_again_at`, if there is such a time.
    """

    state: str
    values: Mapping[str, Any] = field(default_factory=dict)
    look_again_at: datetime | None = None
    news: News | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """What was ordered will never be, however often it is tried; the reason is for the customer."""

    reason: str


@dataclass(frozen=True, slots=True)
class Gone:
    """Nothing of the thing is left; the row may go too."""


class NotYet(Exception):
    """The step cannot be taken now: what it waits for, and why in words for the customer."""

    def __init__(self, waiting_on: str, reason: str) -> None:
        super().__init__(reason)
        self.waiting_on = waiting_on


RowT = TypeVar("RowT", bound=Reconciled)
Outcome = Settled | Failed | Gone


class Provisioner(Protocol[RowT]):
    """What one kind of resource adds: its table, its next step, and what goes with the outcome of one."""

    kind: str
    model: type[RowT]
    at_once: int  # so many steps, so that what takes long of one kind keeps no other waiting

    async def step(self, row: RowT) -> Outcome:
        """Look at what is there and take the next step towards what the row wants; safe to repeat.

        Raises NotYet to be asked again later.
        """

    async def follow_up(self, session: AsyncSession, row: RowT, outcome: Outcome) -> bool:
        """Do what goes with an outcome, in the transaction that keeps it: give back what a row held that is gone.

        Returns whether something else may be due by it.
        """
