"""The unpacked code of versions: a folder each, there as a whole or not at all."""

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path, PurePosixPath

import grpc
import structlog

from controlplane.api.hosts.v1 import hosts_pb2
from controlplane.functions.archive import ArchiveError, make_folders, source_file, unpack
from controlplane.functions.host.pool import NotReady
from controlplane.functions.host.worker import StartFailed

_log = structlog.get_logger("functions")


class CodeCache:
    """Folders below `folder`, which is emptied first: what a host that was killed has left is not looked at.

    `fetch` asks the control plane for the code of a version, by its id.
    """

    def __init__(self, folder: Path, fetch: Callable[[str], Awaitable[hosts_pb2.GetFunctionCodeResponse]]) -> None:
        self._folder = folder
        self._fetch = fetch
        self._loading: dict[str, asyncio.Task[Path]] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        folder.chmod(0o711)  # workers, which are users of their own, pass through it

    async def get(self, version: hosts_pb2.HostedVersion) -> Path:
        """Return the folder with a version's code.

        Raises NotReady while the control plane does not answer, StartFailed if the code cannot be unpacked.
        """
        folder = self._folder / version.id
        if folder.exists():
            return folder
        loading = self._loading.get(version.id)
        if loading is None:
            loading = self._loading[version.id] = asyncio.create_task(self._load(version, folder))
            loading.add_done_callback(lambda _done: self._loading.pop(version.id))
        return await asyncio.shield(loading)  # others may wait for it too

    async def until_loaded(self, version_id: str) -> None:
        """Wait until nobody loads a version's code: that goes on also where nobody waits for it any more."""
        if loading := self._loading.get(version_id):
            await asyncio.wait({loading})

    async def remove(self, version_id: str) -> None:
        """Remove a version's code, if it is there; from the first moment on it is no more found."""
        folder = self._folder / version_id
        if folder.exists():
            aside = Path(tempfile.mkdtemp(dir=self._folder, prefix=".old-"))
            folder.rename(aside / version_id)
            await asyncio.to_thread(shutil.rmtree, aside, ignore_errors=True)

    async def _load(self, version: hosts_pb2.HostedVersion, folder: Path) -> Path:
        try:
            code = await self._fetch(version.id)
        except grpc.aio.AioRpcError as error:
            _log.warning("code could not be fetched", version=version.id, error=error.details())
            raise NotReady from error
        aside = Path(tempfile.mkdtemp(dir=self._folder, prefix=".new-"))
        try:
            await asyncio.to_thread(_write, code, version, aside)
            await asyncio.to_thread(aside.rename, folder)
        except ArchiveError as error:
            raise StartFailed(str(error)) from None
        finally:
            await asyncio.to_thread(shutil.rmtree, aside, ignore_errors=True)
        return folder


def _write(code: hosts_pb2.GetFunctionCodeResponse, version: hosts_pb2.HostedVersion, folder: Path) -> None:
    folder.chmod(0o755)
    if code.WhichOneof("code") == "archive":
        unpack(code.archive, folder)
        return
    path = PurePosixPath(source_file(version.runtime, version.entrypoint))
    make_folders(folder, path)
    file = folder / path
    file.write_text(code.source, encoding="utf-8")
    file.chmod(0o644)
