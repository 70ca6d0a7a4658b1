"""The servicer of the hosts that run functions: what each is to hold, how that went, and who may call."""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog
from cryptography.exceptions import InvalidTag
from sqlalchemy import tuple_
from sqlmodel import col, select

from controlplane.access.admission import Admission
from controlplane.access.uses import Uses
from controlplane.api.hosts.v1 import hosts_pb2, hosts_pb2_grpc
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.errors import NotFound, PortalError, RateLimited, Unauthenticated
from controlplane.events.feed import Feed
from controlplane.functions.invocations import call_secrets
from controlplane.functions.logs import FunctionLogs
from controlplane.functions.model import BUILDING, READY, Function, FunctionCode, FunctionVersion, sequence_of
from controlplane.functions.versions import Versions
from controlplane.hosts.interceptor import current_host
from controlplane.hosts.model import Host
from controlplane.hosts.pulls import Pulls
from controlplane.keys import Keys
from controlplane.reconcile.model import DELETING, FAILED
from controlplane.rpc.call import Call
from controlplane.rpc.contract import rpcs
from controlplane.sql import Store

Context = grpc.aio.ServicerContext[Any, Any]
_MOST = 100  # functions of a page
_MOST_BYTES = 4 * 1024 * 1024  # of a page, or a little more: one function has up to 3 MB of variables
_LONGEST_ERROR = 2000  # characters
_log = structlog.get_logger("functions")
_INVOKE = next(rpc for rpc in rpcs().values() if rpc.name == "InvokeFunction")


class FunctionHostService(hosts_pb2_grpc.FunctionHostServiceServicer):
    """What a host of functions asks."""

    def __init__(
        self,
        *,
        store: Store,
        catalog: Catalog,
        clock: Clock,
        keys: Keys,
        admission: Admission,
        uses: Uses,
        versions: Versions,
        function_logs: FunctionLogs,
        feed: Feed,
        pulls: Pulls,
        wake: Callable[[], None],
    ) -> None:
        self._store = store
        self._refused_networks = catalog.proxy_policy.refused_networks
        self._clock = clock
        self._keys = keys
        self._admission = admission
        self._uses = uses
        self._versions = versions
        self._logs = function_logs
        self._feed = feed
        self._pulls = pulls
        self._wake = wake

    async def StartFunctionHost(
        self, request: hosts_pb2.StartFunctionHostRequest, context: Context
    ) -> hosts_pb2.StartFunctionHostResponse:
        """Begin a host's start: it says what it offers, and learns what our calls show it."""
        instance = await self._pulls.start(
            address=request.address, runtimes=list(request.runtimes), network=request.network
        )
        return hosts_pb2.StartFunctionHostResponse(
            instance=instance,
            call_secret=call_secrets(self._keys, instance)[0],
            refused_networks=map(str, self._refused_networks),
        )

    async def PullFunctions(
        self, request: hosts_pb2.PullFunctionsRequest, context: Context
    ) -> hosts_pb2.PullFunctionsResponse:
        """Return the functions of the calling host's region that have changed after a place."""
        await self._pulls.check(request.instance, context)
        region = current_host().region
        rows = await self._pulls.pull(
            Function,
            col(Function.region) == region,
            scope=sequence_of(region),
            after=request.after,
            wait=request.wait,
            most=_MOST,
        )
        page = hosts_pb2.PullFunctionsResponse(sequence=request.after, complete=len(rows) < _MOST)
        versions = await self._versions_of(rows)
        for row in rows:
            hosted = self._hosted(row, versions)
            if page.functions and page.ByteSize() + hosted.ByteSize() > _MOST_BYTES:
                page.complete = False
                break
            page.functions.append(hosted)
            page.sequence = row.host_sequence
        return page

    async def GetFunctionCode(
        self, request: hosts_pb2.GetFunctionCodeRequest, context: Context
    ) -> hosts_pb2.GetFunctionCodeResponse:
        """Return the code of a version of the calling host's region; NOT_FOUND if it is not kept."""
        statement = (
            select(FunctionCode)
            .join(FunctionVersion, col(FunctionVersion.code_sha256) == col(FunctionCode.sha256))
            .join(Function, col(Function.id) == col(FunctionVersion.function_id))
            .where(
                col(FunctionVersion.id) == request.version_id,
                col(FunctionCode.function_id) == col(Function.id),
                col(Function.region) == current_host().region,
            )
        )
        rows = await self._store.fetch(statement)
        if not rows:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such version in the host's region.")
        code: FunctionCode = rows[0]
        if code.is_archive:
            return hosts_pb2.GetFunctionCodeResponse(archive=code.content)
        return hosts_pb2.GetFunctionCodeResponse(source=code.content.decode())

    async def ReportFunctionBuild(
        self, request: hosts_pb2.ReportFunctionBuildRequest, context: Context
    ) -> hosts_pb2.ReportFunctionBuildResponse:
        """Let a version answer that could be loaded, or keep why it could not; the first report of it stands."""
        now, region = self._clock.now(), current_host().region
        of_version = select(FunctionVersion.function_id).where(col(FunctionVersion.id) == request.version_id)
        locked = select(Function).where(col(Function.id).in_(of_version), col(Function.region) == region)
        async with self._store.session() as session:
            function = (await session.execute(locked.with_for_update(key_share=True))).scalar_one_or_none()
            # Read under the lock. One that is being loaded is the one that is wanted: any other was given up.
            version = await session.get(FunctionVersion, request.version_id) if function is not None else None
            if function is None or version is None or version.state != BUILDING or function.state == DELETING:
                return hosts_pb2.ReportFunctionBuildResponse()
            answered = function.active_version is not None
            if request.error:
                version.state, version.error = FAILED, _kept(request.error)
            else:
                version.state, function.active_version = READY, version.number
            function.resume(now=now)
            await function.hand_over(session, sequence_of(region), now=now)
            if version.error and answered:  # else the function has failed, which is an event by itself
                await self._feed.append(
                    session,
                    account_id=function.account_id,
                    type_="function.build_failed",
                    resource_id=function.id,
                    resource_name=function.name,
                    status=function.state,
                    detail=version.error.partition("\n")[0],
                )
            await session.commit()
        self._pulls.announce(sequence_of(region))
        self._feed.announce(function.account_id)
        self._wake()
        return hosts_pb2.ReportFunctionBuildResponse()

    async def ReportFunctionLogs(
        self, request: hosts_pb2.ReportFunctionLogsRequest, context: Context
    ) -> hosts_pb2.ReportFunctionLogsResponse:
        """Keep a batch of lines, once."""
        await self._pulls.check(request.instance, context)
        async with self._store.session() as session:
            written = await self._logs.keep(session, request.lines, host=current_host(), batch=request.batch)
            await session.commit()
        self._logs.announce(written)
        return hosts_pb2.ReportFunctionLogsResponse()

    async def AuthorizeFunctionCall(
        self, request: hosts_pb2.AuthorizeFunctionCallRequest, context: Context
    ) -> hosts_pb2.AuthorizeFunctionCallResponse:
        """Tell whether whoever knocks at a function's address may call it, as if they called InvokeFunction."""
        call = Call(
            rpc=_INVOKE,
            request_id=secrets.token_hex(16),
            client_ip=request.client_ip,
            rest=True,
            metadata={"authorization": request.authorization} if request.authorization else {},
        )
        answer = hosts_pb2.AuthorizeFunctionCallResponse()
        try:
            await self._admit(call, request.function_id)
        except PortalError as error:
            self._uses.refused(call, error)
            answer.status, answer.code, answer.error = error.http, error.code, str(error)
            if isinstance(error, Unauthenticated):
                call.headers.append(("www-authenticate", "Bearer"))
            if isinstance(error, RateLimited):
                call.headers.append(("retry-after", str(error.retry_after)))
        answer.headers.update(dict(call.headers))
        return answer

    async def _versions_of(self, rows: Sequence[Function]) -> dict[tuple[str, int], FunctionVersion]:
        """Return the versions that these functions want, and those that answer."""
        wanted = {(row.id, number) for row in rows for number in (row.wanted_version, row.active_version) if number}
        if not wanted:
            return {}
        key = tuple_(FunctionVersion.function_id, FunctionVersion.number)
        found = await self._store.fetch(select(FunctionVersion).where(key.in_(sorted(wanted))))
        return {(version.function_id, version.number): version for version in found}

    def _hosted(self, row: Function, versions: dict[tuple[str, int], FunctionVersion]) -> hosts_pb2.HostedFunction:
        """Return a function as the calling host is to hold it.

        A version that is missing was forgotten since the row was read; so the row has changed, and comes again.
        """
        host = current_host()
        if row.state == DELETING or row.runtime not in host.runtimes:
            return hosts_pb2.HostedFunction(id=row.id, removed=True)
        active = versions.get((row.id, row.active_version or 0))
        wanted = versions.get((row.id, row.wanted_version))
        try:
            return hosts_pb2.HostedFunction(
                id=row.id,
                account_id=row.account_id,
                name=row.name,
                auth=row.auth,
                max_concurrency=row.max_concurrency,
                active=self._hosted_version(row, active, host) if active else None,
                building=self._hosted_version(row, wanted, host) if wanted and wanted.state == BUILDING else None,
            )
        except (InvalidTag, KeyError):
            # One that cannot be held must not keep all others of the region from being.
            _log.error("a function's variables cannot be opened: is a key of keys.json gone?", id=row.id)
            return hosts_pb2.HostedFunction(id=row.id, removed=True)

    def _hosted_version(self, row: Function, version: FunctionVersion, host: Host) -> hosts_pb2.HostedVersion | None:
        if version.allow_network and not host.network:
            return None
        return hosts_pb2.HostedVersion(
            id=version.id,
            version=version.number,
            runtime=row.runtime,
            entrypoint=version.entrypoint,
            memory_mb=version.memory_mb,
            timeout_ms=version.timeout_ms,
            env=self._versions.env_of(row, version),
            allow_network=version.allow_network,
        )

    async def _admit(self, call: Call, function_id: str) -> None:
        """Let a caller go on to a function.

        Raises NotFound, or what Admission does; a token of another account is none.
        """
        region = current_host().region
        of_region = col(Function.id) == function_id, col(Function.region) == region, col(Function.state) != DELETING
        rows = await self._store.fetch(select(Function.account_id).where(*of_region))
        if not rows:
            raise NotFound("function", function_id)
        await self._admission.admit(call, account_id=rows[0].account_id)


def _kept(error: str) -> str:
    """Return what is kept of an error; PostgreSQL keeps no U+0000."""
    return error.replace("\0", "\N{REPLACEMENT CHARACTER}")[:_LONGEST_ERROR]
