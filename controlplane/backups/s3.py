"""Backups in a bucket, of Amazon S3 or of what speaks its protocol.

obstore (Rust's object_store) does the talking: of the AWS variables that it reads by itself, none counts here.

An upload that a crash cuts off shows nowhere, but the bucket keeps its parts: give it a lifecycle rule that aborts
incomplete multipart uploads after a day.

A process that ends within milliseconds of a failed upload may abort instead of exiting (pyo3-async-runtimes #40); by
then nothing is lost but the exit status.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from controlplane.backups.storage import StorageUnavailable, Written, checked

if TYPE_CHECKING:
    from obstore.store import S3Credential  # it is in the stubs alone

# S3 takes at most 10,000 parts: files of up to 160 GB. Of them, two are in memory: one filling, one on its way.
_PART = 16 * 1024 * 1024
# Read by ranges, so that no connection waits while a restore is busy with what it got.
_RANGE = 4 * 1024 * 1024


class S3Storage:
    """The objects of a bucket below a prefix. `endpoint` is a URL; with http:// nothing is encrypted on its way."""

    def __init__(
        self, *, bucket: str, prefix: str, endpoint: str, region: str, access_key: str, secret_key: str
    ) -> None:
        credential: S3Credential = {
            "access_key_id": access_key,
            "secret_access_key": secret_key,
            "expires_at": None,
        }
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            config={
                "aws_endpoint_url_s3": endpoint,
                "region": region,
                "skip_signature": False,
                "virtual_hosted_style_request": False,
                "disable_bulk_delete": True,  # not every server has it
            },
            client_options={"allow_http": endpoint.startswith("http://"), "timeout": timedelta(minutes=1)},
            retry_config={"max_retries": 4, "retry_timeout": timedelta(minutes=1)},
            credential_provider=lambda: credential,
        )

    async def write(self, name: str, chunks: AsyncIterator[bytes]) -> Written:
        """Keep a stream under a name."""
        source = _Source(chunks)
        upload = asyncio.ensure_future(
            obstore.put_async(
                self._store, checked(name), source, use_multipart=True, chunk_size=_PART, max_concurrency=1
            )
        )
        try:
            with _in_our_terms():
                await asyncio.shield(upload)
        finally:
            # A future of obstore's that is cancelled forgets its upload; one whose source fails aborts it.
            source.stop()
            with suppress(BaseException):
                await upload
        return Written(size_bytes=source.size, sha256=source.digest.hexdigest())

    async def read(self, name: str) -> AsyncGenerator[bytes, None]:
        """Return a file, in pieces."""
        with _in_our_terms():
            size = (await obstore.head_async(self._store, checked(name)))["size"]
        for start in range(0, size, _RANGE):
            with _in_our_terms():
                piece = await obstore.get_range_async(self._store, name, start=start, end=min(start + _RANGE, size))
            yield bytes(piece)

    async def exists(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        try:
            with _in_our_terms():
                await obstore.head_async(self._store, checked(name))
        except FileNotFoundError:
            return False
        return True

    async def list(self, folder: str = "") -> list[str]:
        """Return the names of a folder's files, of all files for ""."""
        if folder:
            checked(folder, folder=True)
        with _in_our_terms():
            return sorted([each["path"] async for page in obstore.list(self._store, folder or None) for each in page])

    async def remove(self, name: str) -> None:
        """Remove a file or a folder."""
        names = await self.list(name) if checked(name, folder=True).endswith("/") else [name]
        with _in_our_terms(), suppress(FileNotFoundError):
            await obstore.delete_async(self._store, names)

    async def sweep(self, *, before: datetime) -> None:
        """Do nothing: the bucket's own rule removes what is left of uploads."""


class _Source:
    """A stream on its way into an upload: counted, and ended from outside."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self._chunks = chunks
        self._reading: asyncio.Task[object] | None = None
        self._stopped = False

    def __aiter__(self) -> "_Source":
        return self

    async def __anext__(self) -> bytes:
        if self._stopped:
            raise asyncio.CancelledError
        self._reading = asyncio.current_task()
        try:
            chunk = await anext(self._chunks)
        finally:
            self._reading = None
        self.size += len(chunk)
        self.digest.update(chunk)
        return chunk

    def stop(self) -> None:
        """End the stream with an error, now or when it is asked for more; nothing happens if it has ended."""
        self._stopped = True
        if self._reading is not None:
            self._reading.cancel()


@contextmanager
def _in_our_terms() -> Iterator[None]:
    """Say what has failed without the library's words, which quote the server's answer."""
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise StorageUnavailable("The storage of backups refuses our keys.") from error
    except BaseError as error:
        raise StorageUnavailable("The storage of backups cannot be reached, or cannot do its work.") from error
