"""`controlplane up` as a person runs it: in the foreground, used over HTTP, interrupted, killed, started again."""

import asyncio
import os
import re
import shutil
import signal
import stat
import sys
import sysconfig
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg
import httpx
import pytest

import controlplane
from tests.cli.conftest import COMMAND, environment
from tests.stack import eventually, free_port

DATABASES = "/api/portal/databases"


class Up:
    """A running `controlplane up`, and what it has printed so far."""

    def __init__(self, data_dir: Path, *, command: Sequence[str] = (str(COMMAND),)) -> None:
        self.data_dir = data_dir
        self.command = command
        self.ports = {
            f"HTX_{name}_PORT": free_port() for name in ("HTTP", "GRPC", "METRICS", "EDGE_METRICS", "POSTGRES")
        }
        self.output = ""
        self.process: asyncio.subprocess.Process

    @property
    def base(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.ports['HTX_HTTP_PORT']}"

    async def start(self) -> None:
        """Start it, as a terminal would: in a process group of its own."""
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            "up",
            env=environment(self.data_dir, **self.ports),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        self.output = ""

    async def until(self, text: str, *, seconds: float = 40) -> None:
        """Wait until it has printed something."""
        assert self.process.stdout is not None
        async with asyncio.timeout(seconds):
            while text not in self.output:
                line = await self.process.stdout.readline()
                assert line, f"it has ended:\n{self.output}"
                self.output += line.decode()

    def login(self) -> tuple[str, str]:
        """Return the address and the password that it has printed."""
        login = re.search(r"Login +(\S+)  /  (\S+)   \(shown this once\)", self.output)
        assert login is not None
        return login[1], login[2]

    async def end(self) -> int:
        """Wait until it has ended; return the status."""
        assert self.process.stdout is not None
        self.output += (await asyncio.wait_for(self.process.stdout.read(), 40)).decode()
        return await asyncio.wait_for(self.process.wait(), 10)

    def processes(self) -> dict[int, str]:
        """Return the processes of this installation: those that have its data folder in their variables or line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (folder / "cmdline").read_bytes()
                variables = (folder / "environ").read_bytes()
                if os.fsencode(self.data_dir) in line + variables and not _is_zombie(folder):
                    found[int(folder.name)] = line.replace(b"\0", b" ").decode()
        return found

    def users(self) -> set[int]:
        """Return whom the processes belong to."""
        return {Path(f"/proc/{pid}").stat().st_uid for pid in self.processes()}

    def pid_of(self, text: str) -> int:
        """Return the one process with this in its command line."""
        pids = [pid for pid, line in self.processes().items() if text in line and "setpriv" not in line]
        assert len(pids) == 1, self.processes()
        return pids[0]

    async def until_nothing_runs(self) -> None:
        """Wait until no process of this installation is left."""

        async def none() -> bool:
            return not self.processes()

        try:
            await eventually(none, seconds=25)
        except TimeoutError:
            pytest.fail(f"still running: {self.processes()}")


def _is_zombie(folder: Path) -> bool:
    return (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


@asynccontextmanager
async def running(up: Up) -> AsyncIterator[Up]:
    """Start it, wait until it is up, and leave nothing of it running, whatever happens."""
    await up.start()
    try:
        await up.until("Ctrl-C stops everything")
        yield up
    finally:
        with suppress(ProcessLookupError):
            up.process.send_signal(signal.SIGTERM)
        with suppress(TimeoutError):
            await up.end()
        for pid in up.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def use(up: Up, email: str, password: str, name: str) -> str:
    """Do what the welcome says: log in, make a token, make a database, connect. Return the token."""
    async with httpx.AsyncClient(base_url=up.base, timeout=30) as rest:
        login = await rest.post("/api/portal/session", json={"email": email, "password": password})
        assert login.status_code == 200, login.text
        headers = {"cookie": login.headers["set-cookie"].partition(";")[0], "origin": up.base}
        rest.cookies.clear()
        made = await rest.post("/api/portal/tokens", json={"name": "first"}, headers=headers)
        assert made.status_code == 201, made.text
        rest.headers["authorization"] = f"Bearer {made.json()['token']}"
        body = {"name": name, "engine": "postgresql", "sku": "db-s-1vcpu-2gb"}
        assert (await rest.post(DATABASES, json=body)).status_code == 201

        async def connection() -> str | None:
            answer = await rest.get(f"{DATABASES}/{name}/connection")
            return answer.json()["uri"] if answer.status_code == 200 else None

        tenant = await asyncpg.connect(await eventually(connection))
        await tenant.execute("CREATE TABLE IF NOT EXISTS notes AS SELECT 7 AS n")
        assert await tenant.fetchval("SELECT n FROM notes") == 7
        await tenant.close()
        token: str = made.json()["token"]
        return token


async def answers(up: Up, token: str) -> list[str] | None:
    """Return the names of the databases, or None while it does not answer."""
    async with httpx.AsyncClient(base_url=up.base, timeout=5) as rest:
        try:
            answer = await rest.get(DATABASES, headers={"authorization": f"Bearer {token}"})
        except httpx.TransportError:
            return None
    return [database["name"] for database in answer.json()] if answer.status_code == 200 else None


async def test_an_evening_with_it(folder: Path) -> None:
    """Started, used, refused a second time, its server killed, interrupted, started again, killed: as promised."""
    data_dir = folder / "up"
    async with running(Up(data_dir)) as up:
        assert up.base in up.output
        email, password = up.login()
        token = await use(up, email, password, "analytics")
        for file in data_dir.rglob("*"):
            if file.is_file():
                content = await asyncio.to_thread(file.read_bytes)
                assert password.encode() not in content, file
                assert token.encode() not in content, file
        assert stat.S_IMODE(data_dir.stat().st_mode) & 0o066 == 0
        assert {stat.S_IMODE((data_dir / name).stat().st_mode) for name in ("keys.json", "controlplane.db")} == {0o600}

        second = Up(data_dir)
        await second.start()
        assert await second.end() == 1
        assert second.output.splitlines()[-1] == (
            f"controlplane: It is running already on {data_dir}: stop it first, or set another HTX_DATA_DIR."
        )
        assert await answers(up, token) == ["analytics"]

        os.kill(up.pid_of("controlplane serve"), signal.SIGKILL)

        async def is_back() -> bool:
            return await answers(up, token) == ["analytics"]

        await eventually(is_back)

        up.process.send_signal(signal.SIGINT)
        assert await up.end() == 0
        assert "\nStopping…\n" in up.output
        assert up.processes() == {}

        await up.start()
        await up.until("Ctrl-C stops everything")
        assert password not in up.output
        assert "shown this once" not in up.output
        assert await answers(up, token) == ["analytics"]
        await use(up, email, password, "second")

        up.process.kill()
        await up.until_nothing_runs()
        await up.end()


async def test_a_start_that_fails_has_shown_no_password(folder: Path) -> None:
    """With a busy port it ends with a sentence and leaves nothing running; the next start still shows the password."""
    up = Up(folder / "busy")
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", up.ports["HTX_HTTP_PORT"]):
        await up.start()
        assert await up.end() == 1
    assert "Traceback" not in up.output
    assert up.output.splitlines()[-1].startswith(f"controlplane: Port {up.ports['HTX_HTTP_PORT']} cannot be used")
    assert up.output.splitlines()[-1].endswith("set HTX_HTTP_PORT to another.")
    assert up.processes() == {}
    async with running(up):
        assert "shown this once" in up.output


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can become somebody else")
async def test_it_needs_no_root(folder: Path) -> None:
    """A user without rights runs it on a folder of his own, and everything of it is his."""
    data_dir = folder / "nobody"
    data_dir.mkdir()
    os.chown(data_dir, 65534, 65534)
    async with running(Up(data_dir, command=await _as_nobody())) as up:
        await use(up, *up.login(), "analytics")
        assert up.users() == {65534}
        assert {file.stat().st_uid for file in data_dir.rglob("*")} == {65534}
        up.process.send_signal(signal.SIGINT)
        assert await up.end() == 0
        assert up.processes() == {}


async def _as_nobody() -> list[str]:
    """Return how a user without rights runs the command.

    The Python of the checkout may lie in root's home, where nobody gets in; the machine's own then runs the same code.
    """
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--inh-caps=-all"]
    code = f"PYTHONPATH={Path(controlplane.__file__).parent.parent}:{sysconfig.get_path('purelib')}"
    # By way of env: setpriv itself still has root's way in when it starts a program.
    for python in ([sys.executable], [code, "/usr/bin/python3.11"]):
        command = [*drop, "env", *python, "-m", "controlplane"]
        probe = await asyncio.create_subprocess_exec(
            *command, "--version", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        if await probe.wait() == 0:
            return command
    pytest.fail("nobody may not read this checkout: clone it to where every user may look, such as /srv")
