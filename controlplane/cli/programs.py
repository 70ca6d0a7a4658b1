"""The programs of an installation, each started in the foreground; and what Envoy starts with."""

import click
import uvloop

from controlplane.cli.settings import read_settings
from controlplane.edge import write as write_edge
from controlplane.hosts.model import FUNCTIONS, PROXIES
from controlplane.house import StartError
from controlplane.observe import logs
from controlplane.server import run
from controlplane.settings import Settings


@click.command()
def up() -> None:
    """Start everything in the foreground: the database engines, the server and Envoy. Ctrl-C stops all of it."""
    from controlplane.local.supervisor import supervise  # noqa: PLC0415 - `serve` needs none of what it brings

    settings = read_settings()
    logs.configure(settings)
    uvloop.run(supervise(settings))


@click.command()
def serve() -> None:
    """Start the gRPC server alone, for an Envoy that runs elsewhere. SIGTERM stops it in order."""
    settings = read_settings()
    logs.configure(settings)
    uvloop.run(run(settings))


@click.command("functions-host")
def functions_host() -> None:
    """Run customers' functions, as the host whose secret HTX_HOST_SECRET_FILE has. SIGTERM stops it in order."""
    from controlplane.functions.host.host import FunctionHostSettings  # noqa: PLC0415 - the server needs none of it
    from controlplane.functions.host.host import HostError as FunctionHostError  # noqa: PLC0415
    from controlplane.functions.host.host import run as run_functions  # noqa: PLC0415
    from controlplane.functions.host.sandbox import SandboxUnavailable  # noqa: PLC0415

    settings = read_settings()
    logs.configure(settings)
    try:
        uvloop.run(
            run_functions(
                FunctionHostSettings(
                    server=settings.control_plane,
                    secret=_host_secret(settings, FUNCTIONS),
                    listen=settings.functions_address,
                    data_dir=settings.functions_dir,
                    metrics_port=settings.functions_metrics_port,
                    uids=settings.functions_uids,
                )
            )
        )
    except (FunctionHostError, SandboxUnavailable) as error:
        raise StartError(str(error)) from None


@click.command("proxy-host")
def proxy_host() -> None:
    """Carry SOCKS5 proxies, as the host whose secret HTX_HOST_SECRET_FILE has. SIGTERM stops it in order."""
    from controlplane.proxies.host.host import ProxyHostSettings  # noqa: PLC0415 - the server needs none of it
    from controlplane.proxies.host.host import run as run_proxies  # noqa: PLC0415

    settings = read_settings()
    logs.configure(settings)
    uvloop.run(
        run_proxies(
            ProxyHostSettings(
                server=settings.control_plane,
                secret=_host_secret(settings, PROXIES),
                hosts=tuple(host.strip() for host in settings.proxy_host.split(",")),
                port=settings.proxy_port,
                metrics_port=settings.proxy_metrics_port,
            )
        )
    )


@click.command()
def edge() -> None:
    """Write Envoy's configuration for these settings into the run folder, and print its path."""
    click.echo(write_edge(read_settings()))


def _host_secret(settings: Settings, kind: str) -> str:
    """Return the secret of this machine's host.

    Raises StartError without one.
    """
    file = settings.secret_file(kind)
    if not file.is_file():
        raise StartError(
            f"{file} is not there: make a secret with `controlplane host add NAME --kind {kind}`, write it to a file, "
            "and point HTX_HOST_SECRET_FILE there."
        )
    return file.read_text().strip()
