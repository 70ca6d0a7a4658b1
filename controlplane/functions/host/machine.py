"""What the machine must have before a function may run on it; each check gives sentences that say what to do."""

import os
import pwd
from collections.abc import Iterator, Mapping
from pathlib import Path

_PYTHON = Path("/usr/bin/python3")
_PACKAGES = {"sh": "dash", "bwrap": "bubblewrap", "setpriv": "util-linux", "prlimit": "util-linux"}
_LOWEST_UID = 1000  # below are the system's own
PROGRAMS = tuple(_PACKAGES)


def look_at_machine(programs: Mapping[str, str]) -> Iterator[str]:
    """Look for the user that we have to be, for programs (their paths by name) and for namespaces."""
    if os.geteuid() != 0:
        yield "Functions need root: each tenant's are run by a user of their own, in control groups."
    for name, package in _PACKAGES.items():
        if not programs.get(name):
            yield f"There is no {name}: apt-get install {package}."
    if not _PYTHON.exists():
        yield f"There is no {_PYTHON}: apt-get install python3."
    for switch, how in (("user/max_user_namespaces", 65536), ("kernel/unprivileged_userns_clone", 1)):
        file = Path("/proc/sys") / switch
        if file.exists() and int(file.read_text()) == 0:
            yield f"User namespaces are switched off: sysctl {switch.replace('/', '.')}={how}."


def look_at_folder(folder: Path) -> Iterator[str]:
    """Look whether a tenant's user can pass through."""
    for each in (folder, *folder.parents):
        if not each.stat().st_mode & 0o001:
            yield f"The functions' users cannot pass through {each}: chmod o+x {each}, or choose another folder."


def look_at_uids(uids: range) -> Iterator[str]:
    """Look whether the uids are nobody's."""
    if not uids or uids.start < _LOWEST_UID or uids.step != 1:
        yield f"The functions' users {uids} must begin at {_LOWEST_UID} or later, and be at least one."
    for user in pwd.getpwall():
        if user.pw_uid in uids:
            yield f"The uid {user.pw_uid} belongs to the user {user.pw_name}: choose other uids for functions."
