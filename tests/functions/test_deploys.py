"""Deploys under load, and hosts that are killed, through the real edge: nothing that was accepted is lost."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Self

import pytest
from sqlmodel import col, select

from controlplane.hosts.admin import remove_host
from controlplane.hosts.kinds import FUNCTIONS as KIND
from controlplane.hosts.model import Host
from controlplane.local.postgres import EmbeddedPostgres
from tests.conftest import new_storage
from tests.hosts import host_process, new_host
from tests.stack import Customer, Stack, eventually, free_port

FUNCTIONS = "/api/portal/functions"


def answering(version: int) -> str:
    """Return the source of a handler that tells its version, and takes a moment for that."""
    return f"import time\ndef handler(event, context):\n    time.sleep(0.01)\n    return {{'version': {version}}}\n"


class Load:
    """Callers that call a public address again and again, and count how that went."""

    def __init__(self, customer: Customer, path: str, *, callers: int) -> None:
        self.statuses: Counter[int] = Counter()
        self.versions: list[int] = []
        self._customer = customer
        self._path = path
        self._stopped = asyncio.Event()
        self._callers = callers

    async def __aenter__(self) -> Self:
        """Begin to call."""
        self._tasks = [asyncio.create_task(self._call()) for _ in range(self._callers)]
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Let each caller finish its last call."""
        self._stopped.set()
        await asyncio.gather(*self._tasks)

    async def _call(self) -> None:
        while not self._stopped.is_set():
            answer = await self._customer.stack.rest.get(self._path)
            self.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                self.versions.append(answer.json()["version"])


@pytest.mark.usefixtures("functions")
async def test_a_deploy_under_load_drops_no_request(customer: Customer) -> None:
    """While versions are deployed and rolled back every call is answered, and once it is ready, by the new one."""
    made = await customer.create(FUNCTIONS, name="busy", runtime="python3", source=answering(1), auth="public")
    async with Load(customer, made["path"], callers=4) as load:
        for version in (2, 3):
            await customer.call("PATCH", f"{FUNCTIONS}/busy", json={"source": answering(version)})
            await customer.until("ready", f"{FUNCTIONS}/busy")
            assert (await customer.stack.rest.get(made["path"])).json() == {"version": version}
        await customer.call("PATCH", f"{FUNCTIONS}/busy", json={"source": "this is no Python"})
        failed = await customer.until("ready", f"{FUNCTIONS}/busy")
        assert "SyntaxError" in failed["progress"]["last_error"]
        await customer.call("POST", f"{FUNCTIONS}/busy/rollback", json={"version": 1})
        await customer.until("ready", f"{FUNCTIONS}/busy")
        assert (await customer.stack.rest.get(made["path"])).json() == {"version": 1}
    assert set(load.statuses) == {200}
    assert set(load.versions) == {1, 2, 3}


class Machine:
    """A host of functions that the test starts and kills, at the place where an edge of its own looks for it."""

    def __init__(self, stack: Stack, secret: str, folder: Path) -> None:
        self.stack = stack
        self.secret = secret
        self.folder = folder

    def process(self) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
        """Run it as `controlplane functions-host` does."""
        settings = {
            "HTX_FUNCTIONS_LISTEN": self.stack.settings.functions_address,
            "HTX_FUNCTIONS_METRICS_PORT": free_port(),
            "HTX_FUNCTIONS_UID": 420_000,
        }
        return host_process(self.stack, "functions-host", self.secret, self.folder, **settings)

    async def until_asks(self, before: str | None) -> str:
        """Wait for a start of the host after the one before; return what it is called."""

        async def instance() -> str | None:
            rows = await self.stack.server.store.fetch(select(Host.instance).where(col(Host.name) == "killed"))
            return rows[0].instance if rows[0].instance != before else None

        return str(await eventually(instance))


@pytest.fixture(scope="module")
async def machine(folder: Path, database_url: str, postgres: EmbeddedPostgres, catalog: Path) -> AsyncIterator[Machine]:
    """A stack of the module's own and a host for it, which is not running."""
    kind = "pg" if database_url else "lite"
    storage = await new_storage(postgres, "deploys") if database_url else ""
    async with Stack(folder / f"deploys-{kind}", database_url=storage, catalog=catalog) as stack:
        own = folder / f"killed-{kind}"
        own.mkdir(mode=0o711)
        secret = await new_host(stack, kind=KIND, name="killed", region="local")
        yield Machine(stack, secret, own)
        await remove_host(stack.server.store, stack.clock, name="killed", force=True)


async def invoked(customer: Customer, name: str) -> Any:
    """Return what a function's handler returned, None while nobody answers."""
    answer = await customer.call("POST", f"{FUNCTIONS}/{name}/invoke")
    return answer.json()["result"] if answer.status_code == 200 else None


async def test_a_killed_host_loses_no_deploy(machine: Machine) -> None:
    """A host that is killed (-9) while it loads and while it runs has everything again that was accepted."""
    customer = await machine.stack.customer()
    async with machine.process() as process:
        first = await machine.until_asks(None)
        await customer.create(FUNCTIONS, name="kept", runtime="python3", source=answering(1))
        slow = {"name": "slow", "runtime": "python3", "source": "import time\ntime.sleep(1)\n" + answering(7)}
        assert (await customer.call("POST", FUNCTIONS, json=slow)).status_code == 201
        process.kill()
        await process.wait()
    answer = await customer.call("POST", f"{FUNCTIONS}/kept/invoke")
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    await customer.call("PATCH", f"{FUNCTIONS}/kept", json={"source": answering(2)})  # accepted while it is away
    async with machine.process() as process:
        second = await machine.until_asks(first)
        await customer.until("ready", f"{FUNCTIONS}/slow")
        assert await invoked(customer, "slow") == {"version": 7}
        await customer.until("ready", f"{FUNCTIONS}/kept")
        assert await invoked(customer, "kept") == {"version": 2}
        # In the midst of a call: the caller is told, and the function goes on afterwards.
        asleep = {
            "name": "asleep",
            "runtime": "python3",
            "source": "import time\ndef handler(e, c):\n    time.sleep(5)\n",
        }
        await customer.create(FUNCTIONS, **asleep)
        calling = asyncio.create_task(customer.call("POST", f"{FUNCTIONS}/asleep/invoke"))
        await asyncio.sleep(0.3)
        process.kill()
        await process.wait()
        assert (await calling).status_code == 503
    await eventually(_is_all_gone)
    async with machine.process():
        await machine.until_asks(second)
        assert await eventually(lambda: invoked(customer, "kept")) == {"version": 2}


async def _is_all_gone() -> bool:
    return not _left_behind()


def _left_behind() -> list[Path]:
    """Return the processes that are left of the killed host's functions."""
    return [process for process in Path("/proc").glob("[0-9]*") if _is_theirs(process)]


def _is_theirs(process: Path) -> bool:
    try:
        has_ended = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"  # and waits to be seen
        return not has_ended and 420_000 <= process.stat().st_uid < 430_000
    except OSError:
        return False
