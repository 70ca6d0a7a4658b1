"""What is true of an installation whenever it is at rest, however often its server was killed before."""

import hashlib
from collections import Counter
from pathlib import Path

from controlplane.databases.names import prefix_of_ours
from tests.faults.installation import Installation, Row

_COMPLETED = "completed"


async def check(installation: Installation) -> None:
    """Raise AssertionError for a thing without a row, a row without its thing, or a count that is not what it counts.

    Things are databases and users on clusters, files of backups, charges of the quota and places on clusters. What a
    row has promised is not looked at: its owner knows (`transitions.py`).
    """
    databases = await installation.rows("databases")
    there = [row for row in databases if row["deleted_at"] is None]
    backups = await installation.rows("backups")
    await _check_clusters(installation, there)
    _check_files(installation.folder / "backups", databases, backups)
    ids = {row["id"] for row in there}
    await _check_charges(installation, there, [row for row in backups if row["database_id"] in ids])


async def _check_clusters(installation: Installation, there: list[Row]) -> None:
    prefix = await prefix_of_ours(installation.store)
    for engine, cluster in installation.clusters.items():
        wanted = {row["object_name"] for row in there if row["engine"] == engine}
        found = await cluster.driver.names(prefix)
        assert found == wanted, f"on {engine}: too many {found - wanted}, too few {wanted - found}"


def _check_files(folder: Path, databases: list[Row], backups: list[Row]) -> None:
    """Compare the files with the rows. A write that was cut short may have left its part, for as long as its row."""
    names = {row["id"]: row["object_name"] for row in databases}
    wanted = {
        f"{names[row['database_id']]}/{row['id']}{suffix}": row for row in backups for suffix in (".htxb", ".json")
    }
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if not path.is_dir()}
    parts = {name for name in found if name.endswith(".part")}
    assert found.keys() - parts == wanted.keys(), (
        f"files: too many {found.keys() - parts - wanted.keys()}, too few {wanted.keys() - found.keys()}"
    )
    owners = {name.removesuffix(".htxb") for name in wanted}
    assert all(name.partition(".")[0] in owners for name in parts), f"of no backup: {parts}"
    folders = {path.name for path in folder.rglob("*") if path.is_dir()}
    assert folders <= {name.partition("/")[0] for name in wanted}, f"empty folders: {folders}"
    for name, row in wanted.items():
        assert row["state"] == _COMPLETED
        if name.endswith(".htxb"):
            kept = found[name].read_bytes()
            assert (len(kept), hashlib.sha256(kept).hexdigest()) == (row["size_bytes"], row["sha256"])


async def _check_charges(installation: Installation, databases: list[Row], backups: list[Row]) -> None:
    charges = {row["resource_id"]: row["kind"] for row in await installation.rows("quota_charges")}
    assert charges == {row["id"]: "databases" for row in databases} | {row["id"]: "backups" for row in backups}
    uses = {row["kind"]: row["used"] for row in await installation.rows("quota_uses") if row["used"]}
    assert uses == Counter(charges.values())
    places = {row["cluster"]: row["used"] for row in await installation.rows("cluster_uses") if row["used"]}
    assert places == Counter(row["cluster_target"] for row in databases)
