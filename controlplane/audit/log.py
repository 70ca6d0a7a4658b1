"""Writes the record: changes in their own transaction, refusals in batches.

An account's entries are a chain: each has a keyed digest of itself and of the digest before it. Whoever can write to
the database but has not the server's keys can neither change nor add a line that fits.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

import structlog
from google.protobuf.message import DecodeError, Message
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from controlplane.access.secrets import SHOWN_PREFIX, TOKEN_PATTERN
from controlplane.audit.model import PROVIDER, AuditEntry, chained
from controlplane.clock import Clock
from controlplane.errors import PortalError
from controlplane.keys import Keys
from controlplane.rpc.call import Call
from controlplane.sql import Store

_MOST_KINDS = 1_000  # of refusals between two batches; what comes beyond that is counted without its details
_LONGEST = 128  # characters of an id or a name
_REFUSALS = {401, 402, 403, 429}

_ADVANCE = text(
    "INSERT INTO audit_heads (account_id, sequence, digest) VALUES (:account_id, :lines, '')"
    " ON CONFLICT (account_id) DO UPDATE SET sequence = audit_heads.sequence + :lines RETURNING sequence, digest"
)
_ADD = insert(SQLModel.metadata.tables["audit_entries"])  # a session's way to add rows takes twice as long
_CLOSE = text("UPDATE audit_heads SET digest = :digest WHERE account_id = :account_id")

_log = structlog.get_logger("audit")


@dataclass(frozen=True, slots=True)
class _Kind:
    """What refusals have in common that share a line."""

    account_id: str
    action: str
    outcome: str
    actor: str
    credential: str | None
    ip: str | None
    target: str | None
    target_name: str | None


@dataclass(slots=True)
class _Refusals:
    """How many of a kind there were, when the first, and by which request."""

    created_at: datetime
    request_id: str | None
    count: int = 0


class AuditLog:
    """The records of all accounts, and that of the provider for what no account is known for."""

    def __init__(self, *, store: Store, keys: Keys, clock: Clock) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._refused: dict[_Kind, _Refusals] = {}
        self._writing = asyncio.Lock()

    async def record(self, session: AsyncSession, call: Call, request: Message, response: Message) -> AuditEntry:
        """Add the line of a change and return it, in the transaction of the change and as its last step but the feed.

        The lock on the account's head is held from here to the commit.
        """
        target, name = _target(response, request)
        target = target or call.target
        logs_in = call.presented is None  # the only change without a credential, and it makes one
        return await self.add(
            session,
            account_id=call.account_id or PROVIDER,
            action=call.rpc.action,
            outcome="ok",
            actor="login" if logs_in else _actor(call),
            credential=target if logs_in else _credential(call),
            ip=call.client_ip or None,
            request_id=call.request_id,
            target=target,
            target_name=name,
        )

    def refused(self, call: Call, error: PortalError, raw: bytes) -> None:
        """Note a request that was refused, or a change that failed; the next batch writes it.

        Not at once: refusals cost whoever asks nothing, and a flood of them must not keep changes from the one writer.
        """
        if error.http not in _REFUSALS and not (call.rpc.writes and call.maybe_caller is not None):
            return
        target, name = _target(*_read(call, raw))
        kind = _Kind(
            account_id=call.account_id or PROVIDER,
            action=call.rpc.action,
            outcome=error.code,
            actor=_actor(call),
            credential=_credential(call),
            ip=call.client_ip or None,
            target=target,
            target_name=name,
        )
        if kind not in self._refused and len(self._refused) >= _MOST_KINDS:
            kind = _Kind(kind.account_id, kind.action, kind.outcome, kind.actor, None, None, None, None)
        refusals = self._refused.setdefault(kind, _Refusals(self._clock.now(), call.request_id))
        refusals.count += 1

    async def flush(self) -> None:
        """Write what was refused since the last time; what cannot be written now stays for the next."""
        async with self._writing:
            batch, self._refused = self._refused, {}
            if not batch:
                return
            try:
                entries = await self._write(batch)
            except BaseException:
                self._put_back(batch)
                raise
        for entry in entries:
            fields = entry.model_dump(include={"action", "outcome", "credential", "ip", "request_id", "count"})
            _log.info("refused", account=entry.account_id, record=entry.sequence, digest=entry.digest, **fields)

    async def _write(self, batch: dict[_Kind, _Refusals]) -> list[AuditEntry]:
        by_account = defaultdict[str, list[AuditEntry]](list)
        for kind, of in batch.items():
            line = AuditEntry(**asdict(kind), created_at=of.created_at, request_id=of.request_id, count=of.count)
            by_account[kind.account_id].append(line)
        async with self._store.session() as session:
            # In one order, or two servers' batches wait for each other's heads.
            for account_id in sorted(by_account):
                await self._chain(session, account_id, by_account[account_id])
            await session.commit()
        return [entry for entries in by_account.values() for entry in entries]

    def _put_back(self, batch: dict[_Kind, _Refusals]) -> None:
        for kind, refusals in batch.items():
            later = self._refused.get(kind)
            if later is not None:
                refusals.count += later.count
            self._refused[kind] = refusals

    async def add(
        self,
        session: AsyncSession,
        *,
        account_id: str,
        action: str,
        outcome: str,
        actor: str,
        credential: str | None,
        ip: str | None = None,
        request_id: str | None = None,
        target: str | None = None,
        target_name: str | None = None,
    ) -> AuditEntry:
        """Add a line to an account's record, and return it."""
        entry = AuditEntry(
            account_id=account_id,
            created_at=self._clock.now(),
            action=action,
            outcome=outcome,
            actor=actor,
            credential=credential,
            ip=ip,
            request_id=request_id,
            target=target,
            target_name=target_name,
        )
        await self._chain(session, account_id, [entry])
        return entry

    async def _chain(self, session: AsyncSession, account_id: str, entries: Sequence[AuditEntry]) -> None:
        """Add lines to the end of an account's record, with as few statements for many as for one."""
        head = (await session.execute(_ADVANCE, {"account_id": account_id, "lines": len(entries)})).one()
        digest = head.digest
        for sequence, entry in enumerate(entries, start=head.sequence - len(entries) + 1):
            entry.sequence = sequence
            entry.digest = digest = self._keys.digest(chained(entry, digest))
        await session.execute(_ADD, [entry.model_dump() for entry in entries])
        await session.execute(_CLOSE, {"account_id": account_id, "digest": digest})


def _actor(call: Call) -> str:
    if call.presented is None:
        return "anonymous"
    return "login" if call.presented.kind == "session" else "token"


def _credential(call: Call) -> str | None:
    return call.presented.credential_id if call.presented is not None else None


def _read(call: Call, raw: bytes) -> list[Message]:
    """Return the request and what is inside it, or nothing if it is none: what is refused may be anything."""
    try:
        request = call.rpc.request.FromString(raw)
    except DecodeError:
        return []
    return [request, *(value for _, value in request.ListFields() if isinstance(value, Message))]


def _target(*messages: Message) -> tuple[str | None, str | None]:
    """Return the id and the name of what a call is about, as the first of these messages says that has one."""
    target = next((text for each in messages if (text := getattr(each, "id", ""))), None)
    name = next((text for each in messages if (text := getattr(each, "name", ""))), None)
    return target and _kept(target), name and _kept(name)


def _kept(text: str) -> str:
    """Return what is kept of a text that nobody has held against any rule.

    A token in the place of an id is cut to what may be shown of it. PostgreSQL keeps no U+0000: one of these would
    keep its whole batch from ever being written.
    """
    text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
    return TOKEN_PATTERN.sub(lambda token: f"{token[0][:SHOWN_PREFIX]}…", text)[:_LONGEST]
