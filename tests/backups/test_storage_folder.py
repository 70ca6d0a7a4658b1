"""Backups in a folder: whose they are, what a crash leaves of them, and what is told of a folder that is of no use."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from controlplane.backups.storage import FolderStorage, StorageUnavailable
from tests.backups.stored import NAME, stream


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


def test_who_has_no_bucket_does_not_load_its_library(tmp_path: Path) -> None:
    """A folder is used without obstore."""
    program = f"""
import sys
from controlplane.backups.storage import storage_at
storage_at({tmp_path.as_uri()!r})
sys.exit("obstore" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
