"""Clusters of a test's own, which can be stopped, killed, made read-only, and reached by a disturbed way."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pymysql

from controlplane.local.mariadb import EmbeddedMariaDB
from controlplane.local.postgres import EmbeddedPostgres, EmbeddedPostgresError
from tests import clusters
from tests.clusters import Cluster
from tests.faults.proxy import Disturbance, Proxy, proxy
from tests.stack import free_port

_ADMIN = "operator"


@dataclass(frozen=True, kw_only=True)
class Breakable:
    """A cluster as the control plane and its customers reach it, by the proxies; its own driver goes straight there.

    `kill` leaves nothing in order, as a power cut does, and returns when the server is dead; `start` is for both.
    """

    cluster: Cluster
    proxies: list[Proxy]
    stop: Callable[[], Awaitable[None]]
    kill: Callable[[], Awaitable[None]]
    start: Callable[[], Awaitable[None]]
    set_read_only: Callable[[bool], Awaitable[None]]

    async def disturb(self, disturbance: Disturbance) -> None:
        """Disturb the way there."""
        for each in self.proxies:
            await each.disturb(disturbance)

    async def mend(self) -> None:
        """Let the way there be well again."""
        for each in self.proxies:
            await each.mend()


@asynccontextmanager
async def postgresql(folder: Path) -> AsyncIterator[Breakable]:
    """Run a PostgreSQL."""
    port = free_port()
    server = EmbeddedPostgres(data_dir=folder, run_dir=folder / "run", port=port)
    query = parse_qs(urlsplit(server.admin_dsn).query)
    socket = f"{query['host'][0]}/.s.PGSQL.{port}"

    async def kill() -> None:
        pid = int((folder / "postgres/postmaster.pid").read_text().split("\n", 1)[0])
        os.kill(pid, signal.SIGKILL)
        await server.stop()

    async def start() -> None:
        async with asyncio.timeout(30):
            while True:
                try:
                    return await server.start()
                except EmbeddedPostgresError:  # the children of one that was killed take a moment to notice
                    await asyncio.sleep(0.1)

    async def set_read_only(is_wanted: bool) -> None:
        admin = await asyncpg.connect(server.admin_dsn)
        await admin.execute(f"ALTER SYSTEM SET default_transaction_read_only = {'on' if is_wanted else 'off'}")
        await admin.execute("SELECT pg_reload_conf()")
        await admin.close()

    await start()
    async with (
        proxy(partial(asyncio.open_unix_connection, socket)) as ours,  # the admin comes by the socket only
        proxy(partial(asyncio.open_connection, "127.0.0.1", port)) as theirs,
    ):
        url = f"postgresql://controlplane@127.0.0.1:{ours.port}/postgres?sslmode=disable"
        yield Breakable(
            cluster=replace(clusters.postgresql(server, port), admin_url=url, port=theirs.port),
            proxies=[ours, theirs],
            stop=server.stop,
            kill=kill,
            start=start,
            set_read_only=set_read_only,
        )
    await server.stop()


@asynccontextmanager
async def mysql(folder: Path) -> AsyncIterator[Breakable]:
    """Run a MariaDB, whose admin may not write where it is read-only."""
    port = free_port()
    server = EmbeddedMariaDB(data_dir=folder, run_dir=folder / "run", port=port)

    def as_root(*statements: str) -> None:
        url = urlsplit(server.admin_url)
        with pymysql.connect(user=url.username, unix_socket=parse_qs(url.query)["socket"][0]) as root:
            for statement in statements:
                root.cursor().execute(statement)

    async def kill() -> None:
        os.kill(int((folder / "mariadb/pid").read_text()), signal.SIGKILL)
        await server.stop()

    async def set_read_only(is_wanted: bool) -> None:
        await asyncio.to_thread(as_root, f"SET GLOBAL read_only = {is_wanted:d}")

    await server.start()
    await asyncio.to_thread(
        as_root,
        f"CREATE USER {_ADMIN} IDENTIFIED BY '{_ADMIN}'",
        f"GRANT ALL ON *.* TO {_ADMIN} WITH GRANT OPTION",
        f"REVOKE READ_ONLY ADMIN ON *.* FROM {_ADMIN}",
    )
    async with proxy(partial(asyncio.open_connection, "127.0.0.1", port)) as way:
        url = f"mysql://{_ADMIN}:{_ADMIN}@127.0.0.1:{way.port}/"
        yield Breakable(
            cluster=replace(clusters.mysql(server, port), admin_url=url, port=way.port),
            proxies=[way],
            stop=server.stop,
            kill=kill,
            start=server.start,
            set_read_only=set_read_only,
        )
    await server.stop()
