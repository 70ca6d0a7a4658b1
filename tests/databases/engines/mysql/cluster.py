"""A MariaDB as the tests of its driver see it: from the admin's side, from a tenant's, and over a line that breaks."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import parse_qs, quote, urlsplit

import pymysql
from pymysql.cursors import Cursor

from controlplane.databases.engines.engine import Contents, Target
from controlplane.databases.engines.mysql import MySQL

Session: TypeAlias = "pymysql.Connection[Cursor]"
OPERATOR = "p w:x@é"


@dataclass(frozen=True)
class Cluster:
    """A running server: the way in for its admin, the port for tenants, and the driver bound to it."""

    admin_url: str
    port: int
    engine: MySQL

    def admin(self) -> Session:
        """Connect as the admin."""
        url = urlsplit(self.admin_url)
        return pymysql.connect(user=url.username, unix_socket=parse_qs(url.query)["socket"][0], autocommit=True)

    def tenant(self, target: Target, *, database: str | None = None) -> Session:
        """Connect as this tenant, by default to his own database."""
        return pymysql.connect(
            host="127.0.0.1",
            port=self.port,
            user=target.name,
            password=target.password.encode(),
            database=database or target.name,
            autocommit=True,
        )

    def answers(self, target: Target, *, database: str | None = None) -> bool:
        """Return whether this tenant gets in."""
        try:
            self.tenant(target, database=database).close()
        except pymysql.Error:
            return False
        return True

    def with_operator(self, *, port: int | None = None, password: str = OPERATOR) -> MySQL:
        """Return the driver with an admin who comes by TCP, with a password."""
        url = f"mysql://operator:{quote(password)}@127.0.0.1:{port or self.port}/"
        return MySQL(admin_url=url, host="127.0.0.1", port=self.port)

    @asynccontextmanager
    async def line_that_breaks(self, *, after: int) -> AsyncIterator[int]:
        """Give a port that leads to the server, until it has answered so many statements of one connection.

        The last answer does not arrive: the statement is done, and whoever sent it does not know.
        """

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            server, to_server = await asyncio.open_connection("127.0.0.1", self.port)
            statements = 0

            async def carry_back() -> None:
                while (data := await server.read(1 << 16)) and statements < after:
                    writer.write(data)
                writer.close()
                to_server.close()

            back = asyncio.create_task(carry_back())
            try:
                while True:
                    head = await reader.readexactly(4)
                    body = await reader.readexactly(int.from_bytes(head[:3], "little"))
                    statements += head[3] == 0 and body[:1] == b"\x03"
                    to_server.write(head + body)
            except (asyncio.IncompleteReadError, ConnectionError):
                to_server.close()
            await back

        listener = await asyncio.start_server(carry, "127.0.0.1", 0)
        async with listener:
            yield listener.sockets[0].getsockname()[1]


def run(session: Session, *statements: str) -> list[tuple[Any, ...]]:
    """Run statements; return the rows of the last."""
    with session.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        return list(cursor.fetchall())


def new_target(*, connections: int = 5) -> Target:
    """Return a tenant that is not there yet, with a password that wants quoting everywhere."""
    return Target(
        name=f"db_{secrets.token_hex(8)}",
        password=f"s3cret'%@é {secrets.token_hex(8)}",
        connections=connections,
        memory_mb=512,
        storage_gb=1,
    )


async def pieces(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    """Yield a dump in pieces."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def dumped(engine: MySQL, name: str) -> tuple[bytes, Contents]:
    """Return a whole dump, and what it says is in it."""
    async with engine.dump(name) as dump:
        data = b"".join([chunk async for chunk in dump.chunks()])
        return data, dump.contents()


def as_dump(*statements: str) -> bytes:
    """Return what passes for a dump of the driver's, made by somebody who knows how they look."""
    end = ";;0123456789ab\n"
    return f"DELIMITER {end}{''.join(statement + end for statement in statements)}-- The end of the dump\n".encode()
