"""What becomes a function or a new version of one, in the transaction of the order: what is asked for is possible."""

from sqlalchemy import bindparam
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.api.v1 import functions_pb2
from controlplane.catalog.model import Catalog
from controlplane.clock import Clock
from controlplane.errors import AlreadyExists, BrokenRule, Conflict, InvalidField, NotFound
from controlplane.functions.archive import ArchiveError, default_entrypoint, source_file
from controlplane.functions.logs import begin_log
from controlplane.functions.model import BUILDING, READY, Function
from controlplane.functions.versions import Code, Versions, find_earlier, find_version, read_code, settings_of
from controlplane.hosts.kinds import FUNCTIONS
from controlplane.hosts.model import live_hosts
from controlplane.ids import new_id
from controlplane.reconcile.model import FAILED
from controlplane.rpc.call import Call
from controlplane.rpc.merge import merged
from controlplane.sql import Store

_MEMORY_MB = 128  # where the order does not say, as the contract has it; so are these
_TIMEOUT_MS = 10_000
_AUTH = "token"
_MAX_CONCURRENCY = 10
_MOST_VARIABLES = 100

BY_NAME = select(Function).where(
    col(Function.account_id) == bindparam("account_id"), col(Function.name) == bindparam("name")
)


class FunctionOrders:
    """Takes orders of functions."""

    def __init__(self, *, store: Store, catalog: Catalog, versions: Versions, clock: Clock) -> None:
        self._store = store
        self._catalog = catalog
        self._versions = versions
        self._clock = clock

    async def add(self, call: Call, wanted: functions_pb2.CreateFunction) -> Function:
        """Record a new function and its first version.

        Raises InvalidField, AlreadyExists, QuotaExceeded, or Conflict where no host runs it.
        """
        region = wanted.region or self._catalog.default_region
        if not self._catalog.has_region(region):
            raise InvalidField(BrokenRule("region", f"there is no region '{region}': /api/portal/regions lists them"))
        code = await read_code(wanted)
        if code is None:
            raise InvalidField(BrokenRule("source", "the code is missing: give a source or an archive"))
        entrypoint = wanted.entrypoint or default_entrypoint(wanted.runtime, inline=not code.is_archive)
        _check_entrypoint(wanted.runtime, entrypoint)
        await self._check_hosts(region, wanted.runtime, network=wanted.allow_network)
        account_id, session = call.caller.account_id, call.session
        taken = await session.execute(BY_NAME, {"account_id": account_id, "name": wanted.name})
        if taken.first() is not None:  # the unique index decides where two come at once
            raise AlreadyExists("function", wanted.name)
        function_id, now = new_id("fn"), self._clock.now()
        limit = self._catalog.plan(call.caller.plan).quotas.functions
        await quota.charge(session, account_id=account_id, kind="functions", resource_id=function_id, limit=limit)
        function = Function(
            id=function_id,
            account_id=account_id,
            name=wanted.name,
            runtime=wanted.runtime,
            region=region,
            auth=wanted.auth or _AUTH,
            max_concurrency=wanted.max_concurrency or _MAX_CONCURRENCY,
            entrypoint=entrypoint,
            memory_mb=wanted.memory_mb or _MEMORY_MB,
            timeout_ms=wanted.timeout_ms or _TIMEOUT_MS,
            allow_network=wanted.allow_network,
            state=BUILDING,
            generation=0,
            created_at=now,
            updated_at=now,
        )
        function.order_real(now=now)
        session.add(function)
        try:
            await session.flush()
        except IntegrityError:
            raise AlreadyExists("function", wanted.name) from None
        await begin_log(session, function.id)
        await self._versions.add(session, function, code, wanted.env)
        return function

    async def change(
        self, call: Call, function: Function, change: functions_pb2.UpdateFunction, code: Code | None
    ) -> bool:
        """Take over what a change names, as a new version where calls depend on it; return whether anything differs.

        Raises InvalidField, or Conflict where no host runs it.
        """
        before = await find_version(call.session, function, function.wanted_version)
        assert before is not None  # noqa: S101 - what is wanted is kept
        env_before = self._versions.env_of(function, before)
        env = merged(env_before, change.env)
        if len(env) > _MOST_VARIABLES:
            raise InvalidField(BrokenRule("env", f"at most {_MOST_VARIABLES} variables, and these would be {len(env)}"))
        if change.HasField("entrypoint"):
            _check_entrypoint(function.runtime, change.entrypoint)
        if change.allow_network and not function.allow_network:
            await self._check_hosts(function.region, function.runtime, network=True)
        settings, bounds = settings_of(function), (function.auth, function.max_concurrency)
        for name in ("entrypoint", "memory_mb", "timeout_ms", "allow_network", "auth", "max_concurrency"):
            if change.HasField(name):
                setattr(function, name, getattr(change, name))
        # The same code again is tried again if it could not be loaded.
        is_new_code = code is not None and (code.sha256 != before.code_sha256 or before.state == FAILED)
        if is_new_code or settings_of(function) != settings or env != env_before:
            await self._versions.add(call.session, function, code or before, env)
            return True
        return (function.auth, function.max_concurrency) != bounds

    async def roll_back(self, call: Call, function: Function, number: int | None) -> bool:
        """Let an earlier version answer, by default the one before; return whether it did not already.

        Raises InvalidField for one that is not kept, Conflict for one that could not be loaded, or if there is none.
        """
        if number is None:
            version = await find_earlier(call.session, function)
            if version is None:
                raise Conflict(f"The function '{function.name}' has no earlier version that could be loaded.")
        else:
            version = await find_version(call.session, function, number)
            if version is None:
                raise InvalidField(BrokenRule("version", f"there is no version {number}: …/versions lists them"))
        if version.state != READY:
            raise Conflict(f"The version {version.number} is {version.state}: only one that is {READY} can answer.")
        if version.number == function.active_version == function.wanted_version:
            return False
        await self._versions.go_back(call.session, function, version)
        return True

    async def _check_hosts(self, region: str, runtime: str, *, network: bool) -> None:
        """Raise Conflict unless some host of a region runs this now, and lets it into the internet if it must."""
        hosts = await live_hosts(self._store, self._clock, kind=FUNCTIONS, region=region)
        fitting = [host for host in hosts if runtime in host.runtimes]
        if not fitting:
            offered = ", ".join(sorted({name for host in hosts for name in host.runtimes})) or "none at all"
            raise Conflict(f"The region '{region}' does not run {runtime} now; the runtimes there: {offered}.")
        if network and not any(host.network for host in fitting):
            raise Conflict(
                f"The region '{region}' lets no {runtime} function into the internet: leave allow_network out."
            )


async def lock_function(session: AsyncSession, *, account_id: str, name: str) -> Function:
    """Return the function of this name for a change; no other transaction changes it meanwhile.

    Raises NotFound.
    """
    locked = await session.execute(BY_NAME.with_for_update(key_share=True), {"account_id": account_id, "name": name})
    function: Function | None = locked.scalar_one_or_none()
    if function is None:
        raise NotFound("function", name)
    return function


def _check_entrypoint(runtime: str, entrypoint: str) -> None:
    try:
        source_file(runtime, entrypoint)
    except ArchiveError as error:
        raise InvalidField(BrokenRule("entrypoint", str(error))) from None
