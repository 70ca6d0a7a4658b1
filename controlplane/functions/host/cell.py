"""One process in the sandbox: how it is started, and how it and whatever it has started is ended."""

import asyncio
import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from controlplane.functions.host.cgroups import Group
from controlplane.functions.host.network import Network

MB = 1 << 20
_OPEN_FILES = 1024
_LARGEST_TMP = 64 * MB
_SHARED_MEMORY = 16 * MB
_ENVIRONMENT = {"PATH": "/usr/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}  # noqa: S108 - its own
_SECONDS_TO_END = 10.0
_FREE_DESCRIPTOR = 10

# Joins the control groups, is the first to go if the machine itself runs out of memory, and gives the program our end
# of the channel as descriptor 3. In a shell, because Python code between fork and exec may deadlock where there are
# threads.
_LAUNCH = (
    'while [ "$1" != -- ]; do echo 0 >"$1" || exit; shift; done; shift;'
    ' echo 1000 >/proc/self/oom_score_adj; exec "$@" 3<&0 </dev/null'
)

_log = structlog.get_logger("functions")


@dataclass(frozen=True, slots=True)
class Confined:
    """What is to run: for whom, on what, and with how much memory, to which its files in /tmp count."""

    tenant: str
    command: Sequence[str]
    folder: str  # where it starts
    mounts: Mapping[str, Path]  # the machine's path by the path within; all of them read-only
    memory_mb: int
    network: bool = False  # whether it gets into the internet


class Cell:
    """A running process in the sandbox, and whatever it has started."""

    def __init__(
        self, process: asyncio.subprocess.Process, group: Group, *, uid: int, network: Network | None = None
    ) -> None:
        self.uid = uid
        self.group = group
        self.is_out_of_memory = False
        self._process = process
        self._network = network
        self._peak = 0
        self.ended = asyncio.create_task(self._clean_up())  # done when nothing of it is there any more
        if network:
            network.ended.add_done_callback(lambda _: self.kill())  # another worker then gets another network

    @property
    def status(self) -> int | None:
        """How it ended: its exit status, 128 and a signal's number, or minus that of one from us; None if it runs."""
        return self._process.returncode

    def memory_peak(self) -> int:
        """Return the most memory that all of it has used together at any time, in bytes."""
        with contextlib.suppress(FileNotFoundError):  # it is gone, and this is what we saw last
            self._peak = self.group.memory_peak()
        return self._peak

    def kill(self) -> None:
        """Begin to end everything in it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self.group.kill()

    async def _clean_up(self) -> None:
        await self._process.wait()
        self.memory_peak()
        self.is_out_of_memory = self.group.oom_kills() > 0
        await remove(self.group)
        if self._network:
            await self._network.ended


async def launch(
    confined: Confined,
    *,
    programs: Mapping[str, str],
    group: Group,
    uid: int,
    network: Network | None,
    filter_file: Path,
    channel: socket.socket,
    stdout: int,
    stderr: int,
) -> Cell:
    """Start a process; `channel` is its descriptor 3, `uid` its user outside. Raises OSError."""
    with _handed_on(os.open(filter_file, os.O_RDONLY)) as calls:
        process = await asyncio.create_subprocess_exec(
            *(programs["sh"], "-c", _LAUNCH, "launch", *map(str, group.entrances), "--"),
            *((programs["nsenter"], f"--net={network.path}") if network else ()),
            # With 0 the kernel would still start the program, as root, that a machine may have for core dumps.
            *(programs["prlimit"], "--core=1:1", f"--nofile={_OPEN_FILES}:{_OPEN_FILES}"),
            *(f"--fsize={_LARGEST_TMP}:{_LARGEST_TMP}", "--msgqueue=0:0"),
            # First of all: for bubblewrap started by root, the user within would be root outside.
            *(programs["setpriv"], f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs"),
            *("--bounding-set=-all", "--inh-caps=-all"),
            *(programs["bwrap"], "--seccomp", str(calls), *_bubblewrap(confined), *confined.command),
            stdin=channel.fileno(),
            stdout=stdout,
            stderr=stderr,
            pass_fds=(calls,),
            env={},
            cwd="/",
            start_new_session=True,  # Ctrl-C is for us
        )
    return Cell(process, group, uid=uid, network=network)


async def remove(group: Group) -> None:
    """End whatever is in a group until it is empty, and remove it."""
    started = time.monotonic()
    while not group.remove():
        group.kill()
        if (waited := time.monotonic() - started) > _SECONDS_TO_END:
            _log.warning("a function's processes do not end", pids=sorted(group.pids))
        await asyncio.sleep(0.002 + waited / 10)


def _bubblewrap(confined: Confined) -> Iterator[str]:
    yield from ("--unshare-all", "--unshare-user", "--unshare-cgroup", "--uid", "65534", "--gid", "65534")
    if confined.network:  # it has joined one
        yield "--share-net"
    yield from ("--hostname", "function", "--cap-drop", "ALL", "--die-with-parent", "--new-session")
    for within, path in sorted(confined.mounts.items()):
        yield from ("--ro-bind", str(path), within)
    yield from ("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64")
    yield from ("--proc", "/proc", "--dev", "/dev")
    tmp = min(_LARGEST_TMP, confined.memory_mb * MB // 2)
    for folder, size in (("/dev/shm", _SHARED_MEMORY), ("/tmp", tmp)):  # noqa: S108 - in there they are its own
        yield from ("--size", str(size), "--tmpfs", folder)
    # What bubblewrap makes is a tmpfs too, of no size: nobody may write there.
    yield from ("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", confined.folder, "--clearenv")
    for name, value in _ENVIRONMENT.items():
        yield from ("--setenv", name, value)


@contextlib.contextmanager
def _handed_on(descriptor: int) -> Iterator[int]:
    """Close a descriptor, but for as long as a program is started give it a number that the shell leaves alone."""
    try:
        moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FREE_DESCRIPTOR)
    finally:
        os.close(descriptor)
    try:
        yield moved
    finally:
        os.close(moved)
