"""The servicer of the record."""

from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from sqlmodel import col, or_, select

from controlplane.api.v1 import audit_pb2, audit_pb2_grpc
from controlplane.audit.model import AuditEntry, to_proto
from controlplane.errors import BrokenRule, InvalidField
from controlplane.rpc import paging
from controlplane.rpc.call import current
from controlplane.sql import Store

Context = grpc.aio.ServicerContext[Any, Any]

_FILTERS = ("action", "outcome", "credential", "ip")


class AuditService(audit_pb2_grpc.AuditServiceServicer):
    """The record of an account."""

    def __init__(self, *, store: Store) -> None:
        self._store = store

    async def ListAuditEntries(
        self, request: audit_pb2.ListAuditEntriesRequest, context: Context
    ) -> audit_pb2.ListAuditEntriesResponse:
        """List the entries that fit all filters.

        Raises InvalidField.
        """
        call = current()
        after, limit = paging.bounds_by_number(request)
        statement = (
            select(AuditEntry)
            .where(col(AuditEntry.account_id) == call.caller.account_id, col(AuditEntry.sequence) > after)
            .order_by(col(AuditEntry.sequence))
            .limit(limit)
        )
        for name in _FILTERS:
            if wanted := getattr(request, name):
                statement = statement.where(col(getattr(AuditEntry, name)) == wanted)
        if request.target:
            statement = statement.where(
                or_(col(AuditEntry.target) == request.target, col(AuditEntry.target_name) == request.target)
            )
        if request.HasField("since"):
            statement = statement.where(col(AuditEntry.created_at) >= _time(request.since, "since"))
        if request.HasField("until"):
            statement = statement.where(col(AuditEntry.created_at) < _time(request.until, "until"))
        page, next_page = paging.cut(await self._store.fetch(statement), request, call)
        return audit_pb2.ListAuditEntriesResponse(entries=map(to_proto, page), next_page_token=next_page)


def _time(stamp: Timestamp, field: str) -> datetime:
    try:
        return stamp.ToDatetime(tzinfo=UTC)
    except ValueError:
        raise InvalidField(BrokenRule(field, "must lie between the years 1 and 9999")) from None
