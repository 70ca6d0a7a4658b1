"""How far a backup is, while it is written."""

from datetime import timedelta

import asyncpg
import pytest

from controlplane.backups import provisioner, vault
from tests.backups.rest import DATABASES, connection_of, path_of
from tests.stack import Customer, eventually


async def test_the_size_grows(customer: Customer, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a large backup is written its size grows, and in the end it is the file's."""
    monkeypatch.setattr(provisioner, "_TELL_EVERY", timedelta(0))
    await customer.create_database("analytics")
    tenant = await asyncpg.connect((await connection_of(customer, "analytics"))["uri"])
    await tenant.execute(
        "CREATE TABLE large AS SELECT n, (SELECT string_agg(sha512((n * 100 + m)::text::bytea), '')"
        " FROM generate_series(1, 100) m) AS noise FROM generate_series(1, 4000) n"
    )
    await tenant.close()
    backup = (await customer.call("POST", f"{DATABASES}/analytics/backups")).json()
    sizes = []
    while backup["status"] == "running":
        if "size_bytes" in backup:
            sizes.append(backup["size_bytes"])
        backup = (await customer.call("GET", path_of(backup))).json()
    assert backup["status"] == "completed"
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 3
    assert 0 < sizes[0] < sizes[-1] <= backup["size_bytes"]
    assert backup["size_bytes"] > 4000 * 6400


async def test_a_silent_dump_is_given_up(customer: Customer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dump of which nothing comes for too long makes room for others, and is tried again."""
    monkeypatch.setattr(vault, "_LONGEST_SILENCE", 0.5)
    await customer.create_database("analytics")
    tenant = await asyncpg.connect((await connection_of(customer, "analytics"))["uri"])
    await tenant.execute("CREATE TABLE notes (text TEXT)")
    async with tenant.transaction():
        await tenant.execute("LOCK TABLE notes IN ACCESS EXCLUSIVE MODE")
        backup = (await customer.call("POST", f"{DATABASES}/analytics/backups")).json()

        async def given_up() -> bool:
            progress = (await customer.call("GET", path_of(backup))).json()["progress"]
            return "stopped in the middle" in progress.get("last_error", "")

        assert await eventually(given_up)
    monkeypatch.undo()
    await tenant.close()
    await customer.until("completed", path_of(backup))
