"""The servicer of functions: rules and queries. One RPC is one transaction; the hosts ask for what they are to run."""

from functools import partial
from typing import Any

import grpc
from sqlalchemy import bindparam
from sqlmodel import col, select

from controlplane.api.v1 import functions_pb2, functions_pb2_grpc
from controlplane.clock import Clock
from controlplane.errors import Conflict, NotFound
from controlplane.functions import logs
from controlplane.functions.invocations import Invocations
from controlplane.functions.logs import FunctionLogs
from controlplane.functions.model import (
    DEADLINES,
    HOSTS,
    Function,
    FunctionVersion,
    sequence_of,
    to_proto,
    version_to_proto,
)
from controlplane.functions.orders import BY_NAME, FunctionOrders, lock_function
from controlplane.functions.versions import SHOWN, read_code
from controlplane.hosts.pulls import Pulls
from controlplane.reconcile.loop import Reconciler
from controlplane.reconcile.model import DELETING
from controlplane.rpc import etag, paging
from controlplane.rpc.call import Call, current
from controlplane.rpc.remembered import remembered
from controlplane.sql import Store

Context = grpc.aio.ServicerContext[Any, Any]

_LINES = 100  # where the caller does not say

_LIST = (
    select(Function)
    .where(col(Function.account_id) == bindparam("account_id"), col(Function.id) > bindparam("after"))
    .order_by(col(Function.id))
    .limit(bindparam("limit"))
)
_VERSIONS = (
    select(*SHOWN)
    .where(col(FunctionVersion.function_id) == bindparam("function_id"))
    .order_by(col(FunctionVersion.number))
)


class FunctionService(functions_pb2_grpc.FunctionServiceServicer):
    """Serverless functions."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        orders: FunctionOrders,
        function_logs: FunctionLogs,
        invocations: Invocations,
        pulls: Pulls,
        reconciler: Reconciler,
    ) -> None:
        self._store = store
        self._clock = clock
        self._orders = orders
        self._logs = function_logs
        self._invocations = invocations
        self._pulls = pulls
        self._reconciler = reconciler

    @remembered
    async def ListFunctions(
        self, request: functions_pb2.ListFunctionsRequest, context: Context
    ) -> functions_pb2.ListFunctionsResponse:
        """List the account's functions."""
        call = current()
        rows = await self._store.fetch(_LIST, {"account_id": call.caller.account_id, **paging.bounds(request)})
        page, next_page = paging.cut(rows, request, call)
        return functions_pb2.ListFunctionsResponse(functions=map(to_proto, page), next_page_token=next_page)

    async def CreateFunction(
        self, request: functions_pb2.CreateFunctionRequest, context: Context
    ) -> functions_pb2.Function:
        """Record a new function; a host loads its code, and the function is ready once every host has taken it over.

        Raises InvalidField, AlreadyExists, QuotaExceeded, or Conflict where no host runs it.
        """
        call = current()
        return await self._handed_over(call, await self._orders.add(call, request.function))

    @remembered
    async def GetFunction(self, request: functions_pb2.GetFunctionRequest, context: Context) -> functions_pb2.Function:
        """Show one function.

        Raises NotFound.
        """
        call = current()
        return _shown(call, await self._read(call, request.name))

    async def UpdateFunction(
        self, request: functions_pb2.UpdateFunctionRequest, context: Context
    ) -> functions_pb2.Function:
        """Change what the request names; what is as it was already is no change.

        Raises NotFound, Stale, InvalidField, or Conflict while it is being deleted or where no host runs it.
        """
        call = current()
        code = await read_code(request.function)
        function = await self._lock(call, request.name)
        _check_not_deleting(function)
        if not await self._orders.change(call, function, request.function, code):
            return _shown(call, function)
        function.order_real(now=self._clock.now())
        return await self._handed_over(call, function)

    async def DeleteFunction(
        self, request: functions_pb2.DeleteFunctionRequest, context: Context
    ) -> functions_pb2.Function:
        """Order the function away; once more changes nothing.

        Raises NotFound or Stale.
        """
        call, now = current(), self._clock.now()
        function = await self._lock(call, request.name)
        if function.state == DELETING:
            return _shown(call, function)
        function.order(DELETING, now=now, within=DEADLINES[DELETING], waiting_on=HOSTS)
        function.updated_at = now
        return await self._handed_over(call, function)

    @remembered
    async def ListFunctionVersions(
        self, request: functions_pb2.ListFunctionVersionsRequest, context: Context
    ) -> functions_pb2.ListFunctionVersionsResponse:
        """List the versions of a function that are kept.

        Raises NotFound.
        """
        function = await self._read(current(), request.name)
        rows = await self._store.fetch(_VERSIONS, {"function_id": function.id})
        return functions_pb2.ListFunctionVersionsResponse(
            versions=[version_to_proto(row, active=row.number == function.active_version) for row in rows]
        )

    async def RollbackFunction(
        self, request: functions_pb2.RollbackFunctionRequest, context: Context
    ) -> functions_pb2.Function:
        """Let an earlier version answer; where it does already, nothing changes.

        Raises NotFound, Stale, InvalidField for a version that is not kept, or Conflict for one that could not be
        loaded, if there is none, or while the function is being deleted.
        """
        call, wanted = current(), request.rollback
        function = await self._lock(call, request.name)
        _check_not_deleting(function)
        number = wanted.version if wanted.HasField("version") else None
        if not await self._orders.roll_back(call, function, number):
            return _shown(call, function)
        function.order_real(now=self._clock.now())
        return await self._handed_over(call, function)

    async def InvokeFunction(
        self, request: functions_pb2.InvokeFunctionRequest, context: Context
    ) -> functions_pb2.Invocation:
        """Call a function and wait for its answer.

        Raises NotFound, InvalidField for an event that is no JSON, Conflict until a version answers, TooLarge,
        TooManyCalls, TimedOut, or Unavailable while no host takes the call.
        """
        call = current()
        function = await self._read(call, request.name)
        if function.active_version is None or function.state == DELETING:
            raise Conflict(f"The function '{function.name}' is {function.state}: it cannot be called.")
        return await self._invocations.invoke(function, request.event, request_id=call.request_id)

    async def ListFunctionLogs(
        self, request: functions_pb2.ListFunctionLogsRequest, context: Context
    ) -> functions_pb2.ListFunctionLogsResponse:
        """List lines of a function's log after a place, or wait for one.

        Raises NotFound.
        """
        call, after = current(), int(request.after)
        function = await self._read(call, request.name)
        lines = await self._logs.read(
            function.id,
            after=after,
            version=request.version if request.HasField("version") else None,
            limit=request.page_size or _LINES,
            wait=request.wait,
        )
        if call.rest:
            last = lines[-1].sequence if lines else max(after, 0)
            asked = {"wait": request.wait, "page_size": request.page_size, "version": request.version}
            paging.link_on(call, after=last, **asked)
        return functions_pb2.ListFunctionLogsResponse(lines=map(logs.to_proto, lines))

    async def _read(self, call: Call, name: str) -> Function:
        rows = await self._store.fetch(BY_NAME, {"account_id": call.caller.account_id, "name": name})
        if not rows:
            raise NotFound("function", name)
        function: Function = rows[0]
        return function

    async def _lock(self, call: Call, name: str) -> Function:
        function = await lock_function(call.session, account_id=call.caller.account_id, name=name)
        etag.check_match(call, function)
        return function

    async def _handed_over(self, call: Call, function: Function) -> functions_pb2.Function:
        """Let the hosts take the function over as it is now, and show it."""
        scope = sequence_of(function.region)
        await function.hand_over(call.session, scope, now=self._clock.now())
        call.after_commit.append(partial(self._pulls.announce, scope))
        self._reconciler.take(function, call.committed)
        return _shown(call, function)


def _shown(call: Call, function: Function) -> functions_pb2.Function:
    etag.show(call, function)
    return to_proto(function)


def _check_not_deleting(function: Function) -> None:
    if function.state == DELETING:
        raise Conflict(f"The function '{function.name}' is being deleted and cannot be changed any more.")
