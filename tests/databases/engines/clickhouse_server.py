"""The embedded ClickHouse as the tests see it: its process, the admin's statements and a tenant's queries."""

import asyncio
import secrets
import sys
from pathlib import Path
from typing import Any

import httpx2

from controlplane.databases.engines.clickhouse import ClickHouse
from controlplane.databases.engines.engine import EngineError, Target
from controlplane.local.chdb.gateway import ADMIN, admin_password
from controlplane.local.child import Child
from tests.stack import free_port

# Runs for half a minute, and answers nothing before its end.
LONG_QUERY = "SELECT max(sleepEachRow(1)) FROM numbers(30) SETTINGS max_block_size = 1"


class Server:
    """A server of the tests' own, with its data in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._child = Child(
            "ClickHouse", [sys.executable, "-m", "controlplane.local.chdb", str(folder), str(self.port)]
        )
        self.engine = ClickHouse(
            admin_url=self.url.replace("//", f"//{ADMIN}:{admin_password(folder)}@"), host="127.0.0.1", port=self.port
        )

    async def start(self) -> None:
        """Start it and wait until it answers."""
        await self._child.start()
        async with asyncio.timeout(30), httpx2.AsyncClient() as client:
            while True:
                try:
                    if (await client.get(f"{self.url}/ping")).text == "Ok.\n":
                        return
                except httpx2.TransportError:
                    await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Stop it, by its process's number."""
        await self._child.stop()

    async def admin(self, sql: str) -> str:
        """Send a statement as the admin, to change things behind the driver's back."""
        return await self._query(ADMIN, admin_password(self.folder), sql)

    async def tenant(self, target: Target, sql: str, **parameters: Any) -> str:
        """Send a query as this tenant and return the answer; an error is `Wrong`."""
        return await self._query(target.name, target.password, sql, **parameters)

    async def opens(self, target: Target) -> bool:
        """Return whether this tenant gets in."""
        try:
            await self.tenant(target, "SELECT 1")
        except Wrong as error:
            if error.code != "516":
                raise
            return False
        return True

    async def _query(self, user: str, password: str, sql: str, **parameters: Any) -> str:
        async with httpx2.AsyncClient(auth=httpx2.BasicAuth(user, password), timeout=60) as client:
            answer = await client.post(self.url, params=parameters, content=sql.encode())
        if answer.status_code != httpx2.codes.OK:
            raise Wrong(answer)
        return answer.text.removesuffix("\n")


class Wrong(Exception):
    """The server's error: its number and words."""

    def __init__(self, answer: httpx2.Response) -> None:
        super().__init__(answer.text)
        self.code = answer.headers["x-clickhouse-exception-code"]


def new_target(**wanted: Any) -> Target:
    """Return a tenant that is not there yet, with a password that wants quoting everywhere."""
    defaults = {"connections": 5, "memory_mb": 512, "storage_gb": 1}
    return Target(
        name=f"db_{secrets.token_hex(8)}", password=f"s3cret'%@ é{secrets.token_hex(8)}", **{**defaults, **wanted}
    )


async def dump_of(engine: ClickHouse, name: str) -> bytes:
    """Return a whole dump."""
    async with engine.dump(name) as dump:
        return b"".join([chunk async for chunk in dump.chunks()])


async def restore(engine: ClickHouse, target: Target, data: bytes) -> None:
    """Read a dump in pieces that are cut anywhere."""

    async def chunks() -> Any:
        for start in range(0, len(data), 1000):
            yield data[start : start + 1000]

    await engine.restore(target.name, target.password, chunks())


def cause_of(error: EngineError) -> str:
    """Return what the log gets."""
    return str(error.__cause__)
