"""A host as a process of its own: `python -m tests.functions.host.serve`, with the fields of its settings in order."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

# As the command does, and for one more reason: under uvloop, gRPC's fork handlers crash what is being started.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import uvloop

from controlplane.functions.host.host import FunctionHostSettings, run


def command(settings: FunctionHostSettings) -> Sequence[str]:
    """Return the command that runs a host with these settings."""
    paths = (settings.server, settings.secret, settings.listen, str(settings.data_dir))
    numbers = (settings.metrics_port, settings.uids.start, settings.uids.stop)
    return (sys.executable, "-m", __name__, *paths, *map(str, numbers))


if __name__ == "__main__":
    server, secret, listen, data_dir, metrics_port, first, end = sys.argv[1:]
    uids = range(int(first), int(end))
    uvloop.run(run(FunctionHostSettings(server, secret, listen, Path(data_dir), int(metrics_port), uids)))
