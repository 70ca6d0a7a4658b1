"""The manifest of a backup: nobody but the server writes one, and each is one backup's."""

import base64
import json
import secrets
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from controlplane.backups.manifest import Manifest, read_manifest, write_manifest
from controlplane.backups.sealed import BrokenBackup, Identity
from controlplane.databases.engines.engine import Contents, Table
from controlplane.keys import Keys

IDENTITY = Identity(account_id="ac_1", database_id="db_1", object_name="h1234_1", backup_id="bk_1", engine="postgresql")
MANIFEST = Manifest(
    backup=IDENTITY,
    created_at=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    sealed_bytes=1234,
    sealed_sha256="ab" * 32,
    plain_bytes=5678,
    key_id="k1",
    contents=Contents({'public."Zoë, ""quoted"""': Table(rows=3, checksum="17"), "public.b": Table(0, "0")}),
)


def new_key() -> str:
    """Return a key as the file holds it."""
    return base64.b64encode(secrets.token_bytes(32)).decode()


KEYS = Keys(mac={"m1": new_key()}, seal={"k1": new_key()})


def test_what_is_written_is_read() -> None:
    """A manifest comes back as it was, and a person can read it with any JSON tool."""
    raw = write_manifest(MANIFEST, keys=KEYS)
    assert read_manifest(raw, keys=KEYS, identity=IDENTITY) == MANIFEST
    shown = json.loads(raw)
    assert shown["signature"].startswith("m1:")
    assert shown["manifest"]["version"] == 1
    assert shown["manifest"]["created_at"] == "2026-01-02T03:04:05.678901Z"
    assert shown["manifest"]["backup"]["backup_id"] == "bk_1"
    assert shown["manifest"]["contents"]["tables"]["public.b"] == {"rows": 0, "checksum": "0"}


def test_the_same_manifest_is_the_same_file() -> None:
    """The order in which tables were found does not change the text."""
    turned = MANIFEST.model_copy(update={"contents": Contents(dict(reversed(list(MANIFEST.contents.tables.items()))))})
    assert write_manifest(turned, keys=KEYS) == write_manifest(MANIFEST, keys=KEYS)


def test_each_bit_counts() -> None:
    """A manifest in which any single bit is flipped, or that ends too early or too late, is refused."""
    raw = write_manifest(MANIFEST, keys=KEYS)
    changed = [raw[:length] for length in range(len(raw))]
    changed += [raw + b"\n", raw + raw, raw.replace(b"{", b"{ ", 1)]
    for position in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[position // 8] ^= 1 << position % 8
        changed.append(bytes(flipped))
    for each in changed:
        with pytest.raises(BrokenBackup):
            read_manifest(each, keys=KEYS, identity=IDENTITY)


@pytest.mark.parametrize("field", ["account_id", "database_id", "backup_id", "engine"])
def test_a_manifest_is_one_backups(field: str) -> None:
    """A manifest that is put in the place of another's is refused, though its signature holds."""
    with pytest.raises(BrokenBackup, match="another backup's"):
        read_manifest(write_manifest(MANIFEST, keys=KEYS), keys=KEYS, identity=replace(IDENTITY, **{field: "other"}))


def test_an_old_key_still_vouches() -> None:
    """After a rotation old manifests hold, new ones are signed with the new key, and without its key none holds."""
    rotated = Keys(mac={"m2": new_key(), **KEYS.mac}, seal=KEYS.seal)
    raw = write_manifest(MANIFEST, keys=KEYS)
    assert read_manifest(raw, keys=rotated, identity=IDENTITY) == MANIFEST
    anew = write_manifest(MANIFEST, keys=rotated)
    assert json.loads(anew)["signature"].startswith("m2:")
    with pytest.raises(BrokenBackup):
        read_manifest(anew, keys=KEYS, identity=IDENTITY)


def test_a_signature_of_something_else_is_none() -> None:
    """A digest that the server made of the same text for another purpose does not make it a manifest."""
    text = json.dumps(json.loads(write_manifest(MANIFEST, keys=KEYS))["manifest"])
    forged = f'{{"manifest":{text},"signature":"{KEYS.digest(text)}"}}\n'.encode()
    with pytest.raises(BrokenBackup):
        read_manifest(forged, keys=KEYS, identity=IDENTITY)


def test_a_later_format_is_told() -> None:
    """A manifest that a later version has signed is refused with a sentence of its own."""
    later = MANIFEST.model_copy(update={"version": 2})
    with pytest.raises(BrokenBackup, match="format"):
        read_manifest(write_manifest(later, keys=KEYS), keys=KEYS, identity=IDENTITY)
