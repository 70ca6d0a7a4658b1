"""A host as a process: killed, and asked to stop."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from controlplane.functions.host.host import FunctionHostSettings
from tests.functions.host.conftest import answering, client_of, get, until_answers
from tests.functions.host.control import Control, processes_of
from tests.functions.host.serve import command
from tests.stack import eventually

_REPO = Path(__file__).parents[3]


@contextlib.asynccontextmanager
async def process_of(settings: FunctionHostSettings) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a host as a process of its own; it is killed in the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *command(settings),
        cwd=_REPO,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def test_a_host_that_was_killed_comes_back(own: Control, own_settings: FunctionHostSettings) -> None:
    """After kill -9 a new start ends what was left, trusts nothing in its folder, and everything answers again."""
    async with client_of(own_settings) as client:
        async with process_of(own_settings) as first:
            function = await own.deploy(answering(1))
            assert (await get(client, function)).json() == 1
            first.send_signal(signal.SIGKILL)
            await first.wait()
        code = own_settings.data_dir / "code" / function.active.id / "main.py"
        code.write_text(answering("forged"))
        async with process_of(own_settings) as second:
            await until_answers(client, function)
            assert (await get(client, function)).json() == 1
            assert len(processes_of(own_settings.uids)) > 0
            second.send_signal(signal.SIGTERM)
            assert await second.wait() == 0
    assert not processes_of(own_settings.uids)


async def test_a_host_that_is_asked_to_stop(own: Control, own_settings: FunctionHostSettings) -> None:
    """After SIGTERM no connection is taken, the call that runs is answered, its lines are sent, and nothing is left."""
    async with client_of(own_settings) as client, process_of(own_settings) as host:
        function = await own.deploy(
            "import time\ndef handler(event, context):\n    print('at last')\n    time.sleep(1.5)\n    return 1\n"
        )
        late = asyncio.create_task(get(client, function))
        await asyncio.sleep(0.5)
        host.send_signal(signal.SIGTERM)

        async def takes_none() -> bool:
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(own_settings.listen.removeprefix("unix:")) != 0

        await eventually(takes_none)
        assert not late.done()
        assert (await late).json() == 1
        assert await host.wait() == 0
    assert {line.stream for line in own.lines if line.function_id == function.id} == {"stdout", "request"}
    assert not processes_of(own_settings.uids)
    assert not os.path.exists(own_settings.listen.removeprefix("unix:"))  # noqa: ASYNC240, PTH110
