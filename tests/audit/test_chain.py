"""The chain: it is only ever added to, and shows whatever was done to it behind the server's back."""

import asyncio
import base64
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from controlplane.audit.verify import Broken, Verdict, verify
from controlplane.keys import Keys
from tests.audit.conftest import Book, execute, record_of, tamper
from tests.stack import Customer, Stack

# Of each record, by the name of its account: what is done to it, and which entry is broken then, and why.
TAMPERED: dict[str, tuple[list[str], int, str]] = {
    "outcome changed": (["UPDATE audit_entries SET outcome = 'not_found' WHERE {} AND sequence = 3"], 3, "changed"),
    "address emptied": (["UPDATE audit_entries SET ip = '' WHERE {} AND sequence = 1"], 1, "changed"),
    "digest changed": (["UPDATE audit_entries SET digest = 'k1:00' WHERE {} AND sequence = 5"], 5, "changed"),
    "one deleted": (["DELETE FROM audit_entries WHERE {} AND sequence = 3"], 3, "it is missing"),
    "first deleted": (["DELETE FROM audit_entries WHERE {} AND sequence = 1"], 1, "it is missing"),
    "end cut off": (["DELETE FROM audit_entries WHERE {} AND sequence > 3"], 4, "missing at the end"),
    "all deleted": (["DELETE FROM audit_entries WHERE {}"], 1, "missing at the end"),
    "gap closed": (
        [
            "DELETE FROM audit_entries WHERE {} AND sequence = 3",
            "UPDATE audit_entries SET sequence = 3 WHERE {} AND sequence = 4",
            "UPDATE audit_entries SET sequence = 4 WHERE {} AND sequence = 5",
            "UPDATE audit_heads SET sequence = 4 WHERE {}",
        ],
        3,
        "changed",
    ),
    "two exchanged": (
        [
            "UPDATE audit_entries SET sequence = 9 WHERE {} AND sequence = 2",
            "UPDATE audit_entries SET sequence = 2 WHERE {} AND sequence = 3",
            "UPDATE audit_entries SET sequence = 3 WHERE {} AND sequence = 9",
        ],
        2,
        "changed",
    ),
    "one forged": (
        [
            "CREATE TABLE forged AS SELECT * FROM audit_entries WHERE {} AND sequence = 5",
            "UPDATE forged SET sequence = 6",
            "INSERT INTO audit_entries SELECT * FROM forged",
        ],
        6,
        "changed",
    ),
    "head digest changed": (["UPDATE audit_heads SET digest = 'k1:00' WHERE {}"], 5, "head"),
    "head put back": (["UPDATE audit_heads SET sequence = 4 WHERE {}"], 5, "head"),
    "head deleted": (["DELETE FROM audit_heads WHERE {}"], 5, "head"),
}


@pytest.fixture
async def written(book: Book) -> Book:
    """A book in which two accounts have five entries each."""
    for _ in range(5):
        for account_id in ("ac_1", "ac_2"):
            await book.write(account_id)
    return book


async def test_the_database_refuses_what_is_no_addition(written: Book) -> None:
    """No statement changes or removes an entry, whoever sends it."""
    everything = text("SELECT * FROM audit_entries ORDER BY account_id, sequence")
    before = await written.store.fetch(everything)
    again = "INSERT INTO audit_entries SELECT * FROM audit_entries WHERE sequence = 5"
    for statement in (
        "UPDATE audit_entries SET outcome = 'forged'",
        "UPDATE audit_entries SET count = 2 WHERE account_id = 'ac_1' AND sequence = 5",
        "DELETE FROM audit_entries",
        "DELETE FROM audit_entries WHERE account_id = 'ac_1' AND sequence = 5",
        f"{again} ON CONFLICT (account_id, sequence) DO UPDATE SET outcome = 'forged'",
        again.replace("INSERT", "REPLACE") if written.store.is_sqlite else "TRUNCATE audit_entries",
    ):
        with pytest.raises(DBAPIError, match="the record is only ever added to"):
            await execute(written.store, statement)
    assert await written.store.fetch(everything) == before


async def test_what_was_written_is_whole(written: Book) -> None:
    """Untouched records are whole."""
    assert await written.verify() == Verdict(entries=10, records=2, broken=())


async def test_the_first_broken_entry_is_named(book: Book) -> None:
    """Of each record that was changed, cut, reordered or added to, the first entry that does not hold is named."""
    for account_id in ("untouched", *TAMPERED):
        for _ in range(5):
            await book.write(account_id)
    await tamper(
        book.store,
        *(
            statement.format(f"account_id = '{account_id}'")
            for account_id, (statements, _, _) in TAMPERED.items()
            for statement in statements
        ),
    )
    broken = {each.account_id: each for each in (await book.verify()).broken}
    assert set(broken) == set(TAMPERED)
    for account_id, (_, sequence, reason) in TAMPERED.items():
        assert broken[account_id].sequence == sequence, account_id
        assert reason in broken[account_id].reason, account_id


async def test_entries_of_two_accounts_are_not_exchanged(written: Book) -> None:
    """An entry moved to another account's record breaks both."""
    await tamper(
        written.store,
        "UPDATE audit_entries SET account_id = 'aside' WHERE account_id = 'ac_1' AND sequence = 3",
        "UPDATE audit_entries SET account_id = 'ac_1' WHERE account_id = 'ac_2' AND sequence = 3",
        "UPDATE audit_entries SET account_id = 'ac_2' WHERE account_id = 'aside'",
    )
    broken = (await written.verify()).broken
    assert [(each.account_id, each.sequence) for each in broken] == [("ac_1", 3), ("ac_2", 3)]


async def test_a_new_key_follows_the_old_ones(written: Book) -> None:
    """After a rotation of the keys old entries hold as long as their key is kept, and new ones follow them."""
    rotated = Keys(mac={"k2": base64.b64encode(bytes(32)).decode(), **written.keys.mac}, seal=written.keys.seal)
    written.log._keys = rotated  # noqa: SLF001 - the server that starts anew with them
    await written.write("ac_1")
    digests = await written.store.fetch(text("SELECT digest FROM audit_entries WHERE account_id = 'ac_1'"))
    assert {row.digest.partition(":")[0] for row in digests} == {"k1", "k2"}
    assert (await verify(written.store, rotated)).broken == ()
    forgotten = Keys(mac={"k2": rotated.mac["k2"]}, seal=rotated.seal)
    assert [each.sequence for each in (await verify(written.store, forgotten)).broken] == [1, 1]


async def test_long_records_are_read_in_pages(book: Book) -> None:
    """A record of several pages is whole to its last entry, and a forged one right behind a page is found."""
    for number in range(2000):
        book.refuse(target=f"db-{number % 1000}")
        if number % 1000 == 999:
            await book.log.flush()
    assert await book.verify() == Verdict(entries=2000, records=1, broken=())
    await execute(
        book.store,
        "CREATE TABLE forged AS SELECT * FROM audit_entries WHERE sequence = 2000",
        "UPDATE forged SET sequence = 2001",
        "INSERT INTO audit_entries SELECT * FROM forged",
    )
    (broken,) = (await book.verify()).broken
    assert broken == Broken("", 2001, "it was changed, or does not follow the one before")


async def test_a_record_is_verified_while_it_grows(book: Book) -> None:
    """Entries that are added while the record is read break nothing."""

    async def grow() -> None:
        for _ in range(60):
            await book.write("ac_1")

    growing = asyncio.create_task(grow())
    verdicts = []
    while not growing.done():
        verdicts.append(await book.verify())
        await asyncio.sleep(0)
    await growing
    verdicts.append(await book.verify())
    assert [verdict.broken for verdict in verdicts] == [()] * len(verdicts)
    assert (verdicts[-1].entries, len({verdict.entries for verdict in verdicts}) > 1) == (60, True)


async def test_a_rollback_leaves_no_gap(book: Book) -> None:
    """What was not committed takes no place: the next entry has it."""
    await book.write("ac_1")
    async with book.store.session() as session:
        gone: Any = await book.log.add(
            session, account_id="ac_1", action="a.b", outcome="ok", actor="token", credential=None
        )
        await session.rollback()
    await book.write("ac_1")
    verdict = await book.verify()
    assert (gone.sequence, verdict.entries, verdict.broken) == (2, 2, ())


async def test_parallel_changes_make_one_chain(stack: Stack, customer: Customer) -> None:
    """Two hundred changes of one account at once are two hundred entries in one order, without a gap or a fork."""
    before = await record_of(customer)
    changes = (customer.by_login("POST", "/api/portal/tokens", json={"name": f"t-{n}"}) for n in range(200))
    answers = await asyncio.gather(*changes)
    assert {answer.status_code for answer in answers} == {201}
    entries = (await record_of(customer))[len(before) :]
    assert [entry["sequence"] for entry in entries] == [len(before) + n for n in range(1, 201)]
    assert {entry["request_id"] for entry in entries} == {answer.headers["x-request-id"] for answer in answers}
    verdict = await verify(stack.server.store, stack.server.keys)
    assert verdict.broken == ()
    assert verdict.entries >= 200
