"""Backups in a bucket, over REST: written, restored, found damaged and removed."""

from pathlib import Path

import asyncpg

from controlplane.backups.storage import storage_at
from tests.backups.rest import DATABASES, back_up, connection_of, delete, order_restore, path_of, restore
from tests.backups.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed
from tests.stack import Stack


async def test_a_backup_in_a_bucket(folder: Path, catalog: Path, seaweed: Seaweed) -> None:
    """A stack whose storage is a bucket keeps its backups there, restores what is whole, and removes what it should."""
    url = seaweed.url("of/the/stack")
    bucket = storage_at(url, access_key=ACCESS_KEY, secret_key=SECRET_KEY)
    async with Stack(
        folder / "bucket", catalog=catalog, backup_url=url, backup_access_key=ACCESS_KEY, backup_secret_key=SECRET_KEY
    ) as stack:
        customer = await stack.customer()
        await customer.create_database("analytics")
        connection = await connection_of(customer, "analytics")
        tenant = await asyncpg.connect(connection["uri"])
        # More than one part of an upload.
        await tenant.execute(
            "CREATE TABLE large AS SELECT n, (SELECT string_agg(sha512((n * 100 + m)::text::bytea), '')"
            " FROM generate_series(1, 100) m) AS noise FROM generate_series(1, 1000) n"
        )
        count = "SELECT count(*), md5(string_agg(noise, '' ORDER BY n)) FROM large"
        before = await tenant.fetchrow(count)
        await tenant.close()
        backup = await back_up(customer, "analytics")
        files = [f"{connection['database']}/{backup['id']}{suffix}" for suffix in (".htxb", ".json")]
        assert await bucket.list() == files
        assert backup["size_bytes"] == len(b"".join([piece async for piece in bucket.read(files[0])])) > 6_400_000
        await restore(customer, backup, "copy")
        tenant = await asyncpg.connect((await connection_of(customer, "copy"))["uri"])
        assert await tenant.fetchrow(count) == before
        await tenant.close()
        await bucket.remove(files[0])
        await order_restore(customer, backup, "late")
        failed = await customer.until("failed", f"{DATABASES}/late")
        assert failed["progress"]["last_error"] == (
            "The backup cannot be restored: The backup's file is not there any more."
        )
        await customer.call("DELETE", path_of(backup))
        await customer.until("gone", path_of(backup))
        assert await bucket.list() == []
        await delete(customer, "analytics")
        assert not (folder / "bucket/backups").exists()
