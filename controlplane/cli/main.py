"""`controlplane`: start it, migrate it, and look after accounts and the catalogue."""

import asyncio
import os
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

# Before gRPC is loaded anywhere: it looks at these once. Its fork handlers are for programs that fork and go on; we
# start other programs, and it would log a line at each.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# structlog takes rich along where there is one, to colour tracebacks: 5 MB that a server has no use for.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]

import click
import uvloop
from pydantic import ValidationError
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlmodel import col, select

from controlplane import __version__
from controlplane.accounts import admin
from controlplane.accounts.model import Account
from controlplane.audit.log import AuditLog
from controlplane.audit.verify import Verdict, verify
from controlplane.catalog.model import Catalog, CatalogError
from controlplane.clock import SystemClock
from controlplane.databases.clusters import open_clusters
from controlplane.doctor import Difference, Doctor, Kind
from controlplane.edge import write as write_edge
from controlplane.hosts import admin as hosts
from controlplane.hosts.link import LinkError
from controlplane.hosts.model import FUNCTIONS, PROXIES, live_hosts
from controlplane.house import StartError, open_storage
from controlplane.keys import KeyFileError, Keys
from controlplane.local.postgres import EmbeddedPostgresError
from controlplane.migrations import head as newest_revision
from controlplane.migrations import migrate as run_migrations
from controlplane.observe import logs
from controlplane.server import run
from controlplane.settings import Settings
from controlplane.sql import Store

T = TypeVar("T")
_SECONDS_OF_SILENCE = 2.0
_SECRET_SETTINGS = {"backup_secret_key", "database_url", "oidc_client_secret", "valkey_url"}


def main() -> None:
    """Run the command; what an operator can mend is one sentence and exit status 1, not a traceback."""
    try:
        commands(prog_name="controlplane")
    except (
        admin.AccountError,
        CatalogError,
        EmbeddedPostgresError,
        KeyFileError,
        LinkError,
        StartError,
        hosts.HostError,
        OSError,
    ) as error:
        sys.exit(f"controlplane: {error}")
    except SQLAlchemyError as error:
        sys.exit(f"controlplane: the database cannot be used: {error.args[0] if error.args else error}")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="controlplane")
def commands() -> None:
    """The control plane of HTX Cloud, for its operator.

    Settings come from HTX_* variables, or from the TOML file that HTX_CONFIG names; `controlplane settings` lists them.
    """


@commands.command()
def up() -> None:
    """Start everything in the foreground: the database engines, the server and Envoy. Ctrl-C stops all of it."""
    from controlplane.local.supervisor import supervise  # noqa: PLC0415 - `serve` needs none of what it brings

    settings = _settings()
    logs.configure(settings)
    uvloop.run(supervise(settings))


@commands.command()
def serve() -> None:
    """Start the gRPC server alone, for an Envoy that runs elsewhere. SIGTERM stops it in order."""
    settings = _settings()
    logs.configure(settings)
    uvloop.run(run(settings))


@commands.command("functions-host")
def functions_host() -> None:
    """Run customers' functions, as the host whose secret HTX_HOST_SECRET_FILE has. SIGTERM stops it in order."""
    from controlplane.functions.host.host import FunctionHostSettings  # noqa: PLC0415 - the server needs none of it
    from controlplane.functions.host.host import HostError as FunctionHostError  # noqa: PLC0415
    from controlplane.functions.host.host import run as run_functions  # noqa: PLC0415
    from controlplane.functions.host.sandbox import SandboxUnavailable  # noqa: PLC0415

    settings = _settings()
    logs.configure(settings)
    try:
        uvloop.run(
            run_functions(
                FunctionHostSettings(
                    server=settings.control_plane,
                    secret=_host_secret(settings, FUNCTIONS),
                    listen=settings.functions_address,
                    data_dir=settings.functions_dir,
                    metrics_port=settings.functions_metrics_port,
                    uids=settings.functions_uids,
                )
            )
        )
    except (FunctionHostError, SandboxUnavailable) as error:
        raise StartError(str(error)) from None


@commands.command("proxy-host")
def proxy_host() -> None:
    """Carry SOCKS5 proxies, as the host whose secret HTX_HOST_SECRET_FILE has. SIGTERM stops it in order."""
    from controlplane.proxies.host.host import ProxyHostSettings  # noqa: PLC0415 - the server needs none of it
    from controlplane.proxies.host.host import run as run_proxies  # noqa: PLC0415

    settings = _settings()
    logs.configure(settings)
    uvloop.run(
        run_proxies(
            ProxyHostSettings(
                server=settings.control_plane,
                secret=_host_secret(settings, PROXIES),
                hosts=tuple(host.strip() for host in settings.proxy_host.split(",")),
                port=settings.proxy_port,
                metrics_port=settings.proxy_metrics_port,
            )
        )
    )


@commands.command()
def edge() -> None:
    """Write Envoy's configuration for these settings into the run folder, and print its path."""
    click.echo(write_edge(_settings()))


@commands.command()
def migrate() -> None:
    """Bring the schema of the database up to date. `up` and `serve` do it as they start."""
    _with_store(run_migrations)
    click.echo("The schema is up to date.")


@commands.command()
def doctor() -> None:
    """Say where what is there differs from what should be: databases, backups, counters. Nothing is changed.

    It ends with 1 if anything does. What is under way is not counted; the server may be running.
    """
    begun = time.monotonic()
    settings = _settings()
    logs.configure(settings)
    url = make_url(settings.storage_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():  # it would be made now
        raise StartError(f"{url.database} is not there: start the server first, or set HTX_DATA_DIR to its folder.")
    found, looked_at = asyncio.run(_examine(settings))
    for kind in Kind:
        if lines := [each for each in found if each.kind == kind]:
            click.echo(click.style(kind, bold=True))
            width = max(len(each.where) for each in lines)
            for each in lines:
                click.echo(f"    {each.where:<{width}}  {each.what}")
            click.echo()
    number = f"{len(found)} difference{'s' * (len(found) != 1)}" if found else "All is as it should be"
    counted = ", ".join(
        f"{count} {kind if count != 1 else kind.removesuffix('s')}" for kind, count in looked_at.items()
    )
    for problem in asyncio.run(_sandbox_problems(settings)):
        click.echo(f"No functions can be run on this machine: {problem}", err=True)
    click.echo(f"{number}: looked at {counted}, in {time.monotonic() - begun:.1f} s.")
    if found:
        sys.exit(1)


@commands.command()
def settings() -> None:
    """List every setting, its value and what it is for."""
    current = _settings()
    for name, field in Settings.model_fields.items():
        value = getattr(current, name)
        shown = "(set)" if name in _SECRET_SETTINGS and value else "" if value is None else value
        click.echo(f"{click.style(f'HTX_{name.upper()}', bold=True)}={shown}\n    {field.description}")
    click.echo(f"{click.style('HTX_CONFIG', bold=True)}={os.environ.get('HTX_CONFIG', '')}")
    click.echo("    A TOML file with any of these, in lower case and without the prefix; a variable wins over it.")


@commands.group()
def account() -> None:
    """Open, list, change, disable and enable customers' accounts."""


@account.command("create")
@click.option("--email", required=True, help="The address that the customer logs in with.")
@click.option("--plan", help="A plan of the catalogue; its default when not given.")
@click.option("--first-name", help="The holder's first name.")
@click.option("--last-name", help="The holder's last name.")
@click.option("--company-name", help="The company, if it is one.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input instead of asking.")
@click.option("--no-password", is_flag=True, help="Let the provider's own login (OpenID Connect) be the only one.")
def create_account(password_stdin: bool, no_password: bool, **given: str | None) -> None:
    """Open an account."""
    catalog = Catalog.load(_settings().catalog)
    if password_stdin and no_password:
        raise click.UsageError("--password-stdin and --no-password exclude each other.")
    if no_password:
        password = None
    elif password_stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    made = _with_record(
        lambda store, audit: admin.create_account(
            store,
            catalog,
            SystemClock(),
            audit=audit,
            password=password,
            **given,  # type: ignore[arg-type]
        )
    )
    click.echo(f"Opened the account {made.id} for {made.email}, with the plan {made.plan}.")


@account.command("list")
def list_accounts() -> None:
    """List all accounts."""
    accounts = _with_store(admin.list_accounts)
    row = "{:<30} {:<32} {:<12} {:<16} {}"
    click.echo(click.style(row.format("ID", "EMAIL", "PLAN", "OPENED", "DISABLED"), bold=True))
    for entry in accounts:
        opened, disabled = (
            time.strftime("%Y-%m-%d %H:%M") if time else "" for time in (entry.created_at, entry.disabled_at)
        )
        click.echo(row.format(entry.id, entry.email, entry.plan, opened, disabled).rstrip())


@account.command("set-plan")
@click.option("--email", required=True, help="The account's address.")
@click.option("--plan", required=True, help="A plan of the catalogue.")
def set_plan(email: str, plan: str) -> None:
    """Give an account another plan; nothing that it has is taken away."""
    catalog = Catalog.load(_settings().catalog)
    changed = _with_record(lambda store, audit: admin.set_plan(store, catalog, audit=audit, email=email, plan=plan))
    click.echo(f"{changed.email} has the plan {changed.plan} now.")


@account.command("disable")
@click.option("--email", required=True, help="The account's address.")
def disable_account(email: str) -> None:
    """Refuse every token and login of an account from now on; what it has is left alone."""
    changed = _with_record(lambda store, audit: admin.disable(store, SystemClock(), audit=audit, email=email))
    click.echo(f"{changed.email} is disabled.")


@account.command("enable")
@click.option("--email", required=True, help="The account's address.")
def enable_account(email: str) -> None:
    """Let the tokens and logins of a disabled account in again, those that have not ended meanwhile."""
    changed = _with_record(lambda store, audit: admin.enable(store, audit=audit, email=email))
    click.echo(f"{changed.email} is enabled.")


@commands.group()
def host() -> None:
    """Take hosts of functions and of proxies into service, list them, and take them out."""


@host.command("add")
@click.argument("name")
@click.option("--kind", type=click.Choice(hosts.KINDS), required=True, help="What it carries.")
@click.option("--region", help="A region of the catalogue; its default when not given.")
@click.option("--address", default="", help="Where customers reach a host of proxies, as HOST:PORT.")
@click.option("--capacity", default=1000, show_default=True, help="How many proxies it takes.")
def add_host(name: str, kind: str, region: str | None, address: str, capacity: int) -> None:
    """Take a host into service, and print its secret, this once."""
    settings = _settings()
    catalog, keys = Catalog.load(settings.catalog), Keys.load(settings.keys_path)
    made, secret = _with_store(
        lambda store: hosts.add_host(
            store,
            catalog,
            SystemClock(),
            keys,
            kind=kind,
            name=name,
            region=region or catalog.default_region,
            address=address,
            capacity=capacity,
        )
    )
    command = "proxy-host" if kind == PROXIES else "functions-host"
    click.echo(f"{secret}")
    click.echo(
        f"The host {made.name} is in service. Write the line above to a file on it, point HTX_HOST_SECRET_FILE there, "
        f"set HTX_HOST_SERVER, and start `controlplane {command}`.",
        err=True,
    )


@host.command("list")
def list_hosts() -> None:
    """List all hosts, and when each was last heard of."""
    now = SystemClock().now()
    rows = [("NAME", "KIND", "REGION", "ADDRESS", "PROXIES", "SEEN")]
    for each in _with_store(hosts.list_hosts):
        used = f"{each.used} of {each.capacity}" if each.kind == PROXIES else ""
        rows.append((each.name, each.kind, each.region, each.address, used, _since(each.last_seen_at, now)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        click.echo(click.style(line, bold=number == 0))


@host.command("remove")
@click.argument("name")
@click.option("--force", is_flag=True, help="Also if it carries proxies, which have failed then.")
def remove_host(name: str, force: bool) -> None:
    """Take a host out of service at once."""
    removed = _with_store(lambda store: hosts.remove_host(store, SystemClock(), name=name, force=force))
    click.echo(f"The host {removed.name} is out of service.")


@commands.group()
def audit() -> None:
    """Look after the record of who did what."""


@audit.command("verify")
def verify_audit() -> None:
    """Hold each account's record against its chain, and name the first entry of each that is not as it was written.

    Nothing is changed; the server may be running.
    """
    verdict, emails = asyncio.run(_verify(_settings()))
    for broken in verdict.broken:
        whose = broken.account_id or "what belongs to no account"
        known = f" ({emails[broken.account_id]})" if broken.account_id in emails else ""
        click.echo(f"The record of {whose}{known} is broken at entry {broken.sequence}: {broken.reason}.")
    if verdict.broken:
        sys.exit(1)
    click.echo(f"{verdict.entries} entries in {verdict.records} records are whole.")


@commands.group()
def catalog() -> None:
    """Look after the catalogue of plans, SKUs, regions and clusters."""


@catalog.command("check")
@click.argument("file", type=click.Path(path_type=Path))
def check_catalog(file: Path) -> None:
    """Say what is wrong with a catalogue, if anything is."""
    checked = Catalog.load(file)
    click.echo(
        f"{file} is fine: {len(checked.plans)} plans, {len(checked.skus)} SKUs, {len(checked.regions)} regions, "
        f"{len(checked.clusters)} clusters."
    )


async def _examine(settings: Settings) -> tuple[list[Difference], dict[str, int]]:
    """Return what is wrong, and how much was looked at."""
    engines = open_clusters(Catalog.load(settings.catalog), settings)
    storage = open_storage(settings)
    store = Store(settings.storage_url)
    try:
        await _check_schema(store)
        told = time.monotonic()

        def progress(done: int) -> None:
            nonlocal told
            if time.monotonic() - told > _SECONDS_OF_SILENCE:
                told = time.monotonic()
                click.echo(f"{done} of {sum(looked_at.values())} looked at", err=True)

        examination = Doctor(store=store, engines=engines, storage=storage, progress=progress)
        looked_at = await examination.count()
        found = [each async for each in examination.differences(now=SystemClock().now())]
        return found, {"clusters": len(engines), **looked_at}
    finally:
        await store.close()


async def _sandbox_problems(settings: Settings) -> Sequence[str]:
    """Return why this machine cannot run functions safely; nothing if it can, or some host does."""
    from controlplane.local.hosts import look_at_sandbox  # noqa: PLC0415 - of use here alone

    store, clock = Store(settings.storage_url), SystemClock()
    try:
        regions = Catalog.load(settings.catalog).regions
        if any([await live_hosts(store, clock, kind=FUNCTIONS, region=region.name) for region in regions]):
            return ()
    finally:
        await store.close()
    return (await look_at_sandbox(settings)).lacking


async def _verify(settings: Settings) -> tuple[Verdict, dict[str, str]]:
    """Return what holds of the records, and the address of each account whose record does not."""
    keys = settings.keys_path
    url = make_url(settings.storage_url)
    needed = [keys, Path(url.database or "")] if url.get_backend_name() == "sqlite" else [keys]
    for file in needed:
        if not file.exists():  # it would be made now
            raise StartError(f"{file} is not there: what is to be verified?")
    store = Store(settings.storage_url)
    try:
        await _check_schema(store)
        verdict = await verify(store, Keys.load(keys))
        is_broken = col(Account.id).in_([broken.account_id for broken in verdict.broken])
        rows = await store.fetch(select(Account.id, Account.email).where(is_broken))
        return verdict, {row.id: row.email for row in rows}
    finally:
        await store.close()


async def _check_schema(store: Store) -> None:
    """Raise StartError unless the schema is up to date, and leave it as it is."""
    try:
        rows = await store.fetch(text("SELECT version_num FROM alembic_version"))
    except DBAPIError as error:
        if "alembic_version" not in str(error.orig):  # there is no such table
            raise
        rows = []
    if [row.version_num for row in rows] != [newest_revision()]:
        raise StartError("The schema of the database is not up to date: run `controlplane migrate` first.")


def _host_secret(settings: Settings, kind: str) -> str:
    """Return the secret of this machine's host.

    Raises StartError without one.
    """
    file = settings.secret_file(kind)
    if not file.is_file():
        raise StartError(
            f"{file} is not there: make a secret with `controlplane host add NAME --kind {kind}`, write it to a file, "
            "and point HTX_HOST_SECRET_FILE there."
        )
    return file.read_text().strip()


def _since(time: datetime | None, now: datetime) -> str:
    """Return how long ago something was, for people."""
    if time is None:
        return "never"
    seconds = int((now - time).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def _settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        raise StartError("; ".join(_in_words(problem) for problem in error.errors())) from None
    except ValueError as error:
        raise StartError(str(error)) from None


def _in_words(problem: Any) -> str:
    name = "_".join(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"HTX_{name.upper()}: {message}" if name else message


def _with_record(work: Callable[[Store, AuditLog], Coroutine[Any, Any, T]]) -> T:
    """Do something that goes into an account's record."""
    settings = _settings()
    keys = Keys.load(settings.keys_path)
    return _with_store(lambda store: work(store, AuditLog(store=store, keys=keys, clock=SystemClock())))


def _with_store(work: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
    """Do something with an up-to-date database."""

    async def with_store() -> T:
        store = Store(_settings().storage_url)
        try:
            await run_migrations(store)
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(with_store())
