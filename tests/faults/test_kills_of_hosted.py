"""The server, killed at every moment of every transition of functions and proxies, while their hosts go on.

These are the real ones: a function is deployed where a call of it runs the code, a proxy is there where a connection
through it reaches its target.
"""

import asyncio
import itertools
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import pytest

from controlplane.audit.verify import verify
from controlplane.keys import Keys
from controlplane.local.postgres import EmbeddedPostgres
from tests.conftest import new_storage
from tests.faults import transitions_of_functions, transitions_of_proxies
from tests.faults.hosting import function_host, proxy_host
from tests.faults.installation import Installation, Refusal, new_installation
from tests.faults.kill import LivedT, kill
from tests.faults.process import Launcher
from tests.faults.table import EVERYTHING, Row, Table
from tests.faults.transitions import Transition
from tests.faults.transitions_of_functions import FunctionLife
from tests.faults.transitions_of_proxies import ProxyLife
from tests.proxies.socks import echo

STORAGES = ("sqlite", "postgresql")
TRANSITIONS = {
    "functions": [transition.name for transition in transitions_of_functions.TRANSITIONS],
    "proxies": [transition.name for transition in transitions_of_proxies.TRANSITIONS],
}
# The storages, on which the control plane keeps its rows, take turns. What only reads has no moments here, whatever was
# asked for: the reconciler and the hosts look again and again, and so at any time.
CASES = [
    (product, storage, transition)
    for product, transitions in TRANSITIONS.items()
    for number, transition in enumerate(transitions)
    for storage in (STORAGES if EVERYTHING else (STORAGES[number % 2],))
]


@dataclass(frozen=True, kw_only=True)
class Run(Generic[LivedT]):
    """What is done on one installation: `lives` go through `transitions`, the first one through all but their own."""

    where: str
    storage: str
    installation: Installation
    lives: Iterator[LivedT]
    begin: Callable[[LivedT], Awaitable[None]]
    transitions: Sequence[Transition[LivedT]]
    check: Callable[[Installation], Awaitable[None]]

    async def kill_everywhere(self, table: Table) -> None:
        """Kill the server at each moment of each transition, which is done with once it has no more of them."""
        patient = next(self.lives)
        await self.begin(patient)
        for transition in self.transitions:
            row = table.row(self.where, f"{transition.name}, {self.storage}")
            try:
                await self._kill_at_each_moment(transition, patient, row)
            except (AssertionError, Refusal, TimeoutError):
                row.lost = f"{traceback.format_exc()}\n{self.installation.log()}"
                return
        await self.installation.kill()
        assert not (await verify(self.installation.store, Keys.load(self.installation.folder / "keys.json"))).broken

    async def _kill_at_each_moment(self, transition: Transition[LivedT], patient: LivedT, row: Row) -> None:
        """Go through a transition once to see which moments it has, then once for each of these, and what comes up."""
        moments, number = [""], 0
        while number < len(moments):
            process = self.installation.process
            life = next(self.lives) if transition.is_own else patient
            await kill(life, transition, moments[number], row, check=self.check)
            moments += [moment for moment in process.came if moment not in moments]
            process.came.clear()
            number += 1 if EVERYTHING or not number else transition.stride


@pytest.fixture(scope="module")
async def killed(
    folder: Path, servers: Launcher, postgres: EmbeddedPostgres, table: Table, request: pytest.FixtureRequest
) -> Table:
    """The table, once everything is done that tests were asked for; both products on both storages at the same time."""
    wanted = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_no_kill_loses_what_hosts_hold
    ]
    async with AsyncExitStack() as stack:
        runs = list[Run[FunctionLife] | Run[ProxyLife]]()
        for product, storage in itertools.product(TRANSITIONS, STORAGES):
            names = [
                str(each["transition"]) for each in wanted if (each["product"], each["storage"]) == (product, storage)
            ]
            if not names:
                continue
            installation = await stack.enter_async_context(
                new_installation(
                    folder / f"{product}-{storage}",
                    launcher=servers,
                    clusters=[],
                    database_url="" if storage == "sqlite" else await new_storage(postgres, f"killed_{product}"),
                )
            )
            run = _functions if product == "functions" else _proxies
            runs.append(await stack.enter_async_context(run(installation, storage, names)))
        async with asyncio.TaskGroup() as group:
            for each in runs:
                group.create_task(each.kill_everywhere(table))
    return table


@pytest.mark.parametrize(("product", "storage", "transition"), CASES)
def test_no_kill_loses_what_hosts_hold(killed: Table, product: str, storage: str, transition: str) -> None:
    """Wherever the server is killed: acknowledged orders are fulfilled, others whole, and hosts hold just the rows."""
    row = killed.rows.get((product, f"{transition}, {storage}"))
    assert row is not None, "not come to, as something was lost before"
    assert row.lost is None, row.lost
    assert row.moments


@asynccontextmanager
async def _functions(installation: Installation, storage: str, names: list[str]) -> AsyncIterator[Run[FunctionLife]]:
    async with function_host(installation) as host:
        yield Run(
            where="functions",
            storage=storage,
            installation=installation,
            lives=(FunctionLife(installation, f"life-{number}") for number in itertools.count(1)),
            begin=transitions_of_functions.begin,
            transitions=[each for each in transitions_of_functions.TRANSITIONS if each.name in names],
            check=transitions_of_functions.check_on(host),
        )


@asynccontextmanager
async def _proxies(installation: Installation, storage: str, names: list[str]) -> AsyncIterator[Run[ProxyLife]]:
    async with proxy_host(installation) as host, echo() as target:
        yield Run(
            where="proxies",
            storage=storage,
            installation=installation,
            lives=(ProxyLife(installation, f"life-{number}", target=target) for number in itertools.count(1)),
            begin=transitions_of_proxies.begin,
            transitions=[each for each in transitions_of_proxies.TRANSITIONS if each.name in names],
            check=transitions_of_proxies.check_on(host),
        )
