"""Passwords: argon2id, a bounded number at a time, because each takes 64 MiB and a core for a moment."""

import asyncio

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

_AT_A_TIME = 2


class Passwords:
    """Hashes and checks passwords off the event loop."""

    def __init__(self) -> None:
        self._hasher = PasswordHasher()  # the library's parameters are RFC 9106's second choice
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self._of_nobody = self._hasher.hash("the password of an account that does not exist")

    async def check(self, password: str, password_hash: str | None) -> bool:
        """Tell whether the password is right; without an account it takes as long and is wrong."""
        async with self._turns:
            return await asyncio.to_thread(self._matches, password, password_hash or self._of_nobody) and bool(
                password_hash
            )

    def _matches(self, password: str, password_hash: str) -> bool:
        try:
            return self._hasher.verify(password_hash, password)
        except (Argon2Error, InvalidHashError):
            return False


def hash_password(password: str) -> str:
    """Return what is stored of a password; this takes a moment."""
    return PasswordHasher().hash(password)
