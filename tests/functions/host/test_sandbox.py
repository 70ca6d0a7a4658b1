"""The sandbox knows its machine, and cleans up after itself and after one that was killed."""

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controlplane.functions.host.machine import PROGRAMS as NEEDED
from controlplane.functions.host.machine import look_at_machine
from controlplane.functions.host.sandbox import Sandbox, SandboxUnavailable
from controlplane.functions.host.worker import Worker
from tests.functions.host.workshop import PROGRAMS, Workshop, all_ended, open_workshop

_ECHO = "def handler(event, context): return event"
_ROOT = Path(__file__).parents[3]
_UIDS = range(709_000, 709_002)
# A host that starts a function with a process that hides, says which processes there are, and never ends.
_HOST = """
import asyncio, sys
from pathlib import Path
from tests.functions.host.workshop import Workshop
from controlplane.functions.host.sandbox import Sandbox

async def main():
    sandbox = Sandbox.open(Path(sys.argv[1]), range(708_000, 708_010))
    source = Path(sys.argv[2]).read_text()
    async with Workshop(sandbox, Path(sys.argv[1])).running(source, entrypoint="main.hide") as it:
        await it.call()
        print(*it.worker._cell.group.pids, flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""

_NOT_ROOT = """
import os, sys
from controlplane.functions.host.sandbox import Path, Sandbox, SandboxUnavailable

os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    Sandbox.open(Path(sys.argv[1]), range(707_000, 707_010))
except SandboxUnavailable as error:
    print(error)
"""


@pytest.fixture
async def workshop(folder: Path) -> AsyncIterator[Workshop]:
    """A sandbox of the test's own."""
    async with open_workshop(folder) as workshop:
        yield workshop


async def test_check(workshop: Workshop) -> None:
    """The sandbox of this machine holds what it promises, and offers all runtimes."""
    assert await workshop.sandbox.check() == []
    assert set(workshop.sandbox.runtimes) == {"python3", "nodejs", "wasm"}


async def test_everything_missing_is_named(tmp_path: Path) -> None:
    """Whoever cannot run functions is told all that is missing, and what to do."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(SandboxUnavailable) as unavailable:
        Sandbox.open(closed / "functions", range(5))
    problems = unavailable.value.problems
    assert f"The functions' users cannot pass through {closed}: chmod o+x {closed}" in " ".join(problems)
    assert any("must begin at 1000 or later" in problem for problem in problems)
    assert any("belongs to the user root" in problem for problem in problems)
    told = list(look_at_machine({}))
    assert all(any(f"There is no {program}: apt-get install" in each for each in told) for program in NEEDED)


async def test_not_root(folder: Path) -> None:
    """Without root nothing is run, and whoever started it is told."""
    place = folder / "not-root"
    host = await asyncio.create_subprocess_exec(sys.executable, "-c", _NOT_ROOT, str(place), stdout=PIPE, cwd=_ROOT)
    told, _ = await host.communicate()
    assert b"Functions need root" in told


async def test_folder_is_taken(workshop: Workshop) -> None:
    """A folder has one host."""
    with pytest.raises(SandboxUnavailable, match="Another host uses"):
        Sandbox.open(workshop.folder, _UIDS)


async def test_no_uid_left(folder: Path) -> None:
    """More tenants than uids are not put together: the last one is refused until another is gone."""
    sandbox = Sandbox.open(folder / "two-uids", _UIDS)
    workshop = Workshop(sandbox, folder / "two-uids")
    try:
        async with workshop.running(_ECHO, tenant="ac_a"):
            async with workshop.running(_ECHO, tenant="ac_b"):
                with pytest.raises(SandboxUnavailable, match="All 2 users for functions are in use"):
                    async with workshop.running(_ECHO, tenant="ac_c"):
                        pass
            async with workshop.running(_ECHO, tenant="ac_c") as function:
                assert await function.call(1) == 1
    finally:
        await sandbox.close()


async def test_close(folder: Path) -> None:
    """Closing ends the functions, and leaves no control group; then the folder can be opened again."""
    async with open_workshop(folder) as workshop:
        sandbox = workshop.sandbox
        async with workshop.running(_ECHO) as function:
            group = function.worker._cell.group  # noqa: SLF001 - what only the machine can see
            await sandbox.close()
            assert not function.worker.alive
            assert not any(file.parent.parent.exists() for file in group.entrances)
        again = Sandbox.open(workshop.folder, _UIDS)
        await again.close()


async def test_host_is_killed(workshop: Workshop, folder: Path) -> None:
    """What a killed host leaves ends with it or is ended by the next of its folder; other hosts' functions go on."""
    place = folder / "killed"
    command = (sys.executable, "-c", _HOST, str(place), str(PROGRAMS / "escapes.py"))
    async with workshop.running(_ECHO) as bystander:
        host = await asyncio.create_subprocess_exec(*command, stdout=PIPE, cwd=_ROOT)
        assert host.stdout is not None
        pids = [int(pid) for pid in (await host.stdout.readline()).split()]
        assert len(pids) == 4
        host.send_signal(signal.SIGKILL)
        await host.wait()
        sandbox = Sandbox.open(place, _UIDS)
        try:
            await all_ended(pids)
            assert await bystander.call(1) == 1
            async with Workshop(sandbox, place).running(_ECHO) as function:
                assert await function.call(1) == 1
        finally:
            await sandbox.close()


async def test_unreadable_code(workshop: Workshop) -> None:
    """Code that a tenant's user may not read is the host's fault, and not told as the customer's."""
    program = workshop.program(_ECHO)
    program.folder.chmod(0o700)
    with pytest.raises(SandboxUnavailable, match="cannot read"):
        await Worker.start(program, workshop.sandbox, lambda *_: None)


async def test_broken_sandbox(workshop: Workshop) -> None:
    """When the sandbox itself fails, the customer is told nothing of it."""
    program = workshop.program(_ECHO)
    (workshop.folder / "etc").rename(workshop.folder / "moved")
    lines: list[str] = []
    with pytest.raises(SandboxUnavailable, match="bwrap: "):
        await Worker.start(program, workshop.sandbox, lambda _, line: lines.append(line))
    assert lines == []
