"""Sealed backups: what comes out is what went in, and a file that was touched gives nothing that is wrong."""

import asyncio
import base64
import os
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.backups.sealed import BrokenBackup, Identity, Sealing, open_sealed
from controlplane.keys import Keys

MEGABYTE = 1024 * 1024
HEADER = len("HTXB") + 2 + len("k1") + 32
IDENTITY = Identity(account_id="ac_1", database_id="db_1", object_name="h1234_1", backup_id="bk_1", engine="postgresql")


def new_keys(*ids: str) -> Keys:
    """Return keys of these ids."""
    made = {each: base64.b64encode(secrets.token_bytes(32)).decode() for each in ids}
    return Keys(mac=made, seal=made)


KEYS = new_keys("k1")
# Sealed by version 1 of the format, with a key of the bytes 0 to 31 and a salt of zeros.
KEPT = (
    "SFRYQgECazEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAACgd+9duysVklZByBYoWgkaXWkYHtSt74QOJVEahTL+lvgYQWIiPjhZA"
    "AAAAENyclcRsuUj6ewd1Bl57Mmw="
)


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    """Return a stream of these chunks."""
    for chunk in chunks:
        yield chunk


async def seal(*chunks: bytes, keys: Keys = KEYS, identity: Identity = IDENTITY) -> list[bytes]:
    """Return what is sealed: the header, and each frame."""
    return [piece async for piece in Sealing(stream(*chunks), keys=keys, identity=identity)]


async def unseal(*chunks: bytes, keys: Keys = KEYS, identity: Identity = IDENTITY) -> bytes:
    """Return what is in a sealed file."""
    return b"".join([piece async for piece in open_sealed(stream(*chunks), keys=keys, identity=identity)])


async def what_comes_out(*sealed: bytes) -> tuple[bytes, bool]:
    """Return the bytes that come out of a file, and whether it was refused."""
    out = bytearray()
    try:
        async for piece in open_sealed(stream(*sealed), keys=KEYS, identity=IDENTITY):
            out += piece
    except BrokenBackup:
        return bytes(out), True
    return bytes(out), False


async def is_refused(sealed: bytes, plain: bytes) -> bool:
    """Whether a file is refused, and what comes out before is how the plain stream begins."""
    out, refused = await what_comes_out(sealed)
    return refused and plain.startswith(out)


@given(st.lists(st.binary(max_size=40)), st.integers(1, 70))
def test_what_is_sealed_comes_out_again(chunks: list[bytes], size: int) -> None:
    """However the streams are cut, the bytes that come out are those that went in."""

    async def there_and_back() -> bytes:
        sealed = b"".join(await seal(*chunks))
        return await unseal(*(sealed[at : at + size] for at in range(0, len(sealed), size)))

    with asyncio.Runner() as runner:
        assert runner.run(there_and_back()) == b"".join(chunks)


@pytest.mark.parametrize("size", [0, 1, MEGABYTE - 1, MEGABYTE, MEGABYTE + 1, 3 * MEGABYTE])
@pytest.mark.parametrize("content", [os.urandom, bytes], ids=["random", "zeros"])
async def test_any_size_is_sealed(size: int, content: Callable[[int], bytes]) -> None:
    """At the borders of a piece too the bytes come out again, and none opens into more than a megabyte."""
    plain = content(size)
    sealing = Sealing(stream(plain), keys=KEYS, identity=IDENTITY)
    sealed = b"".join([piece async for piece in sealing])
    assert sealing.plain_bytes == size
    assert len(sealed) <= size + size // 128 + 200
    pieces = [piece async for piece in open_sealed(stream(sealed), keys=KEYS, identity=IDENTITY)]
    assert b"".join(pieces) == plain
    assert all(len(piece) <= MEGABYTE for piece in pieces)


async def test_each_bit_counts() -> None:
    """A file of three frames in which any single bit is flipped is refused, before wrong bytes come out."""
    plain = b"one" * MEGABYTE
    sealed = b"".join(await seal(plain))
    for position in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[position // 8] ^= 1 << position % 8
        assert await is_refused(bytes(changed), plain), f"bit {position}"


async def test_each_byte_counts() -> None:
    """A file that ends too early, at whatever byte, is refused; so is one that goes on."""
    plain = b"one" * MEGABYTE
    sealed = b"".join(await seal(plain))
    for length in range(len(sealed)):
        assert await is_refused(sealed[:length], plain), f"{length} bytes"
    assert await is_refused(sealed + b"\0", plain)
    assert await is_refused(sealed + sealed, plain)


async def test_frames_keep_their_places() -> None:
    """Frames that change places, come twice, are left out or come from another file are refused."""
    plain = os.urandom(3 * MEGABYTE)
    header, *frames, end = await seal(plain)
    one, two, three = frames
    _, other, *_ = await seal(plain)
    for order in ([two, one, three], [one, one, two, three], [one, three], [two, three], [other, two, three], []):
        assert await is_refused(b"".join([header, *order, end]), plain)
    assert await is_refused(b"".join([header, end, *frames, end]), plain)
    assert await is_refused(b"".join([header, *frames, end, end]), plain)
    assert await unseal(header, *frames, end) == plain


async def test_nothing_comes_out_of_a_frame_that_does_not_hold() -> None:
    """The frames before a changed one come out, and of it not one byte."""
    plain = os.urandom(2 * MEGABYTE)
    header, first, second, end = await seal(plain)
    changed = second[:-1] + bytes([second[-1] ^ 1])
    assert await what_comes_out(header, first, changed, end) == (plain[:MEGABYTE], True)


@pytest.mark.parametrize("field", ["account_id", "database_id", "backup_id", "engine"])
async def test_a_backup_opens_as_itself_only(field: str) -> None:
    """A file that is put in the place of another account's, database's, backup's or engine's is refused."""
    sealed = await seal(b"plain")
    with pytest.raises(BrokenBackup):
        await unseal(*sealed, identity=replace(IDENTITY, **{field: "other"}))


async def test_ids_do_not_run_together() -> None:
    """The same letters spread over other ids are another backup."""
    sealed = await seal(b"plain", identity=replace(IDENTITY, account_id="ac_1", database_id="2db_1"))
    with pytest.raises(BrokenBackup):
        await unseal(*sealed, identity=replace(IDENTITY, account_id="ac_12", database_id="db_1"))


async def test_an_old_key_opens_what_it_sealed() -> None:
    """After a rotation old backups open; without their key they do not, and the sentence says which one is missing."""
    both = new_keys("k2", "k1")
    old = Keys(mac=both.mac, seal={"k1": both.seal["k1"]})
    new = Keys(mac=both.mac, seal={"k2": both.seal["k2"]})
    sealing = Sealing(stream(b"plain"), keys=old, identity=IDENTITY)
    sealed = [piece async for piece in sealing]
    assert sealing.key_id == "k1"
    assert await unseal(*sealed, keys=both) == b"plain"
    with pytest.raises(BrokenBackup, match="'k1'"):
        await unseal(*sealed, keys=new)
    with pytest.raises(BrokenBackup):
        await unseal(*sealed, keys=new_keys("k1"))


@pytest.mark.parametrize(
    ("file", "reason"),
    [(b"", "cut off"), (b"PGDMP" + bytes(60), "no backup"), (b"HTXB\2\0" + bytes(60), "format 2")],
)
async def test_other_files_are_told_apart(file: bytes, reason: str) -> None:
    """A file that is no backup, or of a later version, is refused with a sentence of its own."""
    with pytest.raises(BrokenBackup, match=reason):
        await unseal(file)


async def test_kept_backups_stay_readable() -> None:
    """A file that was sealed long ago opens: whatever changes here, the first format is still read."""
    kept = base64.b64encode(bytes(range(32))).decode()
    assert await unseal(base64.b64decode(KEPT), keys=Keys(mac={"k1": kept}, seal={"k1": kept})) == b"kept since 2026"


async def test_a_length_is_not_believed() -> None:
    """A frame that says to be longer than any is refused before it is waited for."""
    header, *_ = await seal()
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        yield header + b"\xff\xff\xff\xff"
        for given in range(1, 100):  # noqa: B007 - it is counted
            yield bytes(MEGABYTE)

    with pytest.raises(BrokenBackup, match="changed"):
        await anext(open_sealed(endless(), keys=KEYS, identity=IDENTITY))
    assert given == 0


async def test_nothing_is_told_from_a_sealed_file() -> None:
    """The plain bytes do not show, and the same ones are sealed differently each time."""
    sealed = b"".join(await seal(b"plain text"))
    assert b"plain" not in sealed
    assert b"".join(await seal(b"plain text"))[HEADER:] != sealed[HEADER:]


async def test_an_error_of_the_source_is_passed_on() -> None:
    """When the dump fails halfway so does the sealing, without an end that would make it whole."""

    async def failing() -> AsyncIterator[bytes]:
        yield os.urandom(MEGABYTE)
        raise ConnectionResetError

    sealing = Sealing(failing(), keys=KEYS, identity=IDENTITY)
    sealed = [await anext(sealing), await anext(sealing)]
    with pytest.raises(ConnectionResetError):
        await anext(sealing)
    with pytest.raises(BrokenBackup, match="cut off"):
        await unseal(*sealed)


async def test_memory_does_not_grow_with_the_size() -> None:
    """A stream of 200 MB, of which half shrinks to nothing, takes less than 30 MB on its way there and back."""

    async def long() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield os.urandom(MEGABYTE)
            yield bytes(MEGABYTE)

    before, most, size = resident(), 0, 0
    sealed = Sealing(long(), keys=KEYS, identity=IDENTITY)
    async for piece in open_sealed(sealed, keys=KEYS, identity=IDENTITY):
        size += len(piece)
        most = max(most, resident())
    assert size == 200 * MEGABYTE
    assert most - before < 30 * MEGABYTE


async def test_a_frame_of_zeros_does_not_open_at_once() -> None:
    """A hundred megabytes that shrank to a few kilobytes come out in pieces, and never stand in memory together."""
    sealed = b"".join(await seal(*[bytes(MEGABYTE)] * 100))
    assert len(sealed) < MEGABYTE / 10
    before, most = resident(), 0
    async for _ in open_sealed(stream(sealed), keys=KEYS, identity=IDENTITY):
        most = max(most, resident())
    assert most - before < 20 * MEGABYTE


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
