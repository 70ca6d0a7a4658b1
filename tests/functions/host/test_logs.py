"""Log lines on their way to the control plane."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import grpc
import httpx
import pytest

from controlplane.api.hosts.v1 import hosts_pb2, hosts_pb2_grpc
from controlplane.functions.host.host import FunctionHost
from controlplane.functions.host.logs import Logs
from controlplane.functions.host.pool import Ended
from tests.functions.host.control import ACCOUNT, Control
from tests.stack import eventually


class Sender:
    """Sends batches to a control plane, and notes each that was tried."""

    def __init__(self, control: Control) -> None:
        self.tried: list[tuple[int, int]] = []
        self._channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{control.port}", options=[("grpc.max_reconnect_backoff_ms", 100)]
        )
        self._stub = hosts_pb2_grpc.FunctionHostServiceStub(self._channel)
        self._control = control

    async def __call__(self, batch: int, lines: Sequence[hosts_pb2.FunctionLog]) -> None:
        """Send a batch."""
        self.tried.append((batch, len(lines)))
        request = hosts_pb2.ReportFunctionLogsRequest(instance=self._control.instance, batch=batch, lines=lines)
        await self._stub.ReportFunctionLogs(request)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()


@pytest.fixture
async def sender(own: Control) -> AsyncIterator[Sender]:
    """Sends to that control plane."""
    sender = Sender(own)
    yield sender
    await sender.close()


def say(logs: Logs, count: int, *, function_id: str = "fn_a", first: int = 0) -> None:
    """Print numbers."""
    for number in range(first, first + count):
        logs.add_line(function_id, 1, "stdout", str(number), "an-id")


async def test_what_a_function_prints_and_its_calls(
    control: Control, host: FunctionHost, client: httpx.AsyncClient
) -> None:
    """Printed lines and a line for each call reach the control plane, with the call's id, the version and the time."""
    del host
    function = await control.deploy(
        "import sys\n"
        "print('loading')\n"
        "def handler(event, context):\n"
        "    print('one\\ntwo')\n"
        "    print('three', file=sys.stderr)\n"
        "    return 1\n"
    )
    for request_id in ("first", "second"):
        await client.get(f"/f/{ACCOUNT}/{function.name}", headers={"x-request-id": request_id})
    await control.line(lambda line: line.request_id == "second" and line.stream == "request")
    lines = [line for line in control.lines if line.function_id == function.id]
    assert {line.version for line in lines} == {1}
    assert all(line.time.seconds > 1_600_000_000 for line in lines)
    assert ("stdout", "loading", "") in {(line.stream, line.text, line.request_id) for line in lines}
    for request_id in ("first", "second"):
        said = [(line.stream, line.text) for line in lines if line.request_id == request_id]
        assert sorted(said) == [("request", ""), ("stderr", "three"), ("stdout", "one"), ("stdout", "two")]
    ended = [line for line in lines if line.stream == "request"]
    assert all((line.outcome, line.duration_ms > 0, line.memory_mb > 1) == ("ok", True, True) for line in ended)


async def test_lines_wait_while_the_control_plane_is_away(own: Control, sender: Sender) -> None:
    """A batch that was not taken is sent again as it was, under its number; no line is lost and none comes twice."""
    logs = Logs(sender)
    sending = asyncio.create_task(logs.run())
    say(logs, 5)
    await own.line(lambda line: line.text == "4")
    await own.go_away()
    say(logs, 5, first=5)

    async def tried_twice() -> bool:
        return sender.tried.count((2, 5)) >= 2

    await eventually(tried_twice)
    say(logs, 5, first=10)
    await own.serve()
    await own.line(lambda line: line.text == "14")
    sending.cancel()
    assert [line.text for line in own.lines] == [str(number) for number in range(15)]
    assert own.batches == [("", 1), ("", 2), ("", 3)]


async def test_after_a_new_start_batches_count_from_one(own: Control, sender: Sender) -> None:
    """A start that the control plane knows by another name begins with batch 1, also for what was waiting."""
    logs = Logs(sender)
    say(logs, 1)
    await logs.flush()
    own.instance = "another"
    logs.restart()
    say(logs, 1, first=1)
    await logs.flush()
    assert own.batches == [("", 1), ("another", 1)]
    assert [line.text for line in own.lines] == ["0", "1"]


async def test_who_prints_too_much_is_cut_short(own: Control, sender: Sender) -> None:
    """Of a flood in one second 200 lines are kept, and a line says how many are missing; others are not affected."""
    logs = Logs(sender)
    say(logs, 1000)
    say(logs, 10, function_id="fn_b")
    for number in range(300):
        logs.add_call("fn_a", Ended("ok", 1, cold_start=False), f"call-{number}")
    sending = asyncio.create_task(logs.run())
    lost = await own.line(lambda line: "800 lines left out" in line.text)
    await own.line(lambda line: "100 lines of calls left out" in line.text)
    sending.cancel()
    assert (lost.function_id, lost.stream, lost.version) == ("fn_a", "stderr", 1)
    kept = Counter((line.function_id, line.stream) for line in own.lines)
    assert kept == {("fn_a", "stdout"): 200, ("fn_b", "stdout"): 10, ("fn_a", "request"): 200, ("fn_a", "stderr"): 2}


async def test_all_waiting_lines_together_are_bounded(own: Control, sender: Sender) -> None:
    """What has no place any more is dropped, and what came first is kept."""
    logs = Logs(sender, most_lines=50)
    for function in range(10):
        say(logs, 10, function_id=f"fn_{function}")
    await logs.flush()
    assert Counter(line.function_id for line in own.lines) == {f"fn_{function}": 10 for function in range(5)}


async def test_batches_are_bounded(own: Control, sender: Sender) -> None:
    """Many lines, and long ones, go in batches that gRPC takes."""
    logs = Logs(sender)
    for function in range(12):
        say(logs, 200, function_id=f"fn_{function}")
        for _ in range(150):
            logs.add_call(f"fn_{function}", Ended("error", 1, cold_start=False, message="x" * 20_000), "an-id")
    sending = asyncio.create_task(logs.run())

    async def all_came() -> bool:
        return len(own.lines) == 12 * 350

    await eventually(all_came)
    sending.cancel()
    assert max(count for _, count in sender.tried) <= 1000
    assert max(len(line.text) for line in own.lines) == 8192


async def test_lines_that_are_refused_block_nothing(own: Control) -> None:
    """A batch that the control plane will never take is dropped, and the next one goes through."""
    taken: list[str] = []

    async def report(_batch: int, lines: Sequence[hosts_pb2.FunctionLog]) -> None:
        if any(line.text == "poison" for line in lines):
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.INVALID_ARGUMENT, grpc.aio.Metadata(), grpc.aio.Metadata(), details="No."
            )
        taken.extend(line.text for line in lines)

    del own
    logs = Logs(report)
    logs.add_line("fn_a", 1, "stdout", "poison", "")
    await logs.flush()
    logs.add_line("fn_a", 1, "stdout", "good", "")
    await logs.flush()
    assert taken == ["good"]
