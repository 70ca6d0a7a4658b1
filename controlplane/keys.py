"""The server's keys: one family to recognise secrets by, one to keep secrets with.

Each key has an id that is stored beside what it made, so that a new key can be put first while the old ones still
recognise and open what they made.
"""

import base64
import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Annotated, Self

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from controlplane.operator_error import OperatorError

_KEY_BYTES = 32
_NONCE_BYTES = 12  # NIST SP 800-38D: 96 bits


class KeyFileError(OperatorError):
    """The key file cannot be used; the message says why."""


def _checked(key: str) -> str:
    try:
        raw = base64.b64decode(key, validate=True)
    except ValueError:
        raise ValueError("is not base64") from None
    if len(raw) != _KEY_BYTES:
        raise ValueError(f"must be {_KEY_BYTES} bytes in base64, and is {len(raw)}")
    return key


# No colon: that is where the id ends. The length fits into a byte: backups begin with it.
KeyId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$", max_length=255)]
Key = Annotated[str, AfterValidator(_checked)]


class Keys(BaseModel):
    """The keys, newest first in each family, as `{id: 32 bytes in base64}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    mac: dict[KeyId, Key] = Field(min_length=1)
    seal: dict[KeyId, Key] = Field(min_length=1)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the key file; make one, readable by its owner only, if there is none.

        Raises KeyFileError if it cannot be read.
        """
        if not path.exists():
            _write_new(path)
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise KeyFileError(f"The key file {path} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise KeyFileError(f"The key file {path} cannot be used: {problems.removeprefix(': ')}") from None

    def digest(self, secret: str) -> str:
        """Return what is stored to recognise `secret` by, under the newest key: `id:hex`."""
        return _digest(next(iter(self.mac.items())), secret)

    def digests(self, secret: str) -> list[str]:
        """Return what may have been stored for `secret`, one digest per key."""
        return [_digest(key, secret) for key in self.mac.items()]

    def encrypt(self, plain: bytes, *, bound_to: str) -> str:
        """Return `plain` encrypted (AES-256-GCM) as `id:base64`; it opens only for the same `bound_to`."""
        key_id, key = next(iter(self.seal.items()))
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = AESGCM(base64.b64decode(key)).encrypt(nonce, plain, bound_to.encode())
        return f"{key_id}:{base64.b64encode(nonce + sealed).decode()}"

    def decrypt(self, sealed: str, *, bound_to: str) -> bytes:
        """Return what `encrypt` was given.

        Raises cryptography's InvalidTag if it was changed or is bound to something else.
        """
        key_id, _, text = sealed.partition(":")
        raw = base64.b64decode(text)
        key = AESGCM(base64.b64decode(self.seal[key_id]))
        return key.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], bound_to.encode())

    def derive(self, purpose: str, salt: bytes, *, key_id: str | None = None) -> tuple[str, bytes]:
        """Return a key of 32 bytes for one purpose and one salt (HKDF-SHA256), and the id of the key it was made of.

        That is the newest key to seal with, or the one with this id. Raises KeyError if there is none.
        """
        key_id = key_id if key_id is not None else next(iter(self.seal))
        made_of = base64.b64decode(self.seal[key_id])
        made = HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=salt, info=purpose.encode()).derive(made_of)
        return key_id, made


def _digest(key: tuple[str, str], secret: str) -> str:
    key_id, text = key
    return f"{key_id}:{hmac.new(base64.b64decode(text), secret.encode(), hashlib.sha256).hexdigest()}"


def _write_new(path: Path) -> None:
    """Write a new key file so that a crash leaves either none or a whole one, and a racing process's file stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = {family: {"k1": base64.b64encode(secrets.token_bytes(_KEY_BYTES)).decode()} for family in ("mac", "seal")}
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(aside, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
        json.dump(new, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(aside, path)
    except FileExistsError:
        pass
    finally:
        aside.unlink()
