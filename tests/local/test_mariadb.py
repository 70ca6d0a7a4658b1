"""The embedded MariaDB through starts, stops, kills and bad places."""

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
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pymysql
import pytest
from pymysql.constants import ER

from controlplane.local.mariadb import EmbeddedMariaDB, EmbeddedMariaDBError
from tests.stack import eventually, free_port

# A control plane of its own: it starts the server, says so, and waits to be killed.
_CONTROL_PLANE = """
import asyncio, pathlib, sys
from controlplane.local.mariadb import EmbeddedMariaDB

async def main():
    data = pathlib.Path(sys.argv[1])
    server = EmbeddedMariaDB(data_dir=data, run_dir=data / "run", port=int(sys.argv[2]))
    await server.start()
    print("runs", server.admin_url, flush=True)
    await (asyncio.sleep(60) if "stop" not in sys.argv else server.stop())

if "uvloop" in sys.argv:
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
async def template() -> AsyncIterator[Path]:
    """A data folder that a server has left, as to make one takes seconds."""
    home = _new_home()
    server = _server(home, free_port())
    await server.start()
    await server.stop()
    yield home / "data"
    shutil.rmtree(home)


@pytest.fixture
def home(template: Path) -> Iterator[Path]:
    """A folder with the data of a server."""
    home = _new_home()
    subprocess.run(["cp", "-a", template, home / "data"], check=True)  # noqa: S607
    yield home
    shutil.rmtree(home)


def _new_home() -> Path:
    """Return a folder whose path is short enough for sockets, and which root's stand-in may enter."""
    home = Path(tempfile.mkdtemp(prefix="htx-"))
    home.chmod(0o711)
    return home


@pytest.fixture
def port() -> int:
    """A free port."""
    return free_port()


def _server(home: Path, port: int) -> EmbeddedMariaDB:
    return EmbeddedMariaDB(data_dir=home / "data", run_dir=home / "data/run", port=port)


@asynccontextmanager
async def _running(server: EmbeddedMariaDB) -> AsyncIterator[None]:
    await server.start()
    try:
        yield
    finally:
        await server.stop()


def _ask(server: EmbeddedMariaDB, *statements: str) -> list[tuple[Any, ...]]:
    """Run statements as the admin; return the rows of the last."""
    url = urlsplit(server.admin_url)
    with (
        pymysql.connect(user=url.username, unix_socket=parse_qs(url.query)["socket"][0], autocommit=True) as admin,
        admin.cursor() as cursor,
    ):
        for statement in statements:
            cursor.execute(statement)
        return list(cursor.fetchall())


def _pid(home: Path) -> int:
    return int((home / "data/mariadb/pid").read_text())


async def _gone(pid: int) -> None:
    async def is_gone() -> bool:
        return not Path(f"/proc/{pid}").exists()  # noqa: ASYNC240

    await eventually(is_gone)


async def test_first_start(port: int) -> None:
    """The first start makes the data, after one that was killed halfway too, with no way in but the admin's."""
    home = _new_home()
    half = home / "data/mariadb.new"
    half.mkdir(parents=True)
    (home / "data").chmod(0o711)
    (half / "ibdata1").write_text("half")
    server = _server(home, port)
    assert EmbeddedMariaDB.is_installed()
    async with _running(server):
        assert not half.exists()
        users = _ask(server, "SELECT user, host FROM mysql.user WHERE user != 'mariadb.sys'")
        assert users == [("root", "localhost")] if os.geteuid() == 0 else users
        assert _ask(server, "SELECT * FROM mysql.db") == []
        assert _ask(server, "SHOW DATABASES LIKE 'test'") == []
    shutil.rmtree(home)


async def test_stop_and_start(home: Path, port: int) -> None:
    """A stop ends the process though a session is open, may be repeated, and the next start finds the data."""
    server = _server(home, port)
    async with _running(server):
        _ask(server, "CREATE DATABASE kept", "CREATE TABLE kept.t AS SELECT 1 AS n")
        pid = _pid(home)
    await server.stop()
    assert not Path(f"/proc/{pid}").exists()  # noqa: ASYNC240
    async with _running(server):
        assert _ask(server, "SELECT * FROM kept.t") == [(1,)]


async def test_settings(home: Path, port: int) -> None:
    """The server listens on loopback only, syncs, holds tenants short, and has no privilege."""
    server = _server(home, port)
    async with _running(server):
        for name, value in {
            "bind_address": "127.0.0.1",
            "innodb_flush_log_at_trx_commit": 1,
            "innodb_doublewrite": 1,
            "have_symlink": "DISABLED",
            "local_infile": 0,
            "enforce_storage_engine": "InnoDB",
            "character_set_server": "utf8mb4",
            "event_scheduler": "DISABLED",
        }.items():
            assert _ask(server, f"SELECT @@{name}") == [(value,)], name
        assert _ask(server, "SET SESSION sort_buffer_size = 1 << 40", "SELECT @@sort_buffer_size") == [(16 << 20,)]
        status = Path(f"/proc/{_pid(home)}/status").read_text()  # noqa: ASYNC240
        facts = dict(line.split(":\t", 1) for line in status.splitlines())
        assert "0" not in facts["Uid"].split()
        assert "0" not in facts["Gid"].split()
        assert "0" not in facts["Groups"].split()
        assert all(int(facts[kind], 16) == 0 for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"))


async def test_who_gets_in(home: Path, port: int) -> None:
    """The admin comes in by the socket only, which no other user of the machine reaches, and a tenant by the port."""
    server = _server(home, port)
    async with _running(server):
        _ask(server, "CREATE USER tenant IDENTIFIED BY 'x'")
        pymysql.connect(host="127.0.0.1", port=port, user="tenant", password="x").close()
        for user, password in (("root", ""), ("root", "invalid"), ("", ""), ("tenant", "")):
            with pytest.raises(pymysql.OperationalError, match="Access denied"):
                pymysql.connect(host="127.0.0.1", port=port, user=user, password=password)
        folder = home / "data/run/mariadb"
        assert folder.stat().st_mode & 0o077 == 0
        assert (home / "data/mariadb").stat().st_mode & 0o077 == 0


async def test_restart(home: Path, port: int) -> None:
    """A server that dies is started again, and has what was committed."""
    server = _server(home, port)
    async with _running(server):
        _ask(server, "CREATE DATABASE kept")
        pid = _pid(home)
        os.kill(pid, signal.SIGKILL)

        async def is_back() -> bool:
            with pytest.raises(pymysql.OperationalError) as refused:
                pymysql.connect(host="127.0.0.1", port=port, user="nobody", password="x")
            return bool(refused.value.args[0] == ER.HOST_NOT_PRIVILEGED)

        await eventually(is_back)
        assert _pid(home) != pid
        assert _ask(server, "SHOW DATABASES LIKE 'kept'") == [("kept",)]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_killed_control_plane(home: Path, port: int, loop: str) -> None:
    """The server does not outlive a control plane that is killed, whichever event loop it had."""
    command = [sys.executable, "-c", _CONTROL_PLANE, str(home / "data"), str(port), loop]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as control_plane:  # noqa: ASYNC220
        assert control_plane.stdout is not None
        while not control_plane.stdout.readline().startswith(b"runs"):
            assert control_plane.poll() is None
        pid = _pid(home)
        control_plane.kill()
    await _gone(pid)
    async with _running(_server(home, port)):
        pass


async def test_leftover_server(home: Path, port: int) -> None:
    """A server that did outlive its control plane is stopped, and a new one has its data."""
    data = home / "data/mariadb"
    old = subprocess.Popen(  # noqa: ASYNC220
        [
            *("/usr/sbin/mariadbd", "--no-defaults", f"--datadir={data}", f"--pid-file={data}/pid"),
            *("--skip-networking", f"--socket={data}/socket", "--innodb-log-file-size=64M"),
        ],
        user=data.stat().st_uid,
        stderr=subprocess.DEVNULL,
    )

    async def runs() -> bool:  # and greets whoever comes: before that it may overlook a signal
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.settimeout(1)
            probe.connect(str(data / "socket"))
            return bool(probe.recv(5))
        return False

    await eventually(runs)
    reaper = asyncio.create_task(asyncio.to_thread(old.wait))
    async with _running(_server(home, port)):
        assert await reaper == 0
        assert _pid(home) != old.pid


async def test_recycled_pid(home: Path, port: int) -> None:
    """A pid file whose number another program has by now does not keep the server from starting, nor end that one."""
    with subprocess.Popen(["/bin/sleep", "60"]) as stranger:  # noqa: ASYNC220
        (home / "data/mariadb/pid").write_text(f"{stranger.pid}\n")
        os.chown(home / "data/mariadb/pid", (home / "data/mariadb").stat().st_uid, -1)
        async with _running(_server(home, port)):
            assert stranger.poll() is None
        stranger.kill()


async def test_second_control_plane(home: Path, port: int) -> None:
    """A second control plane on the same folder is refused, and the first one's server stays up."""
    server = _server(home, port)
    async with _running(server):
        with pytest.raises(EmbeddedMariaDBError, match="Another control plane uses"):
            await _server(home, port).start()
        assert _ask(server, "SELECT 1") == [(1,)]


async def test_port_taken(home: Path, port: int) -> None:
    """A port that is taken is named, with the setting to change; once it is free the same object starts."""
    server = _server(home, port)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(EmbeddedMariaDBError, match=f"Port {port} cannot be used .*HTX_MARIADB_PORT"):
            await server.start()
    async with _running(server):
        pass


async def test_broken_data_folder(home: Path, port: int) -> None:
    """A server that cannot start says why in MariaDB's words."""
    (home / "data/mariadb/ibdata1").write_bytes(b"broken")
    with pytest.raises(EmbeddedMariaDBError, match=r"did not start: .*\[ERROR\].*ibdata1"):
        await _server(home, port).start()


@root_only
async def test_closed_folder(home: Path, port: int) -> None:
    """As root, a folder on the way that the server's user cannot enter is named, with the remedy."""
    private = home / "private"
    private.mkdir(mode=0o700)
    with pytest.raises(EmbeddedMariaDBError, match=rf"cannot enter {private}: run `chmod o\+x {private}`"):
        await _server(private, port).start()


@root_only
def test_other_users_data(home: Path, port: int) -> None:
    """A user who is not root is told whose the data is."""
    os.chown(home / "data", pwd.getpwnam("nobody").pw_uid, -1)
    os.chown(home / "data/mariadb", 0, -1)
    (home / "data/mariadb.lock").unlink()
    result = _as_nobody(home / "data", port)
    assert "belongs to another user" in result.stderr
    assert "start as root or as that user" in result.stderr


@root_only
def test_without_root(home: Path, port: int) -> None:
    """A user who is not root runs the server as himself, from the first start on."""
    data = home / "own"
    data.mkdir()
    os.chown(data, pwd.getpwnam("nobody").pw_uid, -1)
    result = _as_nobody(data, port)
    assert "runs mysql://nobody@/" in result.stdout, result.stderr
    assert (data / "mariadb").stat().st_uid == pwd.getpwnam("nobody").pw_uid


def _as_nobody(data: Path, port: int) -> subprocess.CompletedProcess[str]:
    """Run a control plane as `nobody` that connects once and stops."""
    program = _CONTROL_PLANE.replace(
        'print("runs"',
        "import pymysql; pymysql.connect(user='nobody', unix_socket=str(data / 'run/mariadb/socket')).close()\n"
        '    print("runs"',
    )
    # The capability lets it read the Python that it runs on, wherever that is.
    as_nobody = "setpriv --reuid nobody --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search"
    return subprocess.run(
        [*as_nobody.split(), sys.executable, "-c", program, str(data), str(port), "stop"],
        cwd="/",
        env={"PATH": os.defpath, "PYTHONPATH": os.getcwd()},  # noqa: PTH109
        capture_output=True,
        text=True,
        check=False,
    )
