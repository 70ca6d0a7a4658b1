"""The secrets that callers hold: how they are made, and how a typo is told from a real one without a look-up."""

import re
import secrets
import string
import zlib

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_RANDOM = 30
_CHECKSUM = 6
TOKEN_PREFIX = "htx_"  # noqa: S105 - the part of a token that everybody knows
_BODY = re.compile(rf"[0-9A-Za-z]{{{_RANDOM + _CHECKSUM}}}")
TOKEN_PATTERN = re.compile(TOKEN_PREFIX + _BODY.pattern)
_HOST_PREFIX = "hth_"
SHOWN_PREFIX = len(TOKEN_PREFIX) + 4


def new_token() -> str:
    """Return a new token: `htx_`, 30 random base62 characters (178 bits), and their CRC-32 in base62."""
    return _new(TOKEN_PREFIX)


def is_well_formed_token(text: str) -> bool:
    """Tell whether this can be a token at all: the form and the checksum hold."""
    return _is_well_formed(text, TOKEN_PREFIX)


def new_host_secret() -> str:
    """Return a new secret for a host of a data plane: `hth_`, and the rest as in a token."""
    return _new(_HOST_PREFIX)


def is_well_formed_host_secret(text: str) -> bool:
    """Tell whether this can be a host's secret at all."""
    return _is_well_formed(text, _HOST_PREFIX)


def new_session_secret() -> str:
    """Return a new secret for a session cookie, of 256 random bits."""
    return secrets.token_urlsafe(32)


def _new(prefix: str) -> str:
    body = "".join(secrets.choice(_BASE62) for _ in range(_RANDOM))
    return f"{prefix}{body}{_checksum(body)}"


def _is_well_formed(text: str, prefix: str) -> bool:
    body = text[len(prefix) :]
    if not text.startswith(prefix) or _BODY.fullmatch(body) is None:
        return False
    return _checksum(body[:_RANDOM]) == body[_RANDOM:]


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    digits = []
    for _ in range(_CHECKSUM):
        number, digit = divmod(number, len(_BASE62))
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))
