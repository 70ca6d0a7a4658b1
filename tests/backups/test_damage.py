"""Backups that are not what was written: never restored, with a reason that can be read, and nothing stays behind."""

import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from controlplane.local.postgres import EmbeddedPostgres
from tests.backups.rest import (
    DATABASES,
    back_up,
    connection_of,
    delete,
    events_of,
    file_of,
    names_on,
    object_name_of,
    order_restore,
)
from tests.doors import check_nothing_leaked
from tests.stack import Customer, Stack

Damage = Callable[["Kept"], object]


@dataclass(frozen=True)
class Kept:
    """The files of a backup, and those of three others that look alike."""

    customer: Customer
    backup: dict[str, Any]
    sealed: Path
    manifest: Path
    older: tuple[Path, Path]
    neighbours: tuple[Path, Path]
    strangers: tuple[Path, Path]


async def _filled(customer: Customer, name: str) -> str:
    await customer.create_database(name)
    connection = await connection_of(customer, name)
    tenant = await asyncpg.connect(connection["uri"])
    await tenant.execute("CREATE TABLE notes AS SELECT n, sha512(n::text::bytea) AS hash FROM generate_series(1, 50) n")
    await tenant.close()
    object_name: str = connection["database"]
    return object_name


@pytest.fixture(scope="module")
async def kept(stack: Stack) -> AsyncIterator[Kept]:
    """A backup, an older one of the same database, one of another database, and another customer's."""
    customer, stranger = await stack.customer(), await stack.customer()

    def files(name: str, backup: dict[str, Any]) -> tuple[Path, Path]:
        return file_of(stack, name, backup), file_of(stack, name, backup, ".json")

    name = await _filled(customer, "analytics")
    older = files(name, await back_up(customer, "analytics"))
    backup = await back_up(customer, "analytics")
    sealed, manifest = files(name, backup)
    name = await _filled(customer, "other")
    neighbours = files(name, await back_up(customer, "other"))
    name = await _filled(stranger, "analytics")
    strangers = files(name, await back_up(stranger, "analytics"))
    yield Kept(customer, backup, sealed, manifest, older, neighbours, strangers)
    await delete(customer, "analytics")
    await delete(customer, "other")


def _flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def _take_both(kept: Kept, others: tuple[Path, Path]) -> None:
    for mine, theirs in zip((kept.sealed, kept.manifest), others, strict=True):
        shutil.copyfile(theirs, mine)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a bit of the file": (
        lambda kept: _flip(kept.sealed, kept.sealed.stat().st_size // 2),
        "The backup was changed, or it is another one.",
    ),
    "a bit of the manifest": (
        lambda kept: _flip(kept.manifest, kept.manifest.stat().st_size // 2),
        "The backup's manifest was changed.",
    ),
    "the file is cut off": (
        lambda kept: kept.sealed.write_bytes(kept.sealed.read_bytes()[:-100]),
        "The backup is cut off.",
    ),
    "the file is an older one": (
        lambda kept: shutil.copyfile(kept.older[0], kept.sealed),
        "The backup was changed, or it is another one.",
    ),
    "both files are another database's": (
        lambda kept: _take_both(kept, kept.neighbours),
        "The manifest is another backup's.",
    ),
    "the file is another customer's": (
        lambda kept: shutil.copyfile(kept.strangers[0], kept.sealed),
        "The backup was changed, or it is another one.",
    ),
    "both files are another customer's": (
        lambda kept: _take_both(kept, kept.strangers),
        "The manifest is another backup's.",
    ),
    "the file is gone": (lambda kept: kept.sealed.unlink(), "The backup's file is not there any more."),
    "the manifest is gone": (lambda kept: kept.manifest.unlink(), "The backup's file is not there any more."),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_backup_is_not_restored(
    stack: Stack, kept: Kept, postgres: EmbeddedPostgres, damage: str
) -> None:
    """The new database has failed with the reason, nobody gets in, and once it is deleted nothing is left of it."""
    do_damage, reason = DAMAGES[damage]
    content = {file: file.read_bytes() for file in (kept.sealed, kept.manifest)}
    try:
        do_damage(kept)
        ordered = await order_restore(kept.customer, kept.backup, "copy")
        object_name = await object_name_of(stack, ordered)
        failed = await kept.customer.until("failed", f"{DATABASES}/copy")
    finally:
        for file, before in content.items():
            file.write_bytes(before)
    assert failed["progress"]["last_error"] == f"The backup cannot be restored: {reason}"
    check_nothing_leaked(failed["progress"]["last_error"])
    told = [each for each in await events_of(kept.customer, "database.failed") if each["resource_id"] == ordered["id"]]
    assert [event["detail"] for event in told] == [failed["progress"]["last_error"]]
    refused = await kept.customer.call("GET", f"{DATABASES}/copy/connection")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    await delete(kept.customer, "copy")
    assert await names_on(postgres, object_name) == []


async def test_a_failed_restore_can_be_tried_again(kept: Kept) -> None:
    """A retry fails for as long as the damage lasts; once the file is put back, the database is whole and his."""
    content = kept.sealed.read_bytes()
    _flip(kept.sealed, -1)
    await order_restore(kept.customer, kept.backup, "copy")
    path = f"{DATABASES}/copy"
    before = await kept.customer.until("failed", path)
    assert (await kept.customer.call("POST", f"{path}/retry")).json()["status"] == "restoring"
    again = await kept.customer.until("failed", path)
    assert again["generation"] == before["generation"] + 1
    kept.sealed.write_bytes(content)
    await kept.customer.call("POST", f"{path}/retry")
    ready = await kept.customer.until("ready", path)
    assert "progress" not in ready
    tenant = await asyncpg.connect((await connection_of(kept.customer, "copy"))["uri"])
    assert await tenant.fetchval("SELECT count(*) FROM notes WHERE hash = sha512(n::text::bytea)") == 50
    await tenant.close()
    await delete(kept.customer, "copy")
