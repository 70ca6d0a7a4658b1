"""What `controlplane up` prints once everything runs: where it is, and lines to paste."""

from collections.abc import Sequence

import click

from controlplane.local.engines import port_of
from controlplane.local.hosts import FunctionsHere
from controlplane.settings import Settings

_ENGINES = {"postgresql": "PostgreSQL", "mysql": "MariaDB", "clickhouse": "chDB, by HTTP"}


def welcome(
    settings: Settings, engines: Sequence[str], functions: FunctionsHere, email: str, password: str | None
) -> str:
    """Return the text; with the embedded engines that run, and the demo login only where it has just been made."""
    host = "127.0.0.1" if settings.http_host == "0.0.0.0" else settings.http_host  # noqa: S104
    base = f"http://{host}:{settings.http_port}"
    login = (
        f"{email}  /  {click.style(password, bold=True)}   (shown this once)"
        if password
        else f"the accounts of `controlplane account list`; the data is in {settings.data_dir}"
    )
    json = "-H 'Content-Type: application/json'"
    shown = password or "YOUR-PASSWORD"
    https = f"  HTTPS    https://{host}:{settings.https_port}/api/portal\n" if settings.tls_cert else ""
    running = (f"{engine:<10} on port {port_of(engine, settings)}   {_ENGINES[engine]}" for engine in engines)
    embedded = "\n           ".join(running) or "none is embedded; the catalogue has the clusters"
    runtimes = ", ".join(functions.runtimes) or f"none can be run here: {' '.join(functions.lacking)}"
    return f"""
{click.style("HTX Cloud is up.", bold=True, fg="green")}

  REST     {base}/api/portal   described at {base}/api/openapi
{https}  gRPC     {settings.grpc_host}:{settings.grpc_port}   with reflection, for buf curl and grpcurl
  Metrics  http://127.0.0.1:{settings.metrics_port}/metrics of the server, {settings.edge_metrics_port} of Envoy
  Engines  {embedded}
  Runtimes {runtimes}
  Proxies  SOCKS5 on {settings.proxy_host}:{settings.proxy_port}
  Login    {login}

Log in, make a token, and make a database:

  curl -c cookies.txt {json} -d '{{"email":"{email}","password":"{shown}"}}' \\
    {base}/api/portal/session

  export HTX_TOKEN=$(curl -s -b cookies.txt -H 'Origin: {base}' {json} -d '{{"name":"first"}}' \\
    {base}/api/portal/tokens | python3 -c 'import json, sys; print(json.load(sys.stdin)["token"])')

  curl -X POST {base}/api/portal/databases -H "Authorization: Bearer $HTX_TOKEN" \\
    {json} -d '{{"name":"analytics","engine":"postgresql","sku":"db-s-1vcpu-2gb"}}'

  curl -H "Authorization: Bearer $HTX_TOKEN" {base}/api/portal/databases/analytics/connection

Ctrl-C stops everything; the data stays.
"""
