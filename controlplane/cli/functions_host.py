"""`controlplane functions-host`: a host of functions."""

import click
import uvloop

from controlplane.cli.settings import read_host_secret, read_settings
from controlplane.functions.host.host import FunctionHostSettings, run
from controlplane.hosts.kinds import FUNCTIONS
from controlplane.observe import logs


@click.command("functions-host")
def functions_host() -> None:
    """Run customers' functions, as the host whose secret HTX_HOST_SECRET_FILE has. SIGTERM stops it in order."""
    settings = read_settings()
    logs.configure(settings)
    uvloop.run(
        run(
            FunctionHostSettings(
                server=settings.control_plane,
                secret=read_host_secret(settings, FUNCTIONS),
                listen=settings.functions_address,
                data_dir=settings.functions_dir,
                metrics_port=settings.functions_metrics_port,
                uids=settings.functions_uids,
            )
        )
    )
