"""Our server over a PostgreSQL that does nothing, to see what the reconciler itself can do.

python -m tests.bench.faked
"""

import asyncio
import signal

import uvloop

from controlplane.observe import logs
from controlplane.server import Server
from controlplane.settings import Settings
from tests.databases.fake_engine import FakeEngine


async def main() -> None:
    """Serve until SIGTERM, as `controlplane serve` does."""
    settings = Settings()
    logs.configure(settings)
    server = Server(settings, engines={"local-postgresql": FakeEngine()})
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server.expose_metrics()
    await server.start()
    await stop.wait()
    await server.stop()


if __name__ == "__main__":
    uvloop.run(main())
