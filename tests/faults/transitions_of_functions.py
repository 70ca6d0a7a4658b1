"""What a function can be ordered to become, and what is true once it has, on a real host that answers real calls."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from google.protobuf.struct_pb2 import Struct

from controlplane.api.v1 import functions_pb2
from controlplane.functions.host.host import FunctionHost
from controlplane.functions.model import KEPT
from tests.faults.hosted import HostedLife, check_hosted, unless_gone
from tests.faults.installation import Installation
from tests.faults.transitions import Transition
from tests.stack import eventually


@dataclass
class FunctionLife(HostedLife):
    """A function. `last` is the number of its newest version, `active` of the one that answers.

    `answers` has what each version answers, and its memory; `most_calls` how many calls may run at the same time.
    """

    kind: ClassVar[str] = "function"

    last: int = 0
    active: int = 0
    answers: dict[int, tuple[str, int]] = field(default_factory=dict)
    most_calls: int = 10

    async def call(self, method: str, request: Any) -> Any:
        """Call a method of the service by its name."""
        return await self.ask(self.installation.functions, method, request)

    async def check(self) -> None:
        """Check that the function is as it is known to be: what answers, its versions, and its answer."""
        found = await self.call("GetFunction", functions_pb2.GetFunctionRequest(name=self.name))
        answer, memory_mb = self.answers[self.active]
        assert (found.status, found.version, found.max_concurrency) == ("ready", self.active, self.most_calls), found
        listed = await self.call("ListFunctionVersions", functions_pb2.ListFunctionVersionsRequest(name=self.name))
        kept = {number for number in range(1, self.last + 1) if number > self.last - KEPT or number == self.active}
        assert {version.version for version in listed.versions} == kept, listed
        assert [version.version for version in listed.versions if version.active] == [self.active], listed
        called = await self.call("InvokeFunction", functions_pb2.InvokeFunctionRequest(name=self.name, event=Struct()))
        assert (called.version, called.result.string_value) == (self.active, answer), called
        active = next(version for version in listed.versions if version.active)
        assert (active.status, active.memory_mb) == ("ready", memory_mb)

    async def check_as_ordered(self) -> None:
        """Check that it is as it is known to be, and that nothing of its order is left to do, or has failed."""
        found = await self.call("GetFunction", functions_pb2.GetFunctionRequest(name=self.name))
        assert (found.observed_generation, found.HasField("progress")) == (found.generation, False), found
        await self.check()


def check_on(host: FunctionHost) -> Callable[[Installation], Awaitable[None]]:
    """Return the check of an installation with this host."""

    async def check(installation: Installation) -> None:
        await check_hosted(installation)
        rows = await installation.rows("functions")
        versions = {(row["function_id"], row["number"]): row for row in await installation.rows("function_versions")}
        answering = [versions[row["id"], row["active_version"]] for row in rows]
        held = host._directory._functions  # noqa: SLF001 - no door shows what it holds
        assert {
            each.id: ({id_: version.memory_mb for id_, version in each.versions.items()}, each.pool.max_concurrency)
            for each in held.values()
        } == {
            row["id"]: ({version["id"]: version["memory_mb"]}, row["max_concurrency"])
            for row, version in zip(rows, answering, strict=True)
        }
        code = installation.folder / "functions/code"

        async def has_just_their_code() -> bool:  # other code goes once the last worker that runs it has ended
            return {path.name for path in code.iterdir()} <= {version["id"] for version in answering}

        await eventually(has_just_their_code)

    return check


async def begin(life: FunctionLife) -> None:
    """Let a life begin."""
    await life.undisturbed(_create, _is_created)


def _source(word: str) -> str:
    return f"import os\ndef handler(event, context):\n    return '{word} ' + os.environ.get('WORD', '')\n"


async def _create(life: FunctionLife) -> None:
    wanted = functions_pb2.CreateFunction(name=life.name, runtime="python3", source=_source("first"))
    await life.call("CreateFunction", functions_pb2.CreateFunctionRequest(function=wanted))


async def _is_created(life: FunctionLife) -> None:
    life.last = life.active = 1
    life.answers = {1: ("first ", 128)}
    await life.check_as_ordered()
    await life.check_told("create ready")


async def _change(life: FunctionLife, **change: Any) -> None:
    wanted = functions_pb2.UpdateFunction(**change)
    await life.call("UpdateFunction", functions_pb2.UpdateFunctionRequest(name=life.name, function=wanted))


async def _is_changed(life: FunctionLife, answer: str, memory_mb: int) -> None:
    """Check that there is one more version, and that it answers. To want it once more is no change."""
    life.last = life.active = life.last + 1
    life.answers[life.last] = answer, memory_mb
    await life.check_as_ordered()
    await life.check_told("update ready", again="update")


async def _deploy(life: FunctionLife) -> None:
    await _change(life, source=_source(f"code-{life.last + 1}"))


async def _is_deployed(life: FunctionLife) -> None:
    answer, memory_mb = life.answers[life.active]
    await _is_changed(life, f"code-{life.last + 1} {answer.partition(' ')[2]}", memory_mb)


async def _set_variable(life: FunctionLife) -> None:
    variables = Struct()
    variables["WORD"] = f"value-{life.last + 1}"
    await _change(life, env=variables, memory_mb=_other_memory(life))


async def _has_variable(life: FunctionLife) -> None:
    word = life.answers[life.active][0].partition(" ")[0]
    await _is_changed(life, f"{word} value-{life.last + 1}", _other_memory(life))


def _other_memory(life: FunctionLife) -> int:
    return 192 - life.answers[life.active][1] + 128  # 128 and 192 in turn


async def _set_most_calls(life: FunctionLife) -> None:
    await _change(life, max_concurrency=_other_most_calls(life))


async def _has_most_calls(life: FunctionLife) -> None:
    life.most_calls = _other_most_calls(life)
    await life.check_as_ordered()
    await life.check_told("update ready", again="update")


def _other_most_calls(life: FunctionLife) -> int:
    return 15 - life.most_calls  # 10 and 5 in turn


async def _break(life: FunctionLife) -> None:
    await _change(life, source=f"broken_{life.last + 1}\n")


async def _is_as_before(life: FunctionLife) -> None:
    """Check that the version before goes on answering. Broken code that is sent once more is tried once more."""
    life.last += (await life.told()).count("build_failed")
    await life.check()
    found = await life.call("GetFunction", functions_pb2.GetFunctionRequest(name=life.name))
    assert "NameError" in found.progress.last_error, found
    await life.check_told("update build_failed ready", again="update build_failed ready")


async def _have_deployed(life: FunctionLife) -> None:
    await life.undisturbed(_deploy, _is_deployed)


async def _roll_back(life: FunctionLife) -> None:
    wanted = functions_pb2.RollbackFunction(version=life.last - 1)
    await life.call("RollbackFunction", functions_pb2.RollbackFunctionRequest(name=life.name, rollback=wanted))


async def _is_rolled_back(life: FunctionLife) -> None:
    life.active = life.last - 1
    await life.check_as_ordered()
    await life.check_told("rollback ready")


async def _delete(life: FunctionLife) -> None:
    await unless_gone(life.call("DeleteFunction", functions_pb2.DeleteFunctionRequest(name=life.name)))


async def _is_deleted(life: FunctionLife) -> None:
    await _is_gone(life)
    await life.check_told("delete deleted")


async def _is_deleted_early(life: FunctionLife) -> None:
    await _is_gone(life)
    await life.check_told("(ready )?delete deleted")


async def _is_gone(life: FunctionLife) -> None:
    for method in ("Get", "Invoke"):
        request = getattr(functions_pb2, f"{method}FunctionRequest")(name=life.name)
        assert not await unless_gone(life.call(f"{method}Function", request))


async def _have_deleted(life: FunctionLife) -> None:
    await life.undisturbed(_delete, _is_deleted)


TRANSITIONS = (
    Transition(name="create", order=_create, check=_is_created, bring_back=_have_deleted, is_own=True),
    Transition(name="deploy", order=_deploy, check=_is_deployed),
    Transition(name="variable and memory", order=_set_variable, check=_has_variable, stride=3),
    Transition(name="concurrency", order=_set_most_calls, check=_has_most_calls),
    Transition(name="deploy broken code", order=_break, check=_is_as_before, bring_back=_have_deployed),
    Transition(name="roll back", prepare=_have_deployed, order=_roll_back, check=_is_rolled_back),
    Transition(name="delete", prepare=begin, order=_delete, check=_is_deleted, is_own=True),
    Transition(name="delete early", prepare=_create, order=_delete, check=_is_deleted_early, is_own=True),
)
