"""Holds the record against its chain."""

from dataclasses import dataclass

from sqlalchemy import bindparam
from sqlmodel import col, select

from controlplane.audit.model import AuditEntry, AuditHead, chained
from controlplane.keys import Keys
from controlplane.sql import Store

_PAGE = 1_000
_HEAD = select(AuditHead).where(col(AuditHead.account_id) == bindparam("account_id"))
_AFTER = (
    select(AuditEntry)
    .where(col(AuditEntry.account_id) == bindparam("account_id"), col(AuditEntry.sequence) > bindparam("after"))
    .order_by(col(AuditEntry.sequence))
    .limit(_PAGE)
)


@dataclass(frozen=True, slots=True)
class Broken:
    """The first line of a record that does not hold, and why."""

    account_id: str
    sequence: int
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many lines hold in how many records, and which records are broken."""

    entries: int
    records: int
    broken: tuple[Broken, ...]


async def verify(store: Store, keys: Keys) -> Verdict:
    """Hold every record against its chain, a page at a time; servers may add to it meanwhile.

    The chain cannot tell that a record's end was cut off if its head was put back to how it was then, nor that all of a
    record is gone. The server's log can: it has the place and digest of every line.
    """
    heads = await store.fetch(select(AuditHead.account_id))
    lines = await store.fetch(select(AuditEntry.account_id).distinct())
    accounts = sorted({row.account_id for row in (*heads, *lines)})
    found = [await _verify(store, keys, account_id) for account_id in accounts]
    return Verdict(
        entries=sum(count for count, _ in found),
        records=len(accounts),
        broken=tuple(broken for _, broken in found if broken is not None),
    )


async def _verify(store: Store, keys: Keys, account_id: str) -> tuple[int, Broken | None]:
    """Return how many lines hold, and the first that does not."""
    count, digest = 0, ""
    while True:
        # The head before the lines: lines that are added in between are read in the next turn, with their head.
        head = next(iter(await store.fetch(_HEAD, {"account_id": account_id})), None)
        page = await store.fetch(_AFTER, {"account_id": account_id, "after": count})
        if not page:
            break
        for entry in page:
            if entry.sequence != count + 1:
                return count, Broken(account_id, count + 1, "it is missing")
            if entry.digest not in keys.digests(chained(entry, digest)):
                return count, Broken(account_id, count + 1, "it was changed, or does not follow the one before")
            count, digest = entry.sequence, entry.digest
    if head is not None and head.sequence > count:
        return count, Broken(account_id, count + 1, "it is missing at the end")
    if head is None or (head.sequence, head.digest) != (count, digest):
        return count, Broken(account_id, count, "the record's head was changed, or is missing")
    return count, None
