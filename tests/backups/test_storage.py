"""Where backups are kept: a folder and a bucket, which do the same."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from controlplane.backups.storage import BackupStorage, FolderStorage, Written, storage_at
from tests.backups.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed
from tests.backups.stored import MEGABYTE, NAME, content, stream


@pytest.fixture
def bucket(seaweed: Seaweed, tmp_path: Path) -> BackupStorage:
    """A bucket, below a prefix of the test's own."""
    return storage_at(seaweed.url(f"{tmp_path.name}/deep"), access_key=ACCESS_KEY, secret_key=SECRET_KEY)


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> BackupStorage:
    """Each of the two kinds of storage in turn, empty."""
    if request.param == "folder":
        return storage_at((tmp_path / "deep" / "backups").as_uri())
    made: BackupStorage = request.getfixturevalue("bucket")
    return made


class Endless:
    """A stream that does not end; it tells when somebody reads it, and when it was ended from outside."""

    def __init__(self, error: Exception | None = None) -> None:
        self.read = asyncio.Event()
        self.ended = asyncio.Event()
        self._error = error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for _ in range(20):  # more than a part of an upload
                yield os.urandom(MEGABYTE)
            self.read.set()
            if self._error:
                raise self._error
            await asyncio.Event().wait()
        finally:
            self.ended.set()


@pytest.mark.parametrize("sizes", [[], [0], [1], [5, 0, 7], [MEGABYTE] * 37])
async def test_what_is_written_is_read(storage: BackupStorage, sizes: list[int]) -> None:
    """A stream of any length comes back as it was, in pieces, and its size and digest are told."""
    chunks = [os.urandom(size) for size in sizes]
    plain = b"".join(chunks)
    written = await storage.write(NAME, stream(*chunks))
    assert written == Written(size_bytes=len(plain), sha256=hashlib.sha256(plain).hexdigest())
    pieces = [piece async for piece in storage.read(NAME)]
    assert b"".join(pieces) == plain
    assert all(len(piece) <= 4 * MEGABYTE for piece in pieces)


async def test_a_file_is_replaced_whole(storage: BackupStorage) -> None:
    """What is written under a name that is taken stands there alone."""
    await storage.write(NAME, stream(b"longer than the next"))
    await storage.write(NAME, stream(b"short"))
    assert await content(storage) == b"short"
    assert await storage.list() == [NAME]


async def test_what_is_not_there(storage: BackupStorage) -> None:
    """An empty storage has no files, cannot be read, and has nothing against removing."""
    if not isinstance(storage, FolderStorage):
        await storage.write(NAME, stream(b"makes the bucket"))
        await storage.remove(NAME)
    assert await storage.list() == []
    assert await storage.list("db_1/") == []
    assert not await storage.exists(NAME)
    await storage.remove(NAME)
    await storage.remove("db_1/")
    await storage.sweep(before=datetime.now(UTC))
    with pytest.raises(FileNotFoundError):
        await content(storage)


async def test_files_are_listed_by_folder(storage: BackupStorage) -> None:
    """A folder's files are listed in their order, and those of a folder whose name only begins the same are not."""
    names = ["db_1/bk_1.htxb", "db_1/bk_1.json", "db_1/bk_2.htxb", "db_10/bk_3.htxb", "db_2/bk_4.json"]
    for name in reversed(names):
        await storage.write(name, stream(name.encode()))
    assert await storage.list() == names
    assert await storage.list("db_1/") == names[:3]
    assert [await storage.exists(name) for name in names] == [True] * 5
    assert not await storage.exists("db_1/bk_1")


async def test_files_are_removed(storage: BackupStorage) -> None:
    """A file is removed alone, a folder with all of its own, and neither touches what is named like it."""
    names = ["db_1/bk_1.htxb", "db_1/bk_1.json", "db_1/bk_10.htxb", "db_10/bk_2.htxb"]
    for name in names:
        await storage.write(name, stream(name.encode()))
    await storage.remove("db_1/bk_1.htxb")
    assert await storage.list() == names[1:]
    await storage.remove("db_1/")
    assert await storage.list() == names[3:]
    assert await content(storage, names[3]) == names[3].encode()


async def test_nothing_shows_before_it_is_whole(storage: BackupStorage, request: pytest.FixtureRequest) -> None:
    """While a file is written nobody sees it; if the write is given up nothing is left, and the stream is ended."""
    endless = Endless()
    write = asyncio.ensure_future(storage.write(NAME, aiter(endless)))
    await endless.read.wait()
    assert not await storage.exists(NAME)
    assert await storage.list() == []
    write.cancel()
    with pytest.raises(asyncio.CancelledError):
        await write
    await asyncio.wait_for(endless.ended.wait(), 5)
    await is_left_without_a_trace(storage, request)


async def test_an_error_of_the_stream_is_passed_on(storage: BackupStorage, request: pytest.FixtureRequest) -> None:
    """When a dump fails halfway its own error comes out, and what was there before stays."""
    with pytest.raises(ConnectionResetError, match="the dump"):
        await storage.write(NAME, aiter(Endless(ConnectionResetError("the dump"))))
    await is_left_without_a_trace(storage, request)
    await storage.write(NAME, stream(b"before"))
    with pytest.raises(ConnectionResetError):
        await storage.write(NAME, aiter(Endless(ConnectionResetError())))
    assert await content(storage) == b"before"


async def is_left_without_a_trace(storage: BackupStorage, request: pytest.FixtureRequest) -> None:
    """Check that nothing is left of a write that has failed."""
    assert await storage.list() == []
    if isinstance(storage, FolderStorage):
        assert files_in(request.getfixturevalue("tmp_path")) == []
    else:
        seaweed: Seaweed = request.getfixturevalue("seaweed")
        assert await seaweed.unfinished_uploads() == []


def files_in(folder: Path) -> list[Path]:
    """Return all files below a folder, whatever their names."""
    return [path for path in folder.rglob("*") if path.is_file()]


async def test_two_that_write_one_file(storage: BackupStorage) -> None:
    """Of two writes of one file at once, one stands at the end, whole."""
    one, other = os.urandom(9 * MEGABYTE), os.urandom(5 * MEGABYTE)

    async def slowly(plain: bytes) -> AsyncIterator[bytes]:
        for at in range(0, len(plain), MEGABYTE):
            await asyncio.sleep(0)
            yield plain[at : at + MEGABYTE]

    await asyncio.gather(storage.write(NAME, slowly(one)), storage.write(NAME, slowly(other)))
    assert await content(storage) in (one, other)
    assert await storage.list() == [NAME]


async def test_a_reader_may_stop(storage: BackupStorage) -> None:
    """A file that is not read to its end is closed, and can be removed and read again."""
    plain = os.urandom(9 * MEGABYTE)
    await storage.write(NAME, stream(plain))
    async with aclosing(storage.read(NAME)) as pieces:
        assert plain.startswith(await anext(pieces))
    assert str(NAME) not in " ".join(open_files())
    assert await content(storage) == plain


def open_files() -> list[str]:
    """Return the paths of all files that this process has open."""
    found = []
    for each in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(str(each.readlink()))
    return found


@pytest.mark.parametrize(
    "name", ["", "/", "db_1", "/etc/passwd", "db_1/../db_2/x", "../x", "db_1/x/y", "db_1//x", "*/x"]
)
async def test_other_names_are_refused(storage: BackupStorage, name: str) -> None:
    """A name that has lost an id, or leads elsewhere, is an error of ours and touches nothing."""
    await storage.write(NAME, stream(b"stays"))
    with pytest.raises(ValueError, match="no name"):
        await storage.remove(name)
    with pytest.raises(ValueError, match="no name"):
        await storage.write(name, stream(b"x"))
    with pytest.raises(ValueError, match="no name"):
        await content(storage, name)
    assert await storage.list() == [NAME]


async def test_memory_does_not_grow_with_the_size(storage: BackupStorage) -> None:
    """A file of 200 MB is written and read with less than 50 MB of memory."""
    most = before = resident()

    async def long() -> AsyncIterator[bytes]:
        nonlocal most
        for _ in range(200):
            yield os.urandom(MEGABYTE)
            most = max(most, resident())

    assert (await storage.write(NAME, long())).size_bytes == 200 * MEGABYTE
    async for _ in storage.read(NAME):
        most = max(most, resident())
    assert most - before < 50 * MEGABYTE
    await storage.remove(NAME)


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/var/backups",
        "file:backups",
        "file://backups",
        "file:///",
        "s3://",
        "s3:///prefix",
        "s3://key:hidden@bucket/prefix",
        "s3://bucket?endpoint=hidden:9000",
        "s3://bucket?endpoint=https://",
        "s3://bucket?secret_key=hidden",
        "https://hidden/bucket",
    ],
)
def test_a_url_that_names_no_storage_is_told(url: str) -> None:
    """The sentence says which ones do, and does not repeat what may hold a secret."""
    with pytest.raises(ValueError, match="HTX_BACKUP_URL must be") as refused:
        storage_at(url, access_key=ACCESS_KEY, secret_key=SECRET_KEY)
    assert "hidden" not in str(refused.value)
