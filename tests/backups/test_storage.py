"""Where backups are kept: a folder and a bucket, which do the same."""

import asyncio
import hashlib
import os
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from controlplane.backups.storage import BackupStorage, FolderStorage, StorageUnavailable, Written, storage_at
from tests.backups.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed
from tests.stack import free_port

MEGABYTE = 1024 * 1024
NAME = "db_1/bk_1.htxb"


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


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    """Return a stream of these chunks."""
    for chunk in chunks:
        yield chunk


async def content(storage: BackupStorage, name: str = NAME) -> bytes:
    """Return what is in a file."""
    return b"".join([piece async for piece in storage.read(name)])


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


async def test_a_folder_is_its_owners_alone(tmp_path: Path) -> None:
    """Nobody else on the machine reads backups, or their names."""
    storage = FolderStorage(tmp_path / "backups")
    await storage.write(NAME, stream(b"plain"))
    assert stat.S_IMODE((tmp_path / "backups" / NAME).stat().st_mode) == 0o600
    for folder in ("backups", "backups/db_1"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


async def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced under another name, then renamed, then both folders are synced."""
    steps: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        steps.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        steps.append(f"rename {path.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    await FolderStorage(tmp_path / "backups").write(NAME, stream(b"plain"))
    file, moved, *folders = steps
    assert file.startswith("sync bk_1.htxb.")
    assert moved == file.replace("sync", "rename")
    assert folders == ["sync db_1", "sync backups"]


CRASHES = """
import asyncio, sys
from pathlib import Path
from controlplane.backups.storage import FolderStorage

async def endless():
    while True:
        yield bytes(1024 * 1024)
        print("written", flush=True)
        await asyncio.Event().wait()

asyncio.run(FolderStorage(Path(sys.argv[1])).write(sys.argv[2], endless()))
"""


async def test_what_a_crash_leaves_is_swept(tmp_path: Path) -> None:
    """A file that was being written when the server was killed never shows; the sweep takes it, but no younger one."""
    storage = FolderStorage(tmp_path)
    for name in (NAME, "db_2/bk_2.htxb"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CRASHES, str(tmp_path), name, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"written\n"
        process.kill()
        assert await process.wait() == -signal.SIGKILL
    await storage.write("db_2/bk_3.htxb", stream(b"whole"))
    old, young = (path for name in ("db_1", "db_2") for path in (tmp_path / name).glob("*.part"))
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    os.utime(old, (hour_ago.timestamp() - 1,) * 2)
    assert await storage.list() == ["db_2/bk_3.htxb"]
    assert not await storage.exists(NAME)

    await storage.sweep(before=hour_ago)
    assert not old.parent.exists()
    assert young.exists()
    await storage.remove("db_2/bk_2.htxb")
    assert not young.exists()
    assert await storage.list() == ["db_2/bk_3.htxb"]


async def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    """A file in the folder's place is one sentence, and not an OSError."""
    (tmp_path / "file").write_text("in the way")
    storage = FolderStorage(tmp_path / "file")
    with pytest.raises(StorageUnavailable, match="cannot be used: File exists"):
        await storage.write(NAME, stream(b"plain"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda url: url.replace(str(urlsplit(url.partition("endpoint=")[2]).port), str(free_port())),
            "cannot be reached",
        ),
        (lambda url: url.replace("s3://backups", "s3://no-such-bucket"), "cannot be reached"),
        (lambda url: url, "refuses our keys"),
    ],
    ids=["nobody there", "no bucket", "wrong key"],
)
async def test_a_bucket_that_cannot_be_used_is_told(
    seaweed: Seaweed, change: Callable[[str], str], reason: str
) -> None:
    """A server that is away, a bucket that is none, a wrong key: one sentence each, and no key in it or its causes."""
    secret = "not-the-secret-key" if "refuses" in reason else SECRET_KEY
    url = change(seaweed.url("x"))
    storage = storage_at(url, access_key=ACCESS_KEY, secret_key=secret)
    with pytest.raises(StorageUnavailable, match="cannot be reached") as refused:
        await storage.list()
    assert secret not in "".join(traceback.format_exception(refused.value))
    assert secret not in repr(storage)
    if "no-such" not in url:  # this server makes a bucket for what is written
        with pytest.raises(StorageUnavailable, match=reason) as refused:
            await storage.write(NAME, stream(b"plain"))
        assert secret not in "".join(traceback.format_exception(refused.value))
        with pytest.raises(StorageUnavailable, match=reason):
            await storage.exists(NAME)
        with pytest.raises(StorageUnavailable, match=reason):
            await content(storage)


async def test_a_server_that_goes_away_ends_the_stream(seaweed: Seaweed) -> None:
    """When the server is lost in the middle of an upload the write fails, and nothing reads the dump any more."""
    lost = asyncio.Event()
    there = urlsplit(seaweed.endpoint)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while not lost.is_set() and (some := await reader.read(65536)):
                writer.write(some)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if lost.is_set():
            writer.close()
            return
        back, on = await asyncio.open_connection(there.hostname, there.port)
        await asyncio.gather(forward(reader, on), forward(back, writer))

    async def dump() -> AsyncIterator[bytes]:
        for number in range(200):
            if number == 40:
                lost.set()
            yield os.urandom(MEGABYTE)
            counted.append(number)

    counted: list[int] = []
    url = seaweed.url("x", bucket="lost")
    async with await asyncio.start_server(accept, "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        storage = storage_at(url.replace(str(there.port), str(port)), access_key=ACCESS_KEY, secret_key=SECRET_KEY)
        with pytest.raises(StorageUnavailable, match="cannot be reached"):
            await storage.write(NAME, dump())
    assert 40 <= len(counted) < 100
    assert await storage_at(url, access_key=ACCESS_KEY, secret_key=SECRET_KEY).list() == []


async def test_the_variables_of_others_do_not_count(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set for Amazon's own tools neither moves the storage nor takes the place of its keys."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "other",
        "AWS_SECRET_ACCESS_KEY": "other",
        "AWS_SESSION_TOKEN": "other",
        "AWS_ENDPOINT": "http://127.0.0.1:9",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_REGION": "eu-west-1",
        "AWS_BUCKET": "other",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true",
    }.items():
        monkeypatch.setenv(name, value)
    storage = storage_at(seaweed.url("variables"), access_key=ACCESS_KEY, secret_key=SECRET_KEY)
    await storage.write(NAME, stream(b"plain"))
    monkeypatch.undo()
    again = storage_at(seaweed.url("variables"), access_key=ACCESS_KEY, secret_key=SECRET_KEY)
    assert await content(again) == b"plain"


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


def test_a_bucket_needs_its_keys() -> None:
    """Without both keys the server does not start to guess."""
    with pytest.raises(ValueError, match="HTX_BACKUP_SECRET_KEY"):
        storage_at("s3://bucket/prefix", access_key=ACCESS_KEY)


def test_who_has_no_bucket_does_not_load_its_library(tmp_path: Path) -> None:
    """A folder is used without obstore."""
    program = f"""
import sys
from controlplane.backups.storage import storage_at
storage_at({tmp_path.as_uri()!r})
sys.exit("obstore" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
