"""From what a function's row wants to what its region's hosts have in force. They ask for it; here is only looked."""

from dataclasses import replace

from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col, select

from controlplane.access import quota
from controlplane.clock import Clock
from controlplane.functions.logs import end_log
from controlplane.functions.model import HOSTS, READY, Function, FunctionVersion
from controlplane.hosts.kinds import FUNCTIONS
from controlplane.hosts.model import Host, live_hosts
from controlplane.reconcile.model import DELETING, FAILED
from controlplane.reconcile.step import Failed, Gone, NotYet, Outcome, Settled
from controlplane.sql import Store


class FunctionProvisioner:
    """Settles functions once every host that answers has taken them over, or once they could not be loaded."""

    kind = "function"
    model = Function
    at_once = 8

    def __init__(self, *, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def step(self, row: Function) -> Outcome:
        """Look whether the hosts of the region hold the function as it is.

        One that does not answer is not waited for: it begins anew when it is back. Raises NotYet until then.
        """
        hosts = await live_hosts(self._store, self._clock, kind=FUNCTIONS, region=row.region)
        if row.state == DELETING:
            _check_taken_over(row, hosts)
            return Gone()
        # What could not be loaded is no more than said: the version before answers.
        stays = Settled(READY, {"observed_generation": row.observed_generation})
        try:
            error = await self._build_error(row, hosts)
            if error is None or row.active_version is not None:
                _check_taken_over(row, hosts)
        except NotYet as reason:
            if row.active_version is None or row.deadline_at is None or self._clock.now() < row.deadline_at:
                raise
            return replace(stays, values={**stays.values, "last_error": str(reason)})
        if error is None:
            return Settled(READY)
        if row.active_version is None:
            return Failed(error)
        return replace(stays, values={**stays.values, "last_error": error})

    async def follow_up(self, session: AsyncSession, row: Function, outcome: Outcome) -> bool:
        """Give back what a function held that is gone; its versions and code go with its row."""
        if isinstance(outcome, Gone):
            await quota.release(session, resource_id=row.id)
            await end_log(session, row.id)
        return False

    async def _build_error(self, row: Function, hosts: list[Host]) -> str | None:
        """Return why the version that is wanted could not be loaded, None if it answers; raise NotYet until then."""
        if row.active_version == row.wanted_version:
            return None
        rows = await self._store.fetch(
            select(FunctionVersion.state, FunctionVersion.error).where(
                col(FunctionVersion.function_id) == row.id, col(FunctionVersion.number) == row.wanted_version
            )
        )
        if rows and rows[0].state == FAILED:
            return str(rows[0].error)
        # Also where it is ready by now: it answers since, and this row is from before that.
        raise NotYet(HOSTS, "The code is being loaded." if hosts else _NO_HOST)


_NO_HOST = "No host that runs functions answers."


def _check_taken_over(row: Function, hosts: list[Host]) -> None:
    """Raise NotYet unless every host that answers has taken the row over."""
    if not hosts and row.state != DELETING:
        raise NotYet(HOSTS, _NO_HOST)
    if any(host.applied < row.host_sequence for host in hosts):
        raise NotYet(HOSTS, "A host has not taken it over yet.")
