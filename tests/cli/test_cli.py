"""Each command: what it prints, how it ends, and that a mistake is told in a sentence instead of a traceback."""

import asyncio
import socket
import stat
import sys
from pathlib import Path

import pytest

from controlplane import __version__
from controlplane.catalog.model import BUILT_IN
from controlplane.cli.main import main
from controlplane.settings import Settings
from tests.cli.conftest import Run
from tests.stack import PASSWORD, free_port


async def test_help_tells_each_command(run: Run) -> None:
    """--help has a line for each command, and each explains its own options."""
    top, account, create, version = await asyncio.gather(
        *(run(*line.split()) for line in ("--help", "account -h", "account create -h", "--version"))
    )
    assert [ended.status for ended in (top, account, create, version)] == [0] * 4
    assert version.output == f"controlplane, version {__version__}\n"
    for command in ("up", "serve", "edge", "migrate", "doctor", "settings", "account", "audit", "catalog"):
        assert f"\n  {command} " in top.output
    for command in ("create", "list", "set-plan", "disable", "enable"):
        assert f"\n  {command} " in account.output
    for option in ("--password-stdin", "--no-password"):
        assert option in create.output


async def test_a_wrong_command_is_2(run: Run) -> None:
    """A command or option that is not there, or lacks something, ends with 2 and says what is missing."""
    wrong, lacking = await asyncio.gather(run("upp"), run("account", "create"))
    assert (wrong.status, lacking.status) == (2, 2)
    assert "No such command 'upp'" in wrong.errors
    assert "Missing option '--email'" in lacking.errors


async def test_the_life_of_an_account(run: Run, tmp_path: Path) -> None:
    """An account is opened once, listed, given another plan, disabled and enabled; its password is printed nowhere."""
    create = ("account", "create", "--password-stdin", "--email")
    made = await run(*create, "Ann@Example.com", stdin=f"{PASSWORD}\n")
    assert made.status == 0, made.errors
    again = await run(*create, "ann@EXAMPLE.com", stdin=f"{PASSWORD}\n")
    assert again.status == 1
    assert again.errors == "controlplane: There is already an account with the address ann@example.com.\n"
    assert "ann@example.com, with the plan starter" in made.output
    changed = await run("account", "set-plan", "--email", "ann@example.com", "--plan", "business")
    assert (changed.status, changed.output) == (0, "ann@example.com has the plan business now.\n")
    disabled = await run("account", "disable", "--email", "ann@example.com")
    assert (disabled.status, disabled.output) == (0, "ann@example.com is disabled.\n")
    listed = await run("account", "list")
    header, line = listed.output.splitlines()
    assert header.split() == ["ID", "EMAIL", "PLAN", "OPENED", "DISABLED"]
    assert line.split()[1:3] == ["ann@example.com", "business"]
    assert len(line.split()) == 7  # both dates with their times
    enabled = await run("account", "enable", "--email", "ann@example.com")
    assert (enabled.status, enabled.output) == (0, "ann@example.com is enabled.\n")
    assert len((await run("account", "list")).output.splitlines()[1].split()) == 5
    assert not any(PASSWORD in ended.output + ended.errors for ended in (made, changed, disabled, listed))
    database = tmp_path / "data" / "controlplane.db"
    assert PASSWORD.encode() not in database.read_bytes()
    assert stat.S_IMODE(database.stat().st_mode) == 0o600


async def test_an_account_without_a_password(run: Run) -> None:
    """An account for the provider's own login is opened without asking for a password, and takes none."""
    create = ("account", "create", "--no-password", "--email", "bob@example.com")
    torn = await run(*create, "--password-stdin", stdin=f"{PASSWORD}\n")
    assert (torn.status, "exclude each other" in torn.errors) == (2, True)
    made = await run(*create)
    assert (made.status, made.errors) == (0, "")
    assert "bob@example.com, with the plan starter" in made.output


@pytest.mark.parametrize(
    ("arguments", "stdin", "sentence"),
    [
        ("create --email a@example.com", "short\n", "The password is too short: it needs at least 12 characters."),
        ("create --email nobody", f"{PASSWORD}\n", "'nobody' is not an email address."),
        ("create --email a@example.com --plan gold", f"{PASSWORD}\n", "There is no plan 'gold'; there are starter"),
        ("set-plan --email b@example.com --plan starter", "", "There is no account with the address b@example.com."),
        ("disable --email b@example.com", "", "There is no account with the address b@example.com."),
        ("enable --email b@example.com", "", "There is no account with the address b@example.com."),
    ],
)
async def test_a_wrong_account_is_one_sentence(run: Run, arguments: str, stdin: str, sentence: str) -> None:
    """What is wrong with an account is said in a sentence, with status 1, and nothing is made."""
    command = arguments.split() + (["--password-stdin"] if stdin else [])
    ended = await run("account", *command, stdin=stdin)
    assert (ended.status, ended.output) == (1, "")
    assert ended.errors.startswith(f"controlplane: {sentence}")
    assert len(ended.errors.splitlines()) == 1


async def test_the_catalogue_is_checked(run: Run, tmp_path: Path) -> None:
    """A good catalogue is told to be fine; a bad one ends with 1 and a line for each problem."""
    bad = tmp_path / "bad.toml"
    bad.write_text(BUILT_IN.read_text().replace("vcpus = 1", "vcpus = 0"))
    good, wrong, missing = await asyncio.gather(
        *(run("catalog", "check", file) for file in (BUILT_IN, bad, tmp_path / "missing.toml"))
    )
    assert (good.status, good.output) == (0, f"{BUILT_IN} is fine: 2 plans, 4 SKUs, 1 regions, 3 clusters.\n")
    assert (wrong.status, wrong.output) == (1, "")
    assert f"{bad}: skus.0.vcpus: Input should be greater than or equal to 1" in wrong.errors
    assert len(wrong.errors.splitlines()) == 3
    assert missing.errors == f"controlplane: {tmp_path}/missing.toml: cannot be read: No such file or directory\n"


async def test_settings_are_listed(run: Run, tmp_path: Path) -> None:
    """Every setting is listed with its value and what it is for; the database's URL, which has a password, is not."""
    secret = "postgresql+asyncpg://us:hunter2@db/ours"
    listed = await run("settings", HTX_DATABASE_URL=secret, HTX_HTTP_PORT=8123)
    assert listed.status == 0
    lines = listed.output.splitlines()
    assert f"HTX_DATA_DIR={tmp_path}/data" in lines
    assert "HTX_HTTP_PORT=8123" in lines
    assert "HTX_GRPC_PORT=50051" in lines
    assert "HTX_DATABASE_URL=(set)" in lines
    assert "hunter2" not in listed.output
    for name, field in Settings.model_fields.items():
        assert any(line.startswith(f"HTX_{name.upper()}=") for line in lines)
        assert f"    {field.description}" in lines


async def test_the_edge_is_configured_by_the_settings(run: Run, tmp_path: Path) -> None:
    """`edge` writes what Envoy starts with, for the servers and ports of the settings, and prints where."""
    servers = f"{tmp_path}/one.sock,{tmp_path}/two.sock"
    written = await run("edge", HTX_HTTP_PORT=8127, HTX_SERVERS=servers)
    assert written.status == 0, written.errors
    config = await asyncio.to_thread(Path(written.output.strip()).read_text)
    assert "port_value: 8127" in config
    assert f"{tmp_path}/two.sock" in config


async def test_a_file_of_settings(run: Run, tmp_path: Path) -> None:
    """HTX_CONFIG names a file of settings; a variable wins over it."""
    file = tmp_path / "htx.toml"
    file.write_text('http_port = 8124\ngrpc_port = 50124\nlog_level = "debug"\n')
    lines = (await run("settings", HTX_CONFIG=file, HTX_HTTP_PORT=8125)).output.splitlines()
    assert {"HTX_HTTP_PORT=8125", "HTX_GRPC_PORT=50124", "HTX_LOG_LEVEL=debug", f"HTX_CONFIG={file}"} <= set(lines)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"HTX_HTTP_PORT": "http"}, "HTX_HTTP_PORT: Input should be a valid integer"),
        ({"HTX_HTTP_PORT": "70000"}, "HTX_HTTP_PORT: Input should be less than or equal to 65535"),
        ({"HTX_LOG_LEVEL": "loud"}, "HTX_LOG_LEVEL: Input should be 'debug', 'info', 'warning' or 'error'"),
        ({"HTX_TLS_CERT": "/cert.pem"}, "HTX_TLS_CERT and HTX_TLS_KEY go together: set both, or neither"),
        ({"HTX_DATA_DIR": f"/{'x' * 120}"}, "HTX_DATA_DIR: "),
        ({"HTX_CONFIG": "/nowhere/htx.toml"}, "HTX_CONFIG: there is no file /nowhere/htx.toml"),
        ({"HTX_CONFIG": "BROKEN"}, "HTX_CONFIG: "),
        ({"HTX_DATABASE_URL": "postgresql://us:hunter2@db/ours"}, "HTX_DATABASE_URL must begin with sqlite+aiosqlite"),
        ({"HTX_DATABASE_URL": "mysql://us:hunter2@db/ours"}, "HTX_DATABASE_URL must begin with sqlite+aiosqlite"),
        ({"HTX_DATABASE_URL": "nonsense"}, "HTX_DATABASE_URL must begin with sqlite+aiosqlite"),
    ],
)
def test_a_bad_setting_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, str], sentence: str
) -> None:
    """A setting that cannot be used is named in a sentence, with status 1, and without the secrets in it."""
    broken = tmp_path / "broken"
    broken.write_text("= {")
    monkeypatch.setattr("sys.argv", ["controlplane", "settings"])
    for name, value in settings.items():
        monkeypatch.setenv(name, value.replace("BROKEN", str(broken)))
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value).startswith(f"controlplane: {sentence}")
    assert len(str(ended.value).splitlines()) == 1
    assert "hunter2" not in str(ended.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"HTX_CATALOG": "/nowhere/catalog.toml"}, "/nowhere/catalog.toml: cannot be read: No such file or directory"),
        ({"HTX_KEY_FILE": "BROKEN"}, "The key file "),
        ({"HTX_DATA_DIR": "/dev/null/data"}, ""),
    ],
)
async def test_a_start_that_fails_is_one_sentence(
    run: Run, tmp_path: Path, settings: dict[str, str], sentence: str
) -> None:
    """What keeps the server from starting is named in a sentence, with status 1."""
    broken = tmp_path / "broken"
    broken.write_text("= {")
    ended = await run("serve", **{name: value.replace("BROKEN", str(broken)) for name, value in settings.items()})
    assert (ended.status, ended.output) == (1, "")
    assert ended.errors.startswith(f"controlplane: {sentence}"), ended.errors
    assert len(ended.errors.splitlines()) == 1, ended.errors


async def test_a_database_that_is_not_there_is_one_sentence(run: Run) -> None:
    """A PostgreSQL that does not answer, and a SQLite file that is none, are told as such."""
    url = f"postgresql+asyncpg://us:hunter2@127.0.0.1:{free_port()}/ours"
    refused, wrong = await asyncio.gather(
        run("migrate", HTX_DATABASE_URL=url),
        run("account", "list", HTX_DATABASE_URL=f"sqlite+aiosqlite:///{BUILT_IN}"),
    )
    for ended in (refused, wrong):
        assert (ended.status, ended.output) == (1, "")
        assert ended.errors.startswith("controlplane: ")
        assert len(ended.errors.splitlines()) == 1, ended.errors
        assert "hunter2" not in ended.errors
    assert "the database cannot be used" in wrong.errors


async def test_migrate_says_that_it_is_done(run: Run, tmp_path: Path) -> None:
    """The schema is made, and that is all that is printed."""
    ended = await run("migrate")
    assert (ended.status, ended.output, ended.errors) == (0, "The schema is up to date.\n", "")
    assert (tmp_path / "data" / "controlplane.db").stat().st_size > 0


@pytest.mark.parametrize("setting", ["HTX_GRPC_PORT", "HTX_METRICS_PORT"])
async def test_a_busy_port_names_its_setting(run: Run, setting: str) -> None:
    """A port that somebody has is named, with the setting that changes it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"HTX_GRPC_PORT": free_port(), "HTX_METRICS_PORT": free_port(), setting: port}
        ended = await run("serve", **ports)
    assert ended.status == 1
    last = ended.errors.splitlines()[-1]
    assert last.startswith("controlplane: ")
    assert str(port) in last
    assert setting in last


@pytest.mark.parametrize("command", ["functions_host", "proxy_host"])
async def test_a_host_loads_nothing_of_the_server(command: str) -> None:
    """A host may be elsewhere and small: of the server's libraries it has only what it calls it by."""
    program = f"import sys, controlplane.cli.{command}; sys.exit('sqlalchemy' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    assert await process.wait() == 0
