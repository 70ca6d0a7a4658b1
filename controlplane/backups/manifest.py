"""The manifest of a backup: what is in it, in a small JSON file beside it, signed so that nobody else can write one.

It is `{"manifest":…,"signature":"…"}`. The signature is taken of the text itself and checked before that is parsed.
"""

import hmac
import json
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from controlplane.backups.sealed import BrokenBackup, Identity
from controlplane.databases.engines.engine import Contents
from controlplane.keys import Keys

_START = '{"manifest":'
_SIGNATURE = ',"signature":"'
_PURPOSE = "backup manifest\n"  # so that nothing else we sign with these keys is taken for a manifest


class Manifest(BaseModel):
    """What a backup holds, and how it is checked.

    `sealed_bytes` and `sealed_sha256` (hexadecimal) are of the file as it is kept, `plain_bytes` of the dump in it;
    `key_id` is the server key without which it cannot be opened; `contents` are as of the moment of the dump.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    backup: Identity
    created_at: datetime
    sealed_bytes: int
    sealed_sha256: str
    plain_bytes: int
    key_id: str
    contents: Contents


def write_manifest(manifest: Manifest, *, keys: Keys) -> bytes:
    """Return the file of a manifest, signed with the newest key."""
    text = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return _signed(text, keys.digest(_PURPOSE + text))


def read_manifest(raw: bytes, *, keys: Keys, identity: Identity) -> Manifest:
    """Return what the file of a manifest says.

    Raises BrokenBackup if any of it was changed, no key of ours has signed it, or it is another backup's.
    """
    text = raw.decode(errors="replace").removeprefix(_START).rpartition(_SIGNATURE)[0]
    if not any(hmac.compare_digest(raw, _signed(text, digest)) for digest in keys.digests(_PURPOSE + text)):
        raise BrokenBackup("The backup's manifest was changed.")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError:
        raise BrokenBackup("The backup's manifest has a format that this version cannot read.") from None
    if manifest.backup != identity:
        raise BrokenBackup("The manifest is another backup's.")
    return manifest


def _signed(text: str, digest: str) -> bytes:
    return f'{_START}{text}{_SIGNATURE}{digest}"}}\n'.encode()
