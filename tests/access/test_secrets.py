"""The form of secrets: what can be a token at all is seen without a look-up."""

import re
import string
import zlib

from hypothesis import given
from hypothesis import strategies as some

from controlplane.access.secrets import TOKEN_PATTERN, is_well_formed_token, new_session_secret, new_token

LETTERS = string.digits + string.ascii_letters


def test_a_token_has_one_form() -> None:
    """`htx_`, 30 random characters and a checksum of 6: one pattern finds each, for secret scanners."""
    tokens = {new_token() for _ in range(500)}
    assert len(tokens) == 500
    assert all(re.fullmatch(r"htx_[0-9A-Za-z]{36}", token) for token in tokens)
    assert all(is_well_formed_token(token) for token in tokens)
    assert TOKEN_PATTERN.search(f"export TOKEN={min(tokens)};") is not None
    assert len({token[4] for token in tokens}) > 40


def test_the_checksum_is_a_published_one() -> None:
    """The checksum is the CRC-32 of the random part in base 62, so that others can check it too."""
    token = new_token()
    digits = string.digits + string.ascii_uppercase + string.ascii_lowercase
    number = 0
    for digit in token[-6:]:
        number = number * 62 + digits.index(digit)
    assert number == zlib.crc32(token[4:-6].encode())


@given(at=some.integers(4, 39), letter=some.sampled_from(LETTERS))
def test_one_wrong_character_is_noticed(at: int, letter: str) -> None:
    """A token with any one character changed is none."""
    token = new_token()
    changed = token[:at] + letter + token[at + 1 :]
    assert is_well_formed_token(changed) == (changed == token)


@given(at=some.integers(4, 38))
def test_two_swapped_characters_are_noticed(at: int) -> None:
    """A token with two neighbours swapped is none."""
    token = new_token()
    changed = token[:at] + token[at + 1] + token[at] + token[at + 2 :]
    assert is_well_formed_token(changed) == (changed == token)


@given(some.text(max_size=50))
def test_nothing_else_is_a_token(text: str) -> None:
    """Chance does not make a token, nor does what is put before or behind one."""
    token = new_token()
    assert not is_well_formed_token(text)
    assert is_well_formed_token(text + token) == is_well_formed_token(token + text) == (not text)


def test_a_session_secret_is_long_and_fits_a_cookie() -> None:
    """256 random bits of characters that a cookie may have."""
    secrets = {new_session_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(re.fullmatch(r"[0-9A-Za-z_-]{43}", secret) for secret in secrets)
