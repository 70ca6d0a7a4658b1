"""Ids of resources: a prefix that names the kind, then time and chance, so that ids sort by age."""

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
_LENGTH = 26


def new_id(prefix: str) -> str:
    """Return a new id such as `db_06fq2v9n7ke4w0xg5s1dzr8tbc`.

    Its 128 bits are 64 of nanoseconds and 64 of chance: ids sort in the order in which they were made, and nobody
    guesses one. Only lower-case letters, digits and the underscore, so that it is an identifier in every engine.
    """
    number = time.time_ns() << 64 | secrets.randbits(64)
    digits = (_ALPHABET[number >> 5 * place & 31] for place in reversed(range(_LENGTH)))
    return f"{prefix}_{''.join(digits)}"
