"""`controlplane up` as a person runs it: in the foreground, used over HTTP, interrupted, killed, started again."""

import asyncio
import os
import shutil
import signal
import stat
import sys
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pymysql
import pytest

import controlplane
from tests.cli.up import Up, running
from tests.proxies.socks import Refused, connect, echo
from tests.stack import eventually

DATABASES = "/api/portal/databases"
HELLO = {
    "name": "hello",
    "runtime": "python3",
    "auth": "public",
    "source": "def handler(event, context):\n    return 7\n",
}

# What Python runs before ours, on a machine that has neither chDB nor MariaDB.
WITHOUT_ENGINES = """\
import shutil, sys
sys.modules["chdb"] = None
which = shutil.which
shutil.which = lambda name, *more, **others: None if name == "mariadbd" else which(name, *more, **others)
"""


@asynccontextmanager
async def logged_in(up: Up, email: str, password: str) -> AsyncIterator[httpx.AsyncClient]:
    """Do what the welcome says: log in, make a token. Give a client that has it."""
    async with httpx.AsyncClient(base_url=up.base, timeout=30) as rest:
        login = await rest.post("/api/portal/session", json={"email": email, "password": password})
        assert login.status_code == 200, login.text
        headers = {"cookie": login.headers["set-cookie"].partition(";")[0], "origin": up.base}
        rest.cookies.clear()
        made = await rest.post("/api/portal/tokens", json={"name": "first"}, headers=headers)
        assert made.status_code == 201, made.text
        rest.headers["authorization"] = f"Bearer {made.json()['token']}"
        yield rest


async def order(rest: httpx.AsyncClient, name: str, *, engine: str = "postgresql") -> dict[str, Any]:
    """Make a database; return how to connect once it is ready."""
    sku = "ch-s-1vcpu-2gb" if engine == "clickhouse" else "db-s-1vcpu-2gb"
    answer = await rest.post(DATABASES, json={"name": name, "engine": engine, "sku": sku})
    assert answer.status_code == 201, answer.text

    async def is_ready() -> bool:
        # Until something happens, or a second: the demo account may ask 120 times a minute.
        await rest.get("/api/portal/events", params={"after": -1, "wait": 1})
        answer = await rest.get(f"{DATABASES}/{name}")
        assert answer.status_code == 200, answer.text
        return bool(answer.json()["status"] == "ready")

    await eventually(is_ready, seconds=40)
    connection: dict[str, Any] = (await rest.get(f"{DATABASES}/{name}/connection")).json()
    return connection


async def use(up: Up, email: str, password: str, name: str) -> str:
    """Log in, make a PostgreSQL database, and work with it. Return the token."""
    async with logged_in(up, email, password) as rest:
        tenant = await asyncpg.connect((await order(rest, name))["uri"])
        await tenant.execute("CREATE TABLE IF NOT EXISTS notes AS SELECT 7 AS n")
        assert await tenant.fetchval("SELECT n FROM notes") == 7
        await tenant.close()
        return rest.headers["authorization"].removeprefix("Bearer ")


def ask_mysql(connection: dict[str, Any], *statements: str) -> Any:
    """Run statements as a customer's own program does; return the first value of the last one's answer."""
    login = {key: connection[key] for key in ("host", "port", "database", "password")}
    with (
        pymysql.connect(**login, user=connection["username"], autocommit=True) as tenant,
        tenant.cursor() as cursor,
    ):
        for statement in statements:
            cursor.execute(statement)
        row = cursor.fetchone()
        return row[0] if row else None


async def ask_clickhouse(connection: dict[str, Any], *statements: str) -> str:
    """Send statements as a customer's own program does; return the last one's answer."""
    login = httpx.BasicAuth(connection["username"], connection["password"])
    url = f"http://{connection['host']}:{connection['port']}/?database={connection['database']}"
    text = ""
    async with httpx.AsyncClient(auth=login, timeout=30) as tenant:
        for statement in statements:
            answer = await tenant.post(url, content=statement)
            assert answer.status_code == 200, answer.text
            text = answer.text
    return text.strip()


async def use_others(rest: httpx.AsyncClient) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make a MySQL and a ClickHouse database, and write into them. Return how to connect to each."""
    shop, visits = await asyncio.gather(order(rest, "shop", engine="mysql"), order(rest, "visits", engine="clickhouse"))
    assert ask_mysql(shop, "CREATE TABLE notes AS SELECT 7 AS n", "SELECT n FROM notes") == 7
    table = "CREATE TABLE notes (n Int8) ENGINE = MergeTree ORDER BY n"
    assert await ask_clickhouse(visits, table, "INSERT INTO notes VALUES (7)", "SELECT n FROM notes") == "7"
    return shop, visits


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


async def test_all_engines_are_there(folder: Path) -> None:
    """Databases of all embedded engines are made and used, and are back with their data when a server was killed."""
    async with running(Up(folder / "engines")) as up, logged_in(up, *up.login()) as rest:
        shown = (
            ("postgresql on port", "POSTGRES"),
            ("mysql      on port", "MARIADB"),
            ("clickhouse on port", "CLICKHOUSE"),
        )
        for line, name in shown:
            assert f"{line} {up.ports[f'HTX_{name}_PORT']}" in up.output
        regions = (await rest.get("/api/portal/regions")).json()
        assert [region["engines"] for region in regions] == [["clickhouse", "mysql", "postgresql"]]
        shop, visits = await use_others(rest)

        killed = {name: up.pid_of(name) for name in ("mariadbd ", "controlplane.local.chdb ")}
        for pid in killed.values():
            os.kill(pid, signal.SIGKILL)

        async def mysql_is_back() -> bool:
            with suppress(pymysql.Error):
                return bool(ask_mysql(shop, "SELECT n FROM notes") == 7)
            return False

        async def clickhouse_is_back() -> bool:
            with suppress(httpx.TransportError):
                return await ask_clickhouse(visits, "SELECT n FROM notes") == "7"
            return False

        await asyncio.gather(eventually(mysql_is_back), eventually(clickhouse_is_back))
        assert all(up.pid_of(name) != pid for name, pid in killed.items())


async def test_hosts_are_there(folder: Path) -> None:
    """A function runs and a proxy lets in; both do again when their hosts were killed (-9)."""
    async with running(Up(folder / "hosts")) as up, logged_in(up, *up.login()) as rest, echo() as target:
        assert "Runtimes python3" in up.output
        region = (await rest.get("/api/portal/regions")).json()[0]
        assert (set(region["runtimes"]), region["proxies"]) == ({"python3", "nodejs", "wasm"}, True)
        made = (await rest.post("/api/portal/functions", json=HELLO)).json()
        proxy = (await rest.post("/api/portal/proxies", json={"name": "office"})).json()

        async def works() -> bool:
            try:
                await connect(proxy, target)
            except Refused as refused:  # it knows us, and leads nobody to this machine
                return (await rest.get(made["path"])).text == "7" and refused.args == (2,)
            except (OSError, asyncio.IncompleteReadError):
                return False
            return pytest.fail("a proxy leads to this machine")

        await eventually(works)
        killed = {name: up.pid_of(f"controlplane {name}") for name in ("functions-host", "proxy-host")}
        for pid in killed.values():
            os.kill(pid, signal.SIGKILL)

        async def are_others() -> bool:
            with suppress(AssertionError):
                return all(up.pid_of(f"controlplane {name}") != pid for name, pid in killed.items())
            return False

        await eventually(are_others)
        await eventually(works)


async def test_an_engine_that_is_not_installed_is_not_offered(folder: Path, tmp_path: Path) -> None:
    """Without MariaDB and chDB the rest starts; the log says what to install, the API what can be ordered."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_ENGINES)
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    up = Up(folder / "bare", PYTHONPATH=paths)
    async with running(up), logged_in(up, *up.login()) as rest:
        for install in ("apt-get install mariadb-server-core", "pip install 'htx-controlplane[clickhouse]'"):
            assert up.output.count(install) == 1
        assert "clickhouse on port" not in up.output
        regions = (await rest.get("/api/portal/regions")).json()
        assert [region["engines"] for region in regions] == [["postgresql"]]
        for engine, sku in (("mysql", "db-s-1vcpu-2gb"), ("clickhouse", "ch-s-1vcpu-2gb")):
            answer = await rest.post(DATABASES, json={"name": "none", "engine": engine, "sku": sku})
            assert answer.status_code == 409
            assert f"The region 'local' has no {engine}, it has postgresql" in answer.json()["error"]


async def test_a_start_that_fails_has_shown_no_password(folder: Path) -> None:
    """With a busy port it ends with a sentence and leaves nothing running; the next start still shows the password."""
    up = Up(folder / "busy")
    for setting in ("HTX_HTTP_PORT", "HTX_MARIADB_PORT", "HTX_CLICKHOUSE_PORT"):
        async with await asyncio.start_server(lambda *_: None, "127.0.0.1", up.ports[setting]):
            await up.start()
            assert await up.end() == 1
        assert "Traceback" not in up.output
        last = up.output.splitlines()[-1]
        assert last.startswith(f"controlplane: Port {up.ports[setting]} cannot be used")
        assert f"set {setting} to" in last
        assert up.processes() == {}
    async with running(up):
        assert "shown this once" in up.output


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can become somebody else")
async def test_it_needs_no_root(folder: Path) -> None:
    """A user without rights runs it on a folder of his own, and everything of it is his."""
    data_dir = folder / "nobody"
    data_dir.mkdir()
    os.chown(data_dir, 65534, 65534)
    async with running(Up(data_dir, command=await _as_nobody(folder))) as up:
        await use(up, *up.login(), "analytics")
        async with logged_in(up, *up.login()) as rest:
            await use_others(rest)
            (region,) = (await rest.get("/api/portal/regions")).json()
        assert (region["runtimes"], region["proxies"]) == ([], True)
        assert "none can be run here: " in up.output
        assert up.users() == {65534}
        up.process.send_signal(signal.SIGINT)
        assert await up.end() == 0
        assert up.processes() == {}
        assert {file.stat().st_uid for file in data_dir.rglob("*")} == {65534}


async def _as_nobody(folder: Path) -> list[str]:
    """Return how a user without rights runs the command.

    The Python of the checkout may lie in root's home, where nobody gets in; the machine's own then runs the same code.
    """
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--inh-caps=-all"]
    # By way of env: setpriv itself still has root's way in when it starts a program.
    for python in (sys.executable, await _machines_python(folder / "python")):
        command = [*drop, "env", python, "-m", "controlplane"]
        probe = await asyncio.create_subprocess_exec(
            *command, "--version", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        if await probe.wait() == 0:
            return command
    pytest.fail("nobody may not read this checkout: clone it to where every user may look, such as /srv")


async def _machines_python(folder: Path) -> str:
    """Return a Python that is the machine's own and has the packages and the code of ours.

    A folder of its own, as the programs that ours starts do not all keep PYTHONPATH.
    """
    make = await asyncio.create_subprocess_exec("/usr/bin/python3.11", "-m", "venv", "--without-pip", str(folder))
    assert await make.wait() == 0
    code = f"{Path(controlplane.__file__).parent.parent}\n{sysconfig.get_path('purelib')}\n"
    (folder / "lib/python3.11/site-packages/ours.pth").write_text(code)
    return str(folder / "bin/python")
