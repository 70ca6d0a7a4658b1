"""Start the embedded ClickHouse: `python -m controlplane.local.chdb FOLDER PORT`."""

import asyncio
import os
import sys
from pathlib import Path

import uvicorn

from controlplane.local.chdb.gateway import Gateway, admin_password


async def main(folder: Path, port: int) -> None:
    """Serve on 127.0.0.1 until SIGTERM."""
    gateway = Gateway(folder, admin_password(folder))
    os.chdir(folder)  # so that the paths of the engines' sockets are short, wherever the folder is
    tidying = asyncio.create_task(gateway.tidy())
    config = uvicorn.Config(
        gateway,
        host="127.0.0.1",
        port=port,
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
    )
    try:
        await uvicorn.Server(config).serve()
    finally:
        tidying.cancel()
        await gateway.stop()


if __name__ == "__main__":
    os.umask(0o022)
    asyncio.run(main(Path(sys.argv[1]).absolute(), int(sys.argv[2])))
