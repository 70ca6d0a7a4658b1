"""Which rows are due: the statements that find and claim them, and the indexes that do so at once."""

from typing import Any

from sqlalchemy import Index, Subquery, bindparam, func, or_, select, text, true, update
from sqlalchemy.sql.dml import ReturningUpdate
from sqlmodel import col

from controlplane.reconcile.model import Reconciled
from controlplane.sql import UtcDateTime

_MOST_COUNTED = 1000
_NOW = bindparam("now", type_=UtcDateTime)


def due_indexes(table: str) -> tuple[Index, Index]:
    """Return the indexes by which the rows of a table that are due are found at once, however many there are."""
    ordered, looked_at = text("waiting_on IS NOT NULL"), text("waiting_on IS NULL")
    return (
        Index(f"ix_{table}_ordered", "next_attempt_at", sqlite_where=ordered, postgresql_where=ordered),
        Index(f"ix_{table}_looked_at", "next_attempt_at", sqlite_where=looked_at, postgresql_where=looked_at),
    )


class Look:
    """The statements that find the due rows of one kind, made once: to make them takes longer than to execute them."""

    def __init__(self, model: type[Reconciled]) -> None:
        orders, looks = _due(model, is_ordered=True), _due(model, is_ordered=False)
        late = select(func.count().label("late")).where(col(model.deadline_at) < _NOW).subquery()
        found = orders.join(looks, true()).join(late, true())
        # Of `now`: how many orders and looks are due, and since when; and how many rows are past their deadline.
        self.count = select(
            orders.c.due.label("orders"),
            orders.c.oldest.label("oldest_order"),
            looks.c.due.label("looks"),
            looks.c.oldest.label("oldest_look"),
            late.c.late,
        ).select_from(found)
        # Of `now`, `token` and `until`: the row, leased.
        self.claim_order = _claim(model, is_ordered=True)
        self.claim_look = _claim(model, is_ordered=False)


def _due(model: type[Reconciled], *, is_ordered: bool) -> Subquery:
    """Count at most so many, as counting all would take as long as there are rows."""
    due = select(col(model.next_attempt_at)).where(*_is_due(model, is_ordered=is_ordered))
    some = due.order_by(col(model.next_attempt_at)).limit(_MOST_COUNTED).subquery()
    return select(func.count().label("due"), func.min(some.c.next_attempt_at).label("oldest")).subquery()


def _claim(model: type[Reconciled], *, is_ordered: bool) -> ReturningUpdate[Any]:
    first = (
        select(col(model.id))
        .where(*_is_due(model, is_ordered=is_ordered))
        .order_by(col(model.next_attempt_at))
        .limit(1)
        .with_for_update(skip_locked=True, key_share=True)  # SQLite has one writer and leaves this out
        .scalar_subquery()
    )
    lease = {"lease_token": bindparam("token"), "lease_until": bindparam("until", type_=UtcDateTime)}
    return update(model).where(col(model.id) == first).values(lease).returning(model)


def _is_due(model: type[Reconciled], *, is_ordered: bool) -> tuple[Any, ...]:
    free = or_(col(model.lease_until).is_(None), col(model.lease_until) <= _NOW)
    waits = col(model.waiting_on).is_not(None) if is_ordered else col(model.waiting_on).is_(None)
    return col(model.next_attempt_at) <= _NOW, free, waits
