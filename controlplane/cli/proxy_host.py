"""`controlplane proxy-host`: a host of proxies."""

import click
import uvloop

from controlplane.cli.settings import read_host_secret, read_settings
from controlplane.hosts.kinds import PROXIES
from controlplane.observe import logs
from controlplane.proxies.host.host import ProxyHostSettings, run


@click.command("proxy-host")
def proxy_host() -> None:
    """Carry SOCKS5 proxies, as the host whose secret HTX_HOST_SECRET_FILE has. SIGTERM stops it in order."""
    settings = read_settings()
    logs.configure(settings)
    uvloop.run(
        run(
            ProxyHostSettings(
                server=settings.control_plane,
                secret=read_host_secret(settings, PROXIES),
                hosts=tuple(host.strip() for host in settings.proxy_host.split(",")),
                port=settings.proxy_port,
                metrics_port=settings.proxy_metrics_port,
            )
        )
    )
