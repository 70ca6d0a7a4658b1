"""Control groups, version 1 and 2: how much memory, how many processes and how much CPU a worker has.

Each host has a group of its own, and in it one for each worker. A group is also how a worker's processes are found,
whatever they did to hide, and how all of them are ended.
"""

import contextlib
import errno
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_CONTROLLERS = ("memory", "pids", "cpu")
_PERIOD = 100_000  # microseconds in which a share of the CPU is counted
_NO_LESS = 1_000  # the kernel takes no smaller quota
_SECONDS_TO_END = 10.0
_OURSELVES = "htx-control"  # where version 2 has us move to, see _Version2


class CgroupsUnavailable(Exception):
    """What is missing to limit memory, processes and CPU, and what to do about it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the processes of one group may use together; what is swapped out counts as memory."""

    memory_bytes: int
    processes: int


class Group(ABC):
    """The group of one worker."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders

    @property
    def entrances(self) -> list[Path]:
        """The files to write a process's id to, all of them, so that it belongs to the group."""
        return [folder / "cgroup.procs" for folder in self._unique]

    @property
    def pids(self) -> set[int]:
        """The processes in the group."""
        found: set[int] = set()
        for file in self.entrances:
            with contextlib.suppress(FileNotFoundError):
                found |= {int(line) for line in file.read_text().split()}
        return found

    def make(self, limits: Limits) -> None:
        """Make the group and limit it; raises OSError if any limit cannot be set."""
        for folder in self._unique:
            folder.mkdir()
        self._limit(limits)

    def remove(self) -> bool:
        """Remove the group; return False if there are still processes in it."""
        for folder in self._unique:
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno == errno.EBUSY:
                    return False
                raise
        return True

    @abstractmethod
    def set_cores(self, cores: float) -> None:
        """Let the group use so much CPU time a second, in seconds, from now on."""

    @abstractmethod
    def kill(self) -> None:
        """Begin to end all processes in the group, not waiting for their end."""

    @abstractmethod
    def memory_peak(self) -> int:
        """Return the most memory that the group ever used, in bytes."""

    @abstractmethod
    def oom_kills(self) -> int:
        """Return how many of its processes the kernel has ended because the memory was used up."""

    @abstractmethod
    def _limit(self, limits: Limits) -> None: ...

    @property
    def _unique(self) -> list[Path]:
        return list(dict.fromkeys(self._folders.values()))

    def _write(self, controller: str, file: str, value: object) -> None:
        (self._folders[controller] / file).write_text(str(value))

    def _read(self, controller: str, file: str) -> str:
        return (self._folders[controller] / file).read_text()


class _Group1(Group):
    """Version 1: a folder for each controller."""

    def set_cores(self, cores: float) -> None:
        self._write("cpu", "cpu.cfs_quota_us", max(_NO_LESS, int(cores * _PERIOD)))

    def kill(self) -> None:
        """Send SIGKILL to each. What they start meanwhile takes another call, until `remove()` succeeds."""
        with contextlib.ExitStack() as held:
            handles = {}
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    handles[pid] = os.pidfd_open(pid)
                    held.callback(os.close, handles[pid])
            # A handle stays with its process, a number may be somebody else's by now: hence the second look.
            for pid in self.pids & handles.keys():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handles[pid], signal.SIGKILL)

    def memory_peak(self) -> int:
        return int(self._read("memory", "memory.max_usage_in_bytes"))

    def oom_kills(self) -> int:
        return _counter(self._read("memory", "memory.oom_control"), "oom_kill")

    def _limit(self, limits: Limits) -> None:
        self._write("memory", "memory.limit_in_bytes", limits.memory_bytes)
        self._write("memory", "memory.memsw.limit_in_bytes", limits.memory_bytes)  # memory and swap together
        self._write("pids", "pids.max", limits.processes)
        self._write("cpu", "cpu.cfs_period_us", _PERIOD)


class _Group2(Group):
    """Version 2: one folder for all controllers."""

    def set_cores(self, cores: float) -> None:
        self._write("cpu", "cpu.max", f"{max(_NO_LESS, int(cores * _PERIOD))} {_PERIOD}")

    def kill(self) -> None:
        """End all at once; the kernel leaves no fork behind."""
        with contextlib.suppress(FileNotFoundError):
            self._write("cpu", "cgroup.kill", 1)

    def memory_peak(self) -> int:
        return int(self._read("memory", "memory.peak"))

    def oom_kills(self) -> int:
        return _counter(self._read("memory", "memory.events"), "oom_kill")

    def _limit(self, limits: Limits) -> None:
        self._write("memory", "memory.max", limits.memory_bytes)
        self._write("memory", "memory.swap.max", 0)
        self._write("memory", "memory.oom.group", 1)  # or a worker would live on with half of its processes
        self._write("pids", "pids.max", limits.processes)


def _counter(text: str, name: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.split()[:1] == [name]), 0)


class Groups:
    """The group of one host: `name` has to be its own on this machine."""

    def __init__(self, folders: Mapping[str, Path], kind: type[Group]) -> None:
        self._folders = folders
        self._kind = kind

    @classmethod
    def open(cls, name: str) -> Self:
        """Make the host's group; one that is left of it is taken, and what is in it is ended.

        Raises CgroupsUnavailable.
        """
        try:
            if (unified := _mounts("cgroup2")) and _is_unified(unified[0][0]):
                groups = cls(_prepare_version2(unified[0][0], name), _Group2)
            else:
                groups = cls(_prepare_version1(name), _Group1)
            groups._end_leftovers()
        except OSError as error:
            raise CgroupsUnavailable(f"The control groups cannot be used: {error}. {_HOW_TO_DELEGATE}") from error
        return groups

    def group(self, name: str) -> Group:
        """Return the group of one worker, which need not be there yet."""
        return self._kind({controller: folder / name for controller, folder in self._folders.items()})

    def close(self) -> None:
        """Remove the host's group; its workers' must be gone."""
        self._kind(self._folders).remove()

    def _end_leftovers(self) -> None:
        names = {each.name for folder in self._folders.values() for each in folder.iterdir() if each.is_dir()}
        last = time.monotonic() + _SECONDS_TO_END
        for group in map(self.group, names):
            while not group.remove():
                if time.monotonic() > last:
                    raise CgroupsUnavailable(f"Processes of an earlier host do not end: {sorted(group.pids)}.")
                group.kill()
                time.sleep(0.005)


_HOW_TO_DELEGATE = "Run as root; under systemd in a unit with Delegate=yes, in a container with a writable cgroup."


def _mounts(kind: str) -> list[tuple[Path, list[str]]]:
    """Return where hierarchies of this kind are mounted, and with which options."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.split()[0] == kind:
            found.append((Path(left.split()[4]), right.split()[2].split(",")))
    return found


def _is_unified(root: Path) -> bool:
    """Return whether version 2 has the controllers: where both are mounted, version 1 may have them."""
    return set(_CONTROLLERS) <= set((root / "cgroup.controllers").read_text().split())


def _prepare_version1(name: str) -> dict[str, Path]:
    roots = {each: path for path, options in _mounts("cgroup") for each in _CONTROLLERS if each in options}
    if missing := [each for each in _CONTROLLERS if each not in roots]:
        raise CgroupsUnavailable(
            f"The kernel offers no control groups for {', '.join(missing)}: mount cgroup2, or boot with"
            " systemd.unified_cgroup_hierarchy=1."
        )
    folders = {controller: root / name for controller, root in roots.items()}
    _make(folders.values())
    if not (folders["memory"] / "memory.memsw.limit_in_bytes").exists():
        raise CgroupsUnavailable("The kernel does not count swap: boot with swapaccount=1.")
    return folders


def _prepare_version2(root: Path, name: str) -> dict[str, Path]:
    """Make a group below our own.

    A group with processes of its own may hand no controllers down, so we move into one beside the workers'.
    """
    path = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    own = root / path.removeprefix("0::").lstrip("/")
    if own.name == _OURSELVES:
        own = own.parent
    try:
        _hand_down(own)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        if own != root and not _is_delegated(own):
            raise CgroupsUnavailable(f"The control group {own} is not ours to divide. {_HOW_TO_DELEGATE}") from None
        _make([own / _OURSELVES])
        for pid in (own / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (own / _OURSELVES / "cgroup.procs").write_text(pid)
        _hand_down(own)
    folder = own / name
    _make([folder])
    _hand_down(folder)
    if not (folder / "cgroup.kill").exists() or not (folder / "memory.peak").exists():
        raise CgroupsUnavailable("The kernel is too old for its control groups of version 2: Linux 5.19 or later.")
    return dict.fromkeys(_CONTROLLERS, folder)


def _hand_down(group: Path) -> None:
    if missing := [each for each in _CONTROLLERS if each not in (group / "cgroup.controllers").read_text().split()]:
        raise CgroupsUnavailable(
            f"The control group {group} has not been given {', '.join(missing)}. {_HOW_TO_DELEGATE}"
        )
    (group / "cgroup.subtree_control").write_text(" ".join(f"+{each}" for each in _CONTROLLERS))


def _is_delegated(group: Path) -> bool:
    """Return whether systemd has left this group to its service."""
    for mark in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            return os.getxattr(group, mark) == b"1"
    return False


def _make(folders: Iterable[Path]) -> None:
    for folder in folders:
        folder.mkdir(exist_ok=True)
