"""The servicer of the feed."""

from typing import Any

import grpc

from controlplane.api.v1 import events_pb2, events_pb2_grpc
from controlplane.events.feed import Feed
from controlplane.events.model import to_proto
from controlplane.rpc.call import current
from controlplane.rpc.paging import MAX_PAGE, link_on

Context = grpc.aio.ServicerContext[Any, Any]

FROM_NOW_ON = -1


class EventService(events_pb2_grpc.EventServiceServicer):
    """The feed of an account."""

    def __init__(self, *, feed: Feed) -> None:
        self._feed = feed

    async def ListEvents(
        self, request: events_pb2.ListEventsRequest, context: Context
    ) -> events_pb2.ListEventsResponse:
        """List what happened after a place in the feed, or wait for it."""
        call = current()
        account_id = call.caller.account_id
        after = await self._feed.head(account_id) if request.after == FROM_NOW_ON else request.after
        limit = request.page_size or MAX_PAGE
        events = await self._feed.read(account_id, after=after, limit=limit, wait=request.wait)
        last = events[-1].sequence if events else after
        if call.rest:
            link_on(call, after=last, wait=request.wait, page_size=request.page_size)
            last = 0  # the answer is a bare array
        return events_pb2.ListEventsResponse(events=map(to_proto, events), last_sequence=last)
