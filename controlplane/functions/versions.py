"""The versions of a function: made of an order, kept for a while, read by the hosts that load them."""

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute
from sqlmodel import col, select

from controlplane.api.v1 import functions_pb2
from controlplane.clock import Clock
from controlplane.errors import BrokenRule, InvalidField
from controlplane.functions.archive import ArchiveError, check
from controlplane.functions.logs import FunctionLogLine
from controlplane.functions.model import (
    BUILDING,
    KEPT,
    READY,
    CallSettings,
    Function,
    FunctionCode,
    FunctionVersion,
    env_binding,
)
from controlplane.ids import new_id
from controlplane.keys import Keys
from controlplane.reconcile.model import FAILED

# A list shows no variables, which may be a megabyte.
SHOWN: tuple[InstrumentedAttribute[Any], ...] = tuple(
    getattr(FunctionVersion, name) for name in FunctionVersion.model_fields if name != "env_sealed"
)


@dataclass(frozen=True, slots=True)
class Code:
    """Code as it is sent: a zip archive, or the source of a single file."""

    content: bytes
    is_archive: bool

    @property
    def sha256(self) -> str:
        """The SHA-256 of the content, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()


async def read_code(given: functions_pb2.CreateFunction | functions_pb2.UpdateFunction) -> Code | None:
    """Return the code that a request brings, if it does.

    Raises InvalidField for two, or an archive that cannot be taken.
    """
    if given.HasField("source") and given.HasField("archive"):
        raise InvalidField(BrokenRule("archive", "a source is the code as well: give the one or the other"))
    if given.HasField("source"):
        return Code(given.source.encode(), is_archive=False)
    if not given.HasField("archive"):
        return None
    try:
        await asyncio.to_thread(check, given.archive)
    except ArchiveError as error:
        raise InvalidField(BrokenRule("archive", str(error))) from None
    return Code(given.archive, is_archive=True)


def settings_of(row: CallSettings) -> dict[str, Any]:
    """Return the settings of a function, or of a version, by their names."""
    return {name: getattr(row, name) for name in CallSettings.model_fields}


class Versions:
    """Makes versions, in the transaction of the order."""

    def __init__(self, *, keys: Keys, clock: Clock) -> None:
        self._keys = keys
        self._clock = clock

    async def add(
        self, session: AsyncSession, function: Function, code: Code | FunctionVersion, env: Mapping[str, str]
    ) -> None:
        """Want a new version of what the function's row says, with this code, which may be that of a version before.

        The function's row must have been written, and be locked.
        """
        await self.give_up_building(session, function)
        if isinstance(code, Code):
            sha256, size = code.sha256, len(code.content)
            await _keep(session, function, code)
        else:
            sha256, size = code.code_sha256, code.code_bytes
        function.last_version += 1
        function.wanted_version = function.last_version
        function.env_names = sorted(env)
        version_id = new_id("fv")
        plain = json.dumps(dict(env)).encode()
        session.add(
            FunctionVersion(
                id=version_id,
                function_id=function.id,
                number=function.wanted_version,
                env_sealed=self._keys.encrypt(plain, bound_to=env_binding(function, version_id)),
                code_sha256=sha256,
                code_bytes=size,
                created_at=self._clock.now(),
                **settings_of(function),
            )
        )
        await session.flush()
        await _forget_old(session, function)

    async def go_back(self, session: AsyncSession, function: Function, version: FunctionVersion) -> None:
        """Want an earlier version, and let it answer; it must be one that could be loaded."""
        await self.give_up_building(session, function)
        for name, value in settings_of(version).items():
            setattr(function, name, value)
        function.wanted_version = function.active_version = version.number

    async def give_up_building(self, session: AsyncSession, function: Function) -> None:
        """End the loading of the version that is wanted so far, if it is being loaded."""
        if function.wanted_version in {0, function.active_version}:
            return
        wanted = await find_version(session, function, function.wanted_version)
        if wanted is not None and wanted.state == BUILDING:
            wanted.state, wanted.error = FAILED, "It was replaced before it was loaded."

    def env_of(self, function: Function, version: FunctionVersion) -> dict[str, str]:
        """Return the variables of a version, with their values."""
        plain = self._keys.decrypt(version.env_sealed, bound_to=env_binding(function, version.id))
        env: dict[str, str] = json.loads(plain)
        return env


async def find_version(session: AsyncSession, function: Function, number: int) -> FunctionVersion | None:
    """Return a version of a function, if it is kept."""
    of_function = col(FunctionVersion.function_id) == function.id
    found = await session.execute(select(FunctionVersion).where(of_function, col(FunctionVersion.number) == number))
    return found.scalar_one_or_none()


async def find_earlier(session: AsyncSession, function: Function) -> FunctionVersion | None:
    """Return the newest version that could be loaded before the one that answers, if there is one."""
    statement = (
        select(FunctionVersion)
        .where(
            col(FunctionVersion.function_id) == function.id,
            col(FunctionVersion.state) == READY,
            col(FunctionVersion.number) < (function.active_version or 0),
        )
        .order_by(col(FunctionVersion.number).desc())
        .limit(1)
    )
    return (await session.execute(statement)).scalar_one_or_none()


async def _keep(session: AsyncSession, function: Function, code: Code) -> None:
    """Keep code, unless a version before has the same."""
    kept = select(FunctionCode.sha256).where(
        col(FunctionCode.function_id) == function.id, col(FunctionCode.sha256) == code.sha256
    )
    if (await session.execute(kept)).first() is None:
        session.add(
            FunctionCode(function_id=function.id, sha256=code.sha256, is_archive=code.is_archive, content=code.content)
        )


async def _forget_old(session: AsyncSession, function: Function) -> None:
    """Remove versions that are neither among the newest nor answer, their logs, and code that no version has."""
    of_function = col(FunctionVersion.function_id) == function.id
    old = select(FunctionVersion.number).where(
        of_function,
        col(FunctionVersion.number) <= function.last_version - KEPT,
        col(FunctionVersion.number) != (function.active_version or 0),
    )
    numbers: Sequence[int] = (await session.scalars(old)).all()
    if not numbers:
        return
    await session.execute(
        delete(FunctionLogLine).where(
            col(FunctionLogLine.function_id) == function.id, col(FunctionLogLine.version).in_(numbers)
        )
    )
    await session.execute(delete(FunctionVersion).where(of_function, col(FunctionVersion.number).in_(numbers)))
    used = select(FunctionVersion.code_sha256).where(of_function)
    await session.execute(
        delete(FunctionCode)
        .where(col(FunctionCode.function_id) == function.id, col(FunctionCode.sha256).not_in(used))
        .execution_options(synchronize_session=False)
    )
