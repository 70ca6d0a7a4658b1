"""Confines this process to some folders by Landlock: what a query reads or writes, the kernel checks.

ClickHouse's own rights do not suffice here: chDB lets the function `file()` and INTO OUTFILE reach everything.
"""

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

# The numbers of the calls are the same on all architectures (since Linux 5.13).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_PATH_BENEATH = 1
_NO_NEW_PRIVS = 38

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_ONE_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE
# How many rights the kernel knows, by the version of Landlock; later ones have no more about files.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_FILE_RIGHTS_NOW = 16
_CONNECT_AND_BIND = 3
_WITH_NETWORK = 4  # since Linux 6.7


class CannotConfine(Exception):
    """The kernel has no Landlock."""


def confine(*, readable: Iterable[Path], writable: Iterable[Path]) -> None:
    """Leave this process, for good, only what is beneath these folders, and no TCP where the kernel can tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, 0, _VERSION)
    if version < 1:
        raise CannotConfine("The embedded ClickHouse needs a kernel with Landlock: Linux 5.13 or later.")
    everything = (1 << _FILE_RIGHTS.get(version, _FILE_RIGHTS_NOW)) - 1
    network = _CONNECT_AND_BIND if version >= _WITH_NETWORK else 0
    attributes = struct.pack("QQ", everything, network) if network else struct.pack("Q", everything)
    rules = _call(libc, _CREATE_RULESET, attributes, len(attributes), 0)
    for paths, rights in ((readable, _READ), (writable, everything)):
        for path in paths:
            if path.exists():
                _allow(libc, rules, path, rights)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    _call(libc, _RESTRICT_SELF, rules, 0)
    os.close(rules)


def _allow(libc: ctypes.CDLL, rules: int, path: Path, rights: int) -> None:
    if not path.is_dir():
        rights &= _OF_ONE_FILE
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    _call(libc, _ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
    os.close(place)


def _call(libc: ctypes.CDLL, *arguments: int | bytes) -> int:
    result: int = libc.syscall(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result
