"""Checking passwords: at what price, and for how many at once."""

import asyncio

import pytest
from argon2 import PasswordHasher

from controlplane.accounts.passwords import Passwords, hash_password
from controlplane.errors import Unavailable

PASSWORD = "correct horse battery staple"
QUICK = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)


@pytest.fixture(scope="module")
def passwords() -> Passwords:
    """What hashes and checks."""
    return Passwords()


async def test_what_was_hashed_is_recognised(passwords: Passwords) -> None:
    """A password holds against its own hash, whichever way that was made, and no other does."""
    made = await passwords.hash(PASSWORD)
    assert made != await passwords.hash(PASSWORD)
    for password_hash in (made, hash_password(PASSWORD)):
        assert "$argon2id$v=19$m=65536,t=3,p=4$" in password_hash
        assert await passwords.check(PASSWORD, password_hash)
        assert not await passwords.check(PASSWORD + " ", password_hash)


@pytest.mark.parametrize("password_hash", [None, "", "not a hash"])
async def test_nothing_matches_what_is_no_hash(passwords: Passwords, password_hash: str | None) -> None:
    """Where there is no password, none is right, not even the one that stands in for it."""
    for password in ("", PASSWORD, "the password of an account that does not exist"):
        assert not await passwords.check(password, password_hash)


async def test_a_flood_has_a_bound(passwords: Passwords) -> None:
    """Of 200 checks at once two are worked on and 10 wait; afterwards all is as before."""
    answers = await asyncio.gather(*(passwords.check(PASSWORD, QUICK) for _ in range(200)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [bool] * 12 + [Unavailable] * 188
    assert all(answers[:12])
    assert await passwords.check(PASSWORD, QUICK)
