"""Who is compared: each peer's processes, started side by side over the same database, and the load it is under."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from controlplane.settings import Settings
from tests.bench.load import native_command, wrk_command
from tests.bench.ours import SERVE, envoy_command, variables
from tests.bench.process import Process, running, wait_for
from tests.bench.seed import RATE_LIMIT, Seed, write_tokens
from tests.stack import free_port

LIST = "/api/portal/databases"
_COMMITS = 10


class PeerError(Exception):
    """A peer does not do its work; the message says which."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One of those compared.

    `url` is where it answers, empty for native gRPC. `server` is the process that holds the Python code; `processes`
    are all that an answer takes. While it is measured, another process commits `commits` times a second.
    """

    name: str
    title: str
    url: str
    load: list[str]
    server: Process
    processes: tuple[Process, ...]
    commits: int = 0

    def cpu_seconds(self) -> tuple[float, float]:
        """Return the CPU time taken so far by the server, and by all of its processes."""
        return self.server.cpu_seconds(), sum(process.cpu_seconds() for process in self.processes)


@contextmanager
def peers(settings: Settings, seed: Seed, *, seconds: int) -> Iterator[list[Peer]]:
    """Start every peer, ours first, and stop them after the body. An idle one costs nothing that could be measured.

    Raises ProcessError if one does not start.
    """
    with ExitStack() as stack:
        start = _Starter(stack, settings, seed, seconds)
        yield [
            *start.ours(),
            *start.usual(workers=1),
            *start.usual(workers=1, pool=1),
            *start.usual(workers=2),
            *start.usual(workers=2, pool=1),
            *start.data_path(workers=1),
            *start.data_path(workers=2),
            *start.empty(),
        ]


class _Starter:
    def __init__(self, stack: ExitStack, settings: Settings, seed: Seed, seconds: int) -> None:
        self._stack = stack
        self._settings = settings
        self._seed = seed
        self._seconds = seconds
        self._tokens = write_tokens(settings.data_dir / "tokens", seed.tokens)

    def ours(self) -> list[Peer]:
        server = self._run("server", [*SERVE], variables(self._settings))
        envoy = self._envoy(self._settings)
        address = f"127.0.0.1:{self._settings.grpc_port}"
        native = native_command(address, self._tokens, self._seconds)
        ours = self._rest("ours", "ours: Envoy + gRPC server", self._settings.http_port, server, envoy)
        # Each commit, whatever it is about, makes the server forget all that it remembers.
        written = replace(ours, name="written", title=f"ours beside {_COMMITS} commits a second", commits=_COMMITS)
        return [
            ours,
            written,
            Peer("native", "ours by native gRPC, without Envoy", "", native, server, (server,)),
        ]

    def usual(self, *, workers: int, pool: int | None = None) -> list[Peer]:
        name = f"usual-{workers}" + ("" if pool is None else f"-pool{pool}")
        title = f"usual FastAPI, {_plural(workers)}, {'default pool' if pool is None else f'pool {pool}'}"
        variables = {
            "DATABASE_URL": self._settings.storage_url,
            "TOKEN_KEY": self._seed.mac_key.hex(),
            "RATE_LIMIT": str(RATE_LIMIT),
            **({} if pool is None else {"POOL_SIZE": str(pool)}),
        }
        server, port = self._uvicorn(name, "tests.bench.usual:app", workers, variables)
        return [self._rest(name, title, port, server)]

    def data_path(self, *, workers: int) -> list[Peer]:
        name, title = f"data-path-{workers}", f"FastAPI on our data path, {_plural(workers)}"
        server, port = self._uvicorn(name, "tests.bench.data_path:app", workers, variables(self._settings))
        bare = f"the same with a bare Response, {_plural(workers)}"
        return [
            self._rest(name, title, port, server),
            self._rest(f"bare-{workers}", bare, port, server, path="/bare"),
        ]

    def empty(self) -> list[Peer]:
        folder = self._settings.data_dir / "empty"
        settings = Settings.model_construct(
            **{
                **self._settings.model_dump(),
                "data_dir": folder,
                "http_port": free_port(),
                "edge_metrics_port": free_port(),
            }
        )
        settings.run_dir.mkdir(parents=True)
        server = self._run("empty", ["-m", "tests.bench.empty", str(settings.server_socket)], {})
        envoy = self._envoy(settings)
        title = "ceiling: an empty RPC, same Envoy"
        return [self._rest("empty", title, settings.http_port, server, envoy, path="/api/portal/functions")]

    def _uvicorn(self, name: str, app: str, workers: int, variables: dict[str, str]) -> tuple[Process, int]:
        port = free_port()
        options = ["--host", "127.0.0.1", "--port", str(port), "--workers", str(workers)]
        fast = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
        return self._run(name, ["-m", "uvicorn", app, *options, *fast], variables), port

    def _envoy(self, settings: Settings) -> Process:
        """Start Envoy; its access log goes to a file."""
        log = settings.data_dir / "envoy.log"
        return self._stack.enter_context(running(envoy_command(settings), log=log))

    def _run(self, name: str, arguments: list[str], variables: dict[str, str]) -> Process:
        log = self._settings.data_dir / f"{name}.log"
        return self._stack.enter_context(running([sys.executable, *arguments], log=log, env=variables))

    def _rest(self, name: str, title: str, port: int, server: Process, *envoy: Process, path: str = LIST) -> Peer:
        url = f"http://127.0.0.1:{port}{path}"
        peer = Peer(name, title, url, wrk_command(url, self._tokens, self._seconds), server, (server, *envoy))
        wait_for(url, *peer.processes, token=self._seed.tokens[0])
        return peer


def _plural(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"
