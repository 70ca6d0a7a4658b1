"""The sealed form of a backup: compressed and encrypted as a stream, and readable only as the backup that it is.

The file is a header (`HTXB`, the version, the length of the key's id, the id, a salt), then frames: four bytes of
length, big-endian, and so many bytes of AES-256-GCM. Each frame is a piece of the plain stream, at most a megabyte,
compressed by itself, so that no frame opens into more than that; the last one is empty, its 16 bytes are the tag alone.

This is the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár 2015): the nonce counts the frames and marks the
last, so that none can be left out, repeated or moved. The key is made for the file, hence no nonce repeats.
"""

import asyncio
import json
import secrets
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import asdict, dataclass
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from zstandard import ZstdCompressor, ZstdDecompressor

from controlplane.keys import Keys

_MAGIC = b"HTXB"
_VERSION = 1
_PURPOSE = "backup"
_HEADER = struct.Struct(">4sBB")
_LENGTH = struct.Struct(">I")
_SALT_BYTES = 32
_TAG_BYTES = 16
_PIECE = 1024 * 1024
_LONGEST = _PIECE + _PIECE // 128 + _TAG_BYTES  # what does not compress grows by a 256th at most
# On rows as text, level 1 was smaller than zlib's 6 and ten times as fast; level 3 took four times as long for 8 %.
_LEVEL = 1


class BrokenBackup(Exception):
    """A backup that is not what was written, or not the one that was asked for; the sentence is fit for a customer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Which backup it is, by the ids of its account, its database and its own, and the engine that wrote it.

    `object_name` is what the database is called on its cluster; its files are kept under the same name.
    """

    account_id: str
    database_id: str
    object_name: str
    backup_id: str
    engine: str

    @property
    def file_name(self) -> str:
        """The name of the sealed file in the storage."""
        return f"{self.object_name}/{self.backup_id}.htxb"

    @property
    def manifest_name(self) -> str:
        """The name of the manifest, which is written last: without it there is no backup."""
        return f"{self.object_name}/{self.backup_id}.json"


class Sealing:
    """A stream that is sealed while it is read, once: an iterator of pieces of at most a megabyte and a little.

    `key_id` is the server key that it needs; `plain_bytes` is how much has been read, so all of it at the end.
    """

    def __init__(self, chunks: AsyncIterator[bytes], *, keys: Keys, identity: Identity) -> None:
        salt = secrets.token_bytes(_SALT_BYTES)
        self.key_id, key = keys.derive(_PURPOSE, salt)
        self.plain_bytes = 0
        self._header = _header(self.key_id, salt)
        self._frames = _Frames(key, self._header, identity)
        self._sealed = self._seal(chunks)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._sealed)

    async def _seal(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        yield self._header
        compressor = ZstdCompressor(level=_LEVEL)
        async for piece in _pieces(chunks):
            self.plain_bytes += len(piece)
            yield await asyncio.to_thread(lambda plain: self._frames.seal(compressor.compress(plain)), piece)
        yield self._frames.seal(b"", last=True)


async def open_sealed(chunks: AsyncIterator[bytes], *, keys: Keys, identity: Identity) -> AsyncGenerator[bytes, None]:
    """Return what was sealed, in pieces of at most a megabyte.

    Raises BrokenBackup at the first piece that was changed, moved, left out or added, or at once if the backup is
    another or needs a key that we lack. What comes out before that is right, but only what ends without it is all.
    """
    reader = _Reader(chunks)
    magic, version, key_id_bytes = _HEADER.unpack(await reader.exactly(_HEADER.size))
    if magic != _MAGIC:
        raise BrokenBackup("The file is no backup.")
    if version != _VERSION:
        raise BrokenBackup(f"The backup has the format {version}, which this version cannot read.")
    key_id = (await reader.exactly(key_id_bytes)).decode(errors="replace")
    salt = await reader.exactly(_SALT_BYTES)
    try:
        _, key = keys.derive(_PURPOSE, salt, key_id=key_id)
    except KeyError:
        raise BrokenBackup(f"The backup needs the key {key_id!r}, which the server does not have.") from None
    frames = _Frames(key, _header(key_id, salt), identity)
    decompressor = ZstdDecompressor()
    while (length := _LENGTH.unpack(await reader.exactly(_LENGTH.size))[0]) != _TAG_BYTES:
        if length > _LONGEST:
            raise BrokenBackup("The backup was changed.")
        frame = await reader.exactly(length)
        yield await asyncio.to_thread(lambda sealed: decompressor.decompress(frames.open(sealed)), frame)
    frames.open(await reader.exactly(_TAG_BYTES), last=True)
    if not await reader.ended():
        raise BrokenBackup("The backup goes on after its end.")


def _header(key_id: str, salt: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, len(key_id)) + key_id.encode() + salt


class _Frames:
    """The frames of one file, in their order."""

    def __init__(self, key: bytes, header: bytes, identity: Identity) -> None:
        self._aead = AESGCM(key)
        self._associated = header + json.dumps(asdict(identity), sort_keys=True).encode()
        self._count = 0

    def seal(self, plain: bytes, *, last: bool = False) -> bytes:
        sealed = self._aead.encrypt(self._nonce(last), plain, self._associated)
        return _LENGTH.pack(len(sealed)) + sealed

    def open(self, sealed: bytes, *, last: bool = False) -> bytes:
        try:
            return self._aead.decrypt(self._nonce(last), sealed, self._associated)
        except InvalidTag:
            raise BrokenBackup("The backup was changed, or it is another one.") from None

    def _nonce(self, last: bool) -> bytes:
        nonce = self._count.to_bytes(11, "big") + bytes([last])
        self._count += 1
        return nonce


async def _pieces(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Cut the stream anew: small chunks would compress badly and cost a thread each."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        while len(buffer) >= _PIECE:
            yield bytes(buffer[:_PIECE])
            del buffer[:_PIECE]
    if buffer:
        yield bytes(buffer)


class _Reader:
    """Reads as many bytes as are asked for, however the stream is cut."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = bytearray()

    async def exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not await self._more():
                raise BrokenBackup("The backup is cut off.")
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    async def ended(self) -> bool:
        while not self._buffer:
            if not await self._more():
                return True
        return False

    async def _more(self) -> bool:
        try:
            self._buffer += await anext(self._chunks)
        except StopAsyncIteration:
            return False
        return True
