"""Passwords: argon2id, a bounded number at a time, because each takes 64 MiB and a core for a moment."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from controlplane.errors import Unavailable

T = TypeVar("T")
_AT_A_TIME = 2
_WAITING = 10  # a second of work on idle cores; on busy ones the last of them still gets an answer before a time-out


class Passwords:
    """Hashes and checks passwords off the event loop, two at a time: that is 128 MiB at the most.

    10 more may wait for their turn. Whoever comes then gets Unavailable before any work is done, so a flood of logins
    costs neither memory nor everybody's time.
    """

    def __init__(self) -> None:
        self._hasher = PasswordHasher()  # the library's parameters are RFC 9106's second choice
        self._threads = ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="password")
        self._inside = 0
        self._of_nobody = self._hasher.hash("the password of an account that does not exist")

    async def check(self, password: str, password_hash: str | None) -> bool:
        """Tell whether the password is right; without a hash to hold it against it takes as long and is wrong.

        Raises Unavailable.
        """
        matches = await self._in_turn(lambda: self._matches(password, password_hash or self._of_nobody))
        return matches and bool(password_hash)

    async def hash(self, password: str) -> str:
        """Return what is stored of a password.

        Raises Unavailable.
        """
        return await self._in_turn(lambda: self._hasher.hash(password))

    async def _in_turn(self, work: Callable[[], T]) -> T:
        if self._inside >= _AT_A_TIME + _WAITING:
            raise Unavailable
        self._inside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._inside -= 1

    def _matches(self, password: str, password_hash: str) -> bool:
        try:
            return self._hasher.verify(password_hash, password)
        except (Argon2Error, InvalidHashError):
            return False


def hash_password(password: str) -> str:
    """Return what is stored of a password; this takes a moment."""
    return PasswordHasher().hash(password)
