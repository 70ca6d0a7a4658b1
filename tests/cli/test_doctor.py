"""`controlplane doctor`, as an operator runs it."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlmodel import select

from controlplane.backups.model import RUNNING
from controlplane.backups.storage import FolderStorage
from controlplane.clock import SystemClock
from controlplane.databases.engines.engine import ClusterUnavailable, Observation
from controlplane.databases.model import DELETED, STOPPED, UPDATING
from controlplane.databases.sweep import STORAGE
from controlplane.doctor import Difference, Doctor, Kind
from controlplane.hosts.kinds import FUNCTIONS
from controlplane.hosts.model import Host
from controlplane.local.postgres import EmbeddedPostgres
from controlplane.reconcile.model import DELETING, FAILED
from controlplane.tables import METADATA
from tests.cli.conftest import Ended, Run, environment
from tests.databases.fake_engine import FakeEngine
from tests.databases.yard import Yard, files_of
from tests.stack import free_port

CLUSTER = "local-postgresql"
SUMMARY = r"looked at (.*), in \d+\.\d s\.\n"


@pytest.fixture
async def yard(storage_url: str, tmp_path: Path, postgres: EmbeddedPostgres) -> AsyncIterator[Yard]:
    """An installation on a storage of either kind, in which all is as it should be.

    Its PostgreSQL has two names, which is no difference.
    """
    async with Yard(storage_url, tmp_path / "backups", postgres) as yard:
        yard.engines[CLUSTER] = yard.engines["pg"]
        await furnish(yard)
        yield yard


@pytest.fixture
def catalog_of_two(catalog: Path, tmp_path: Path) -> Path:
    """A catalogue with another cluster, which does not answer."""
    admin = f"postgresql://admin:hunter2@127.0.0.1:{free_port()}/postgres"
    cluster = f'name = "away"\nengine = "postgresql"\nregion = "elsewhere"\nadmin = "{admin}"\nhost = "h"\nport = 1\n'
    file = tmp_path / "two.toml"
    file.write_text(f"{catalog.read_text()}\n[[clusters]]\n{cluster}")
    return file


async def furnish(yard: Yard) -> None:
    """Add databases that are ready, stopped and deleted, and their backups, all counted; and a host that asks."""
    await yard.add(host("here", last_seen_at=yard.clock.now(), instance="its start"))
    ready, stopped = yard.database(cluster=CLUSTER), yard.database(cluster=CLUSTER, state=STOPPED, stopped=True)
    deleted = yard.database(cluster=CLUSTER, state=DELETED, deleted_at=yard.clock.now())
    await yard.add(ready, stopped, deleted)
    backups = [yard.backup(ready), yard.backup(deleted)]
    await yard.add(*backups)
    yard.write(*files_of(ready, backups[0].id), *files_of(deleted, backups[1].id))
    await yard.appear(ready.object_name, CLUSTER)
    await yard.appear(stopped.object_name, CLUSTER, login=False)
    await execute(yard, COUNT)  # charge what is there


def host(name: str, **values: Any) -> Host:
    """Return the row of a host of functions."""
    return Host(
        id=name, kind=FUNCTIONS, name=name, region="local", secret_digest=name, created_at=SystemClock().now(), **values
    )


COUNT = """
DELETE FROM quota_charges;
DELETE FROM quota_uses;
DELETE FROM cluster_uses;
INSERT INTO quota_charges SELECT id, account_id, 'databases' FROM databases WHERE deleted_at IS NULL;
INSERT INTO quota_charges SELECT b.id, b.account_id, 'backups' FROM backups b JOIN databases d ON d.id = b.database_id
  WHERE d.deleted_at IS NULL;
INSERT INTO quota_uses SELECT account_id, kind, count(*) FROM quota_charges GROUP BY account_id, kind;
INSERT INTO cluster_uses SELECT cluster_target, count(*) FROM databases WHERE deleted_at IS NULL GROUP BY cluster_target
"""


async def execute(yard: Yard, statements: str, **parameters: str) -> None:
    """Change rows by hand."""
    async with yard.store.session() as session:
        for statement in statements.split(";"):
            await session.execute(text(statement), parameters)
        await session.commit()


async def doctor(run: Run, yard: Yard, catalog: Path, **settings: object) -> Ended:
    """Run the command on an installation."""
    backups = yard.folder.as_uri()
    return await run("doctor", HTX_DATABASE_URL=yard.url, HTX_CATALOG=catalog, HTX_BACKUP_URL=backups, **settings)


async def everything(yard: Yard) -> list[Any]:
    """Return all rows, all that is on the cluster, and all files."""
    rows = [await yard.store.fetch(select(table)) for table in METADATA.sorted_tables]  # type: ignore[call-overload]
    files = {path: path.read_bytes() for path in yard.folder.glob("*/*")}
    return [*rows, await yard.there(), files]


async def test_a_healthy_installation(run: Run, yard: Yard, catalog: Path) -> None:
    """Where nothing is wrong the command says so, with what it has looked at, and ends with 0."""
    ended = await doctor(run, yard, catalog)
    assert (ended.status, ended.errors) == (0, ""), ended.output
    said = re.fullmatch(f"All is as it should be: {SUMMARY}", ended.output)
    assert said is not None, ended.output
    assert said[1] == "1 cluster, 2 databases, 2 backups"


async def test_each_difference_is_a_line(run: Run, yard: Yard, catalog_of_two: Path) -> None:
    """Each thing that is wrong is one line below what becomes of it; nothing secret is shown, and nothing changed."""
    lost = yard.database(cluster=CLUSTER)
    let_in = yard.database(cluster=CLUSTER, state=STOPPED, stopped=True)
    elsewhere, nowhere = yard.database(cluster="away"), yard.database(cluster="gone")
    past = SystemClock().now() - timedelta(minutes=1)
    late = yard.database(cluster=CLUSTER, state=DELETING, deadline_at=past, last_error="The cluster is full.")
    failed = yard.database(cluster=CLUSTER, state=FAILED, last_error="It was not done in time.")
    await yard.add(lost, let_in, elsewhere, nowhere, late, failed)
    half = yard.backup(failed)
    broken = yard.backup(failed, verification_error="The backup's manifest was changed.")
    waiting = yard.backup(failed, state=RUNNING, deadline_at=past, waiting_on="cluster away")
    await yard.add(half, broken, waiting)
    await yard.add(host("never"), host("away", last_seen_at=datetime(2026, 1, 31, 12, tzinfo=UTC), used=2))
    for name in (let_in.object_name, elsewhere.object_name, orphan := yard.new_name()):
        await yard.appear(name, CLUSTER)
    left = files_of(yard.new_name(), half.id.replace("bk_0", "bk_1"))[0]
    yard.write(files_of(failed, half.id)[0], *files_of(failed, broken.id), left)
    await execute(yard, COUNT)
    await execute(yard, "UPDATE quota_uses SET used = 1 WHERE kind = 'databases'")
    await execute(yard, "DELETE FROM cluster_uses WHERE cluster = 'away'")
    await execute(yard, "UPDATE quota_charges SET resource_id = 'db_nobody' WHERE resource_id = :id", id=lost.id)
    before = await everything(yard)
    ended = await doctor(run, yard, catalog_of_two)
    assert await everything(yard) == before
    assert (ended.status, ended.errors) == (1, "")
    *lines, summary = ended.output.splitlines(keepends=True)
    said: dict[str, list[tuple[str, ...]]] = {}
    for line in lines:
        if not line.startswith(" ") and line.strip():
            said[heading := line.strip()] = []
        elif line.strip():
            said[heading].append(tuple(re.split("  +", line.strip(), maxsplit=1)))
    unavailable = "The database cluster is not available at the moment; try again later."
    assert said == {
        Kind.UNSEEN: [
            ("away", unavailable),
            ("gone", "it is not in the catalogue, or cannot run here; databases on it: 1"),
        ],
        Kind.ORPHAN: [(STORAGE, left), (CLUSTER, orphan)],
        Kind.STRAY: [(CLUSTER, f"{elsewhere.object_name} is to be on away")],
        Kind.LOST: [
            (lost.id, f"it is not on {CLUSTER}, or its user is not"),
            (let_in.id, "it is stopped, but its user can log in"),
        ],
        Kind.NO_FILE: [(half.id, files_of(failed, half.id)[1])],
        Kind.NO_RESTORE: [(broken.id, "The backup's manifest was changed.")],
        Kind.AWAY: [("away", "it asked last at 2026-01-31 12:00:00 UTC"), ("never", "it has never asked")],
        Kind.COUNT: [
            ("quota_uses", "ac_1 databases: 1 counted, 8 there"),
            ("cluster_uses", "away: 0 counted, 1 there"),
            ("hosts", "away: 2 counted, 0 there"),
            ("db_nobody", "charged and not there"),
            (lost.id, "there and not charged"),
        ],
        Kind.LATE: [(late.id, "deleting: The cluster is full."), (waiting.id, "running: it waits for cluster away")],
        Kind.FAILED: [(failed.id, "It was not done in time.")],
    }
    assert re.fullmatch(f"19 differences: {SUMMARY}", summary), summary
    assert "2 clusters, 8 databases, 4 backups" in summary
    assert "hunter2" not in ended.output


async def test_what_is_under_way_is_no_difference(yard: Yard) -> None:
    """What is ordered, deleted or written while the command looks does not show as a difference."""
    changed, deleted = yard.database(cluster="fake"), yard.database(cluster="fake")
    await yard.add(changed, deleted)
    written, removed = yard.backup(changed), yard.backup(changed)
    await yard.add(written, removed)
    await execute(yard, COUNT)

    class Meanwhile(FakeEngine):
        async def observe(self, name: str) -> Observation | None:
            if name == changed.object_name:
                await yard.change(changed, state=UPDATING, generation=2)
            else:
                await yard.change(deleted, state=DELETING, generation=2)
            yard.write(*files_of(changed, written.id))
            return None

    class Removing(FolderStorage):
        async def exists(self, name: str) -> bool:
            if removed.id in name:
                await yard.change(removed, state=DELETING, generation=2)
            return await super().exists(name)

    yard.engines["fake"], yard.files = Meanwhile(), Removing(yard.folder)
    assert await examined(yard) == []


async def test_a_cluster_that_falls_silent_is_told_once(yard: Yard) -> None:
    """A cluster that stops to answer in the midst of it is one line, and is not asked for each of its databases."""
    rows = [yard.database(cluster="fake") for _ in range(50)]
    await yard.add(*rows)
    await execute(yard, COUNT)
    yard.fake.failure = ClusterUnavailable("It is away.")
    assert await examined(yard) == [Difference(Kind.UNSEEN, "fake", "It is away.")]
    assert 1 <= len(yard.fake.calls) <= 4


async def examined(yard: Yard) -> list[Difference]:
    """Return what is wrong, as the server's own parts see it."""
    told: list[int] = []
    doctor = Doctor(store=yard.store, engines=yard.engines, storage=yard.files, progress=told.append)
    found = [each async for each in doctor.differences(now=yard.clock.now())]
    assert told == sorted(told)
    assert told[-1] <= sum((await doctor.count()).values()) + 1
    return found


async def test_progress_is_told(yard: Yard, catalog: Path, tmp_path: Path) -> None:
    """If it takes longer, stderr has how far it is, and stdout has the answer alone."""
    program = "from controlplane.cli import doctor, main; doctor._SECONDS_OF_SILENCE = -1; main.main()"
    settings = {"HTX_DATABASE_URL": yard.url, "HTX_CATALOG": catalog, "HTX_BACKUP_URL": yard.folder.as_uri()}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, "doctor"),
        env=environment(tmp_path / "data", **settings),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert errors.decode().splitlines() == ["2 of 4 looked at", "4 of 4 looked at"]
    assert output.startswith(b"All is as it should be")


async def test_an_installation_that_is_not_there(run: Run, yard: Yard, catalog: Path, tmp_path: Path) -> None:
    """Before the first start, and before a migration, the command says so in a sentence and makes nothing."""
    ended = await run("doctor", HTX_CATALOG=catalog)
    file = tmp_path / "data/controlplane.db"
    assert (ended.status, ended.output) == (1, "")
    assert ended.errors == (
        f"controlplane: {file} is not there: start the server first, or set HTX_DATA_DIR to its folder.\n"
    )
    assert not file.parent.exists()
    await execute(yard, "UPDATE alembic_version SET version_num = '0001'")
    ended = await doctor(run, yard, catalog)
    assert (ended.status, ended.output) == (1, "")
    assert ended.errors == (
        "controlplane: The schema of the database is not up to date: run `controlplane migrate` first.\n"
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"HTX_CATALOG": "/nowhere.toml"}, "/nowhere.toml: cannot be read: No such file or directory"),
        ({"HTX_BACKUP_URL": "s3://bucket"}, "HTX_BACKUP_URL names a bucket: set HTX_BACKUP_ACCESS_KEY and"),
        ({"HTX_BACKUP_URL": "ftp://us:hunter2@host/"}, "HTX_BACKUP_URL must be file:///FOLDER or s3://BUCKET/PREFIX"),
        ({"HTX_DATABASE_URL": "REFUSED"}, "[Errno 111] Connect call failed"),
    ],
)
async def test_a_wrong_setting_is_one_sentence(
    run: Run, tmp_path: Path, catalog: Path, settings: dict[str, str], sentence: str
) -> None:
    """What cannot be used is named in a sentence, with status 1, and without the secrets in it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/controlplane.db").touch()
    url = f"postgresql+asyncpg://us:hunter2@127.0.0.1:{free_port()}/ours"
    given = {name: value.replace("REFUSED", url) for name, value in settings.items()}
    ended = await run("doctor", **{"HTX_CATALOG": catalog, **given})
    assert (ended.status, ended.output) == (1, "")
    assert ended.errors.startswith(f"controlplane: {sentence}"), ended.errors
    assert len(ended.errors.splitlines()) == 1
    assert "hunter2" not in ended.errors


async def test_functions_that_cannot_be_run_here(run: Run, yard: Yard, catalog: Path) -> None:
    """Where no host runs functions, the command says what this machine lacks to; it counts as no difference."""
    await execute(yard, "DELETE FROM hosts")
    ended = await doctor(run, yard, catalog, PATH="/nowhere", HTX_FUNCTIONS_UID="1000")
    assert ended.status == 0, ended.output
    assert re.search("^No functions can be run on this machine: ", ended.errors, re.MULTILINE), ended.errors
