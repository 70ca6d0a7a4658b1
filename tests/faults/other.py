"""Another server beside that of an installation, on the same rows, keys and files of backups."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeAlias

import grpc

from controlplane.api.v1.backups_pb2_grpc import BackupServiceStub
from controlplane.api.v1.databases_pb2_grpc import DatabaseServiceStub
from tests.faults.installation import Installation
from tests.faults.process import Launcher
from tests.stack import free_port

Stubs: TypeAlias = "tuple[DatabaseServiceStub, BackupServiceStub]"

_numbers = itertools.count(1)


@asynccontextmanager
async def other_server(there: Installation, launcher: Launcher) -> AsyncIterator[Stubs]:
    """Run another server, and kill it at the end; return its stubs, to be called by `there.ask`."""
    folder = there.folder / f"other-{next(_numbers)}"
    folder.mkdir()
    port = free_port()
    settings = {
        "HTX_DATA_DIR": str(folder),
        "HTX_KEY_FILE": str(there.folder / "keys.json"),
        "HTX_BACKUP_URL": (there.folder / "backups").as_uri(),
        "HTX_CATALOG": str(there.folder / "catalog.toml"),
        "HTX_DATABASE_URL": there.store.url.render_as_string(hide_password=False),
        "HTX_GRPC_PORT": str(port),
        "HTX_METRICS_PORT": str(free_port()),
    }
    process = await launcher.start(settings, scope="cluster", seconds={})
    assert await process.ready(), "the other server has ended at its start"
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield DatabaseServiceStub(channel), BackupServiceStub(channel)
    finally:
        process.kill()
        await process.ended.wait()
