"""How the MySQL driver runs `mysql_dump_program.py`, and what its errors and the server's mean."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from pymysql.constants import CR, ER

from controlplane.databases.engines.engine import ClusterUnavailable, Contents, EngineError, Table

_PROGRAM = Path(__file__).with_name("mysql_dump_program.py")
_CHUNK = 1 << 20

_TRY_LATER = frozenset(
    (
        CR.CR_CONN_HOST_ERROR,
        CR.CR_SERVER_GONE_ERROR,
        CR.CR_SERVER_LOST,
        ER.CON_COUNT_ERROR,
        ER.TOO_MANY_USER_CONNECTIONS,
        ER.USER_LIMIT_REACHED,
        ER.SERVER_SHUTDOWN,
        ER.OUT_OF_RESOURCES,
        ER.DISK_FULL,
        ER.LOCK_WAIT_TIMEOUT,
        ER.LOCK_DEADLOCK,
        ER.QUERY_INTERRUPTED,
        ER.STATEMENT_TIMEOUT,
        ER.QUERY_TIMEOUT,
        ER.OPTION_PREVENTS_STATEMENT,  # read only, as while another server takes over
        1927,  # MariaDB: the connection was killed
    )
)

# With what comes of a customer who changes his tables while they are read.
WHILE_READING = _TRY_LATER | {ER.TABLE_DEF_CHANGED, ER.NO_SUCH_TABLE}


@asynccontextmanager
async def dump_program(action: str, login: dict[str, Any], name: str) -> AsyncIterator[Process]:
    """Run the program, and end it with the context; a file, as it needs nothing else of ours."""
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", str(_PROGRAM), action),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env={},
        limit=_CHUNK,
    )
    try:
        assert program.stdin is not None  # noqa: S101
        program.stdin.write(json.dumps({**login, "database": name}).encode() + b"\n")
        yield program
    finally:
        if program.returncode is None:
            with suppress(ProcessLookupError):
                program.kill()
            await program.wait()


class Dump:
    """A dump that the program writes; see `engine.Dump`."""

    def __init__(self, program: Process) -> None:
        self._program = program
        self._contents: Contents | None = None

    async def chunks(self) -> AsyncIterator[bytes]:
        """Return the dump; see `engine.Dump`."""
        assert self._program.stdout is not None  # noqa: S101
        while chunk := await self._program.stdout.read(_CHUNK):
            yield chunk
        self._contents = contents_of(await report_of(self._program, later=WHILE_READING))

    def contents(self) -> Contents:
        """Return what is in the dump; see `engine.Dump`."""
        if self._contents is None:
            raise ValueError("the dump was not read to its end")
        return self._contents


async def report_of(program: Process, later: frozenset[int] = _TRY_LATER) -> dict[str, Any]:
    """Wait for the program's end; return what it has to say, or raise what it failed with."""
    assert program.stderr is not None  # noqa: S101
    words = (await program.stderr.read()).decode(errors="replace")
    status = await program.wait()
    # Python may say something of a connection that broke, before or behind.
    line = next((line for line in words.splitlines() if line.startswith("{")), "{}")
    report: dict[str, Any] = json.loads(line)
    if status == 0:
        return report
    raise translated(
        report.get("code", 0), "The dump could not be made or read; contact support if this stays so.", later
    ) from RuntimeError(report.get("reason") or words[-1000:] or f"exit status {status}")


def contents_of(report: dict[str, Any]) -> Contents:
    """Return the contents that the program reported."""
    return Contents(
        tables={name: Table(rows=rows, checksum=checksum) for name, (rows, checksum) in report["tables"].items()}
    )


def translated(code: int, sentence: str, later: frozenset[int] = _TRY_LATER) -> EngineError:
    """Return what to raise for an error of the server or the library: this sentence, unless a later try may mend it."""
    if code in later:
        return ClusterUnavailable("The database cluster is not available at the moment; try again later.")
    return EngineError(sentence)
