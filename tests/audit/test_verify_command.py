"""`controlplane audit verify`, as an operator runs it."""

from pathlib import Path

import pytest
from sqlalchemy import text

from controlplane.accounts.model import Account
from controlplane.audit.model import PROVIDER
from tests.audit.conftest import Book, tamper
from tests.cli import conftest as cli
from tests.cli.conftest import Ended, Run

run = cli.run


@pytest.fixture
async def book(book: Book) -> Book:
    """A book with entries of an account that there is, of one that there is not, and of none."""
    async with book.store.session() as session:
        session.add(
            Account(id="ac_1", email="ann@example.com", password_hash="", plan="roomy", created_at=book.clock.now())
        )
        await session.commit()
    for account_id in ("ac_1", "ac_1", "ac_2", PROVIDER):
        await book.write(account_id)
    return book


async def verify(run: Run, book: Book) -> Ended:
    """Run the command on a book."""
    return await run("audit", "verify", HTX_DATABASE_URL=book.url, HTX_KEY_FILE=book.key_file)


async def test_whole_records_are_counted(run: Run, book: Book) -> None:
    """When everything holds the command says how much that is, and ends with 0."""
    ended = await verify(run, book)
    assert (ended.status, ended.output, ended.errors) == (0, "4 entries in 3 records are whole.\n", "")


async def test_broken_records_are_named(run: Run, book: Book) -> None:
    """Each broken record is a line with the account, its address, the entry and the reason; it ends with 1."""
    await tamper(
        book.store,
        "UPDATE audit_entries SET outcome = 'not_found' WHERE account_id = 'ac_1' AND sequence = 2",
        "DELETE FROM audit_entries WHERE account_id <> 'ac_1'",
    )
    ended = await verify(run, book)
    assert (ended.status, ended.errors) == (1, "")
    assert ended.output.splitlines() == [
        "The record of what belongs to no account is broken at entry 1: it is missing at the end.",
        "The record of ac_1 (ann@example.com) is broken at entry 2: it was changed, or does not follow the one before.",
        "The record of ac_2 is broken at entry 1: it is missing at the end.",
    ]


async def test_what_an_operator_did_is_in_it(run: Run, tmp_path: Path) -> None:
    """The command finds the keys and the database of the data folder by itself, and leaves them as they are."""
    opened = await run(
        "account", "create", "--email", "ann@example.com", "--password-stdin", stdin="correct horse battery\n"
    )
    assert opened.status == 0, opened.errors
    before = _bytes(tmp_path / "data")
    ended = await run("audit", "verify")
    assert (ended.status, ended.output) == (0, "1 entries in 1 records are whole.\n")
    assert _bytes(tmp_path / "data") == before


async def test_where_there_is_nothing_nothing_is_made(run: Run, tmp_path: Path) -> None:
    """Without keys or a database the command says which is missing, and makes neither."""
    without_keys = await run("audit", "verify")
    assert without_keys.errors == f"controlplane: {tmp_path}/data/keys.json is not there: what is to be verified?\n"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "keys.json").write_text("{}")
    without_database = await run("audit", "verify")
    assert f"{tmp_path}/data/controlplane.db is not there" in without_database.errors
    assert (without_keys.status, without_database.status) == (1, 1)
    assert list(_bytes(tmp_path / "data")) == ["keys.json"]


async def test_an_old_schema_is_left_as_it_is(run: Run, book: Book) -> None:
    """A database that was not migrated, or not to the end, is told in a sentence and is not migrated."""
    for statement in ("UPDATE alembic_version SET version_num = '0001'", "DROP TABLE alembic_version"):
        async with book.store.engine.begin() as connection:
            await connection.execute(text(statement))
        ended = await verify(run, book)
        assert (ended.status, ended.output) == (1, "")
        assert ended.errors == (
            "controlplane: The schema of the database is not up to date: run `controlplane migrate` first.\n"
        )


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
