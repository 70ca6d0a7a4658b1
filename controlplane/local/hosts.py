"""This machine's own hosts of proxies and functions: `controlplane up` takes them into service by itself."""

import os
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import update
from sqlmodel import col

from controlplane.access.secrets import new_host_secret
from controlplane.catalog.model import Catalog
from controlplane.clock import SystemClock
from controlplane.functions.host.sandbox import Sandbox, SandboxUnavailable
from controlplane.hosts.admin import add_host
from controlplane.hosts.model import Host
from controlplane.keys import Keys
from controlplane.settings import Settings
from controlplane.sql import Store


async def ensure_own_host(settings: Settings, catalog: Catalog, *, kind: str, address: str = "") -> None:
    """Take this machine's host of a kind into service, unless it is, and let it know its secret.

    The secret is made anew at each start: so it need not be known whether the file and the database still fit together.
    """
    store, keys = Store(settings.storage_url), Keys.load(settings.keys_path)
    name = f"local-{kind}"
    try:
        async with store.session() as session:
            secret = new_host_secret()
            known = (
                update(Host).where(col(Host.name) == name).values(secret_digest=keys.digest(secret), address=address)
            )
            found = (await session.scalars(known.returning(col(Host.id)))).first()
            await session.commit()
        if found is None:
            _, secret = await add_host(
                store,
                catalog,
                SystemClock(),
                keys,
                kind=kind,
                name=name,
                region=catalog.default_region,
                address=address,
            )
    finally:
        await store.close()
    _write(settings.secret_file(kind), secret)


@dataclass(frozen=True, slots=True)
class FunctionsHere:
    """Which runtimes of functions this machine has, or, if none can be run safely, what it lacks."""

    runtimes: tuple[str, ...]
    lacking: tuple[str, ...] = ()


async def look_at_sandbox(settings: Settings) -> FunctionsHere:
    """Return whether this machine can run functions."""
    try:
        sandbox = Sandbox.open(settings.functions_dir, settings.functions_uids)
    except SandboxUnavailable as error:
        return FunctionsHere((), tuple(error.problems))
    try:
        problems = await sandbox.check()
    finally:
        await sandbox.close()
    return FunctionsHere((), tuple(problems)) if problems else FunctionsHere(tuple(sandbox.runtimes))


def _write(file: Path, secret: str) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as out:
        out.write(f"{secret}\n")
