"""A MongoDB database as a stream of bytes, written by whoever may read it, and read back by its own user.

The stream is a line that tells the format, and then frames: a letter, and a BSON document, which begins with its
length.

    C   a collection or view: its name, options and indexes
    D   a document of that collection
    E   the end: of each collection its name, how many documents, and their checksum
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

import bson
from bson.raw_bson import RawBSONDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.database import AsyncDatabase

from controlplane.databases.engines.engine import Contents, EngineError, Table

Document = dict[str, Any]

_FORMAT = b"controlplane mongodb 1\n"
_COLLECTION, _DOCUMENT, _END = b"C", b"D", b"E"
_CHUNK = 256 * 1024
_BATCH = 1000  # documents; the server sends at most 16 MB at once
_BATCH_BYTES = 1024 * 1024
_LARGEST = 16 * 1024 * 1024 + 16 * 1024  # the server's own limit, with room for what it adds

# What says what the data is like; not how the server stores it.
_OPTIONS = {
    "capped",
    "changeStreamPreAndPostImages",
    "clusteredIndex",
    "collation",
    "expireAfterSeconds",
    "max",
    "pipeline",
    "size",
    "timeseries",
    "validationAction",
    "validationLevel",
    "validator",
    "viewOn",
}
_INDEX_OPTIONS = {
    "2dsphereIndexVersion",
    "bits",
    "collation",
    "default_language",
    "expireAfterSeconds",
    "hidden",
    "key",
    "language_override",
    "max",
    "min",
    "name",
    "partialFilterExpression",
    "sparse",
    "textIndexVersion",
    "unique",
    "v",
    "weights",
    "wildcardProjection",
}
_PROGRAMS = (b"$where\0", b"$function\0", b"$accumulator\0")  # JavaScript, as keys of a BSON document


def definition_of(found: Mapping[str, Any], indexes: Sequence[Mapping[str, Any]]) -> Document:
    """Return what a dump says of a collection, from what listCollections and listIndexes say.

    Raises EngineError if it could not be restored.
    """
    definition = {
        "name": found["name"],
        "options": {key: value for key, value in sorted(found["options"].items()) if key in _OPTIONS},
        # The one on _id is there in any collection.
        "indexes": [
            {key: value for key, value in index.items() if key in _INDEX_OPTIONS}
            for index in sorted(indexes, key=lambda index: str(index["name"]))
            if index["key"] != {"_id": 1}
        ],
    }
    _check(definition)
    return definition


class Dump:
    """A dump that is being read; see the seam's."""

    def __init__(
        self, database: AsyncDatabase[Document], definitions: list[Document], session: AsyncClientSession | None
    ) -> None:
        self._database = database
        self._definitions = sorted(definitions, key=lambda definition: str(definition["name"]))
        self._session = session
        self._contents: Contents | None = None
        self._batches: Any = None

    async def chunks(self) -> AsyncIterator[bytes]:
        """Return the dump in pieces; see `Dump.chunks`."""
        buffer = bytearray(_FORMAT)
        tallies = []
        for definition in self._definitions:
            tallies.append(tally := _Tally(definition))
            buffer += _COLLECTION + bson.encode(definition)
            async for batch in self._read(definition):
                for document in _split(batch):
                    tally.add(document)
                    buffer += _DOCUMENT
                    buffer += document
                    if len(buffer) >= _CHUNK:
                        for piece in _cut(buffer):
                            yield piece
                        await asyncio.sleep(0)  # others want their turn before 16 MB are done
        buffer += _END + bson.encode(_ending(tallies))
        for piece in _cut(buffer):
            yield piece
        yield bytes(buffer)
        self._contents = Contents({tally.name: tally.table() for tally in tallies})

    def contents(self) -> Contents:
        """Return what is in the dump; see `Dump.contents`."""
        if self._contents is None:
            raise RuntimeError("The contents are known once the dump was read to its end.")
        return self._contents

    async def aclose(self) -> None:
        """Stop reading; what the server keeps for it is freed."""
        if self._batches is not None:
            await self._batches.close()

    async def _read(self, definition: Document) -> AsyncIterator[bytes]:
        if "viewOn" in definition["options"]:
            return
        # Before MongoDB 8 a capped collection is not read as of a moment.
        session = None if "capped" in definition["options"] else self._session
        # Any, as it is annotated as if it gave documents.
        self._batches = self._database[definition["name"]].find_raw_batches(batch_size=_BATCH, session=session)
        async for batch in self._batches:
            yield batch


async def load(database: AsyncDatabase[Document], chunks: AsyncIterator[bytes]) -> None:
    """Read a dump into an empty database. Raises EngineError if it is damaged, or has what no dump of ours has.

    What is done is done with the rights of who is logged in; the server checks the documents.
    """
    frames = _Frames(chunks)
    if await frames.read(len(_FORMAT)) != _FORMAT:
        raise _damaged()
    tallies: list[_Tally] = []
    batch: list[RawBSONDocument] = []
    size = 0
    while True:
        kind, document = await frames.next()
        if batch and (kind != _DOCUMENT or len(batch) == _BATCH or size + len(document) > _BATCH_BYTES):
            # Without its validator, as it may be younger than the documents.
            await database[tallies[-1].name].insert_many(batch, bypass_document_validation=True)
            batch, size = [], 0
        if kind == _DOCUMENT and tallies:
            tallies[-1].add(document)
            batch.append(RawBSONDocument(document))
            size += len(document)
            continue
        if tallies:
            await _build_indexes(database, tallies[-1].definition)
        if kind != _COLLECTION:
            break
        definition = bson.decode(document)
        _check(definition)
        tallies.append(_Tally(definition))
        await database.command({"create": definition["name"], **definition["options"]})
    if kind != _END or bson.decode(document) != _ending(tallies) or not await frames.at_end():
        raise _damaged()


async def _build_indexes(database: AsyncDatabase[Document], definition: Document) -> None:
    if definition["indexes"]:
        await database.command({"createIndexes": definition["name"], "indexes": definition["indexes"]})


class _Tally:
    """The number of a collection's documents, and a sum over their digests, which no order changes."""

    def __init__(self, definition: Document) -> None:
        self.definition = definition
        self.name: str = definition["name"]
        self._rows = 0
        # Options and indexes are part of what must be equal.
        self._sum = int.from_bytes(sha256(bson.encode(definition)).digest())

    def add(self, document: bytes) -> None:
        self._rows += 1
        self._sum += int.from_bytes(sha256(document).digest())

    def table(self) -> Table:
        return Table(rows=self._rows, checksum=f"{self._sum % 2**256:064x}")


class _Frames:
    """Frames out of pieces of any size, with no more in memory than a piece and a document."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = bytearray()

    async def next(self) -> tuple[bytes, bytes]:
        """Return the next frame: its letter, and its document."""
        head = await self.read(5)
        length = int.from_bytes(head[1:], "little")
        if not 5 <= length <= _LARGEST:  # noqa: PLR2004 - an empty document has five bytes
            raise _damaged()
        return head[:1], head[1:] + await self.read(length - 4)

    async def read(self, size: int) -> bytes:
        """Return this many bytes."""
        while len(self._buffer) < size:
            piece = await anext(self._chunks, None)
            if piece is None:
                raise _damaged()
            self._buffer += piece
        found = bytes(self._buffer[:size])
        del self._buffer[:size]
        return found

    async def at_end(self) -> bool:
        """Return whether there is nothing more."""
        return not self._buffer and await anext(self._chunks, None) is None


def _check(definition: Mapping[str, Any]) -> None:
    """Raise EngineError unless this is a collection that we make for a customer."""
    match definition:
        case {"name": str(name), "options": dict(options), "indexes": list(indexes), **rest} if not rest:
            known = _OPTIONS.issuperset(options)
            known &= all(
                isinstance(index, dict) and {"key", "name"} <= index.keys() <= _INDEX_OPTIONS for index in indexes
            )
        case _:
            raise _damaged()
    if not known or not name or "$" in name or name.startswith("system."):
        raise _damaged()
    if any(word in bson.encode(definition) for word in _PROGRAMS):
        raise EngineError(f"Backups hold no JavaScript: take it out of {name!r}, and try again.")


def _ending(tallies: list[_Tally]) -> Document:
    tables = [(tally.name, tally.table()) for tally in tallies]
    return {"tables": [{"name": name, "rows": table.rows, "checksum": table.checksum} for name, table in tables]}


def _split(batch: bytes) -> Iterator[bytes]:
    """Return the documents of a batch, each of which begins with its length."""
    begin = 0
    while begin < len(batch):
        end = begin + int.from_bytes(batch[begin : begin + 4], "little")
        yield batch[begin:end]
        begin = end


def _cut(buffer: bytearray) -> Iterator[bytes]:
    """Take full pieces out of a buffer."""
    while len(buffer) >= _CHUNK:
        yield bytes(buffer[:_CHUNK])
        del buffer[:_CHUNK]


def _damaged() -> EngineError:
    return EngineError("The backup is damaged, or none of this engine.")
