"""`Idempotency-Key`: a POST that is sent twice is done once, and answered twice.

The key is recorded in the transaction of the write itself, so that there is never the one without the other. A second
request with the key of one still in flight waits for it: on SQLite for the one writer, on PostgreSQL for the row.
"""

import hashlib
import json
from datetime import datetime, timedelta

from sqlalchemy import CursorResult, bindparam, delete, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import Field, SQLModel, col

from controlplane.clock import Clock
from controlplane.errors import BrokenRule, IdempotencyMismatch, InvalidField
from controlplane.keys import Keys
from controlplane.rpc.call import Answer, Call
from controlplane.sql import UtcDateTime

KEPT = timedelta(hours=24)
_LONGEST = 255


class IdempotencyKey(SQLModel, table=True):
    """A key that was used, a digest of the request, and its answer, encrypted because it may show a secret."""

    __tablename__ = "idempotency_keys"

    account_id: str = Field(primary_key=True, foreign_key="accounts.id")
    method: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    request_digest: str
    answer: str = Field(default="", repr=False)
    created_at: datetime = Field(sa_type=UtcDateTime, index=True)


_CLAIM = text(
    "INSERT INTO idempotency_keys (account_id, method, key, request_digest, answer, created_at)"
    " VALUES (:account_id, :method, :key, :request_digest, '', :created_at) ON CONFLICT DO NOTHING"
).bindparams(bindparam("created_at", type_=UtcDateTime()))


class Idempotency:
    """The keys of the last 24 hours."""

    def __init__(self, *, keys: Keys, clock: Clock) -> None:
        self._keys = keys
        self._clock = clock

    def key_of(self, call: Call) -> str | None:
        """Return the key that came with a call, or None where none applies.

        Raises InvalidField for one that is too long, or empty: whoever sends that believes to be safe.
        """
        key = call.metadata.get("idempotency-key")
        if key is None or call.rpc.verb != "POST" or call.maybe_caller is None:
            return None
        if not 0 < len(key) <= _LONGEST:
            raise InvalidField(BrokenRule("Idempotency-Key", f"must have 1 to {_LONGEST} characters"))
        return key

    async def claim(self, session: AsyncSession, call: Call, key: str, raw: bytes) -> Answer | None:
        """Take the key for this call, or return the answer that it had when it was used before.

        Raises IdempotencyMismatch if that was for another request.
        """
        now = self._clock.now()
        mine = col(IdempotencyKey.account_id) == call.caller.account_id
        await session.execute(delete(IdempotencyKey).where(mine, col(IdempotencyKey.created_at) <= now - KEPT))
        # Keyed: a request may hold a password, and a fast digest of one can be guessed.
        digests = self._keys.digests(hashlib.sha256(raw).hexdigest())
        claimed = await session.execute(
            _CLAIM,
            {
                "account_id": call.caller.account_id,
                "method": call.rpc.path,
                "key": key,
                "request_digest": digests[0],
                "created_at": now,
            },
        )
        if isinstance(claimed, CursorResult) and claimed.rowcount:
            return None
        before = await self._get(session, call, key)
        if before.request_digest not in digests:
            raise IdempotencyMismatch
        headers, _, message = self._keys.decrypt(before.answer, bound_to=_binding(call, key)).partition(b"\n")
        return Answer(message, tuple((name, value) for name, value in json.loads(headers)))

    async def record(self, session: AsyncSession, call: Call, key: str, answer: Answer) -> None:
        """Keep the answer of the call that took the key."""
        plain = json.dumps(answer.headers).encode() + b"\n" + answer.message
        (await self._get(session, call, key)).answer = self._keys.encrypt(plain, bound_to=_binding(call, key))
        await session.flush()

    async def _get(self, session: AsyncSession, call: Call, key: str) -> IdempotencyKey:
        return await session.get_one(IdempotencyKey, (call.caller.account_id, call.rpc.path, key))


def _binding(call: Call, key: str) -> str:
    return f"{call.caller.account_id}/{call.rpc.path}/{key}"
