"""The sandbox in which customers' functions run: bubblewrap, a list of system calls, control groups, a user per tenant.

A cell is one process, and whatever it starts, in namespaces of its own: it sees its code, its runtime and a small
/tmp; no other process, nothing of the machine's, and no network unless it is to have one (`network.py`). Where any of
this cannot be enforced, nothing is run.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any, Self

import structlog

from controlplane.access.caller import Network as Refused
from controlplane.functions.host.cell import MB, Cell, Confined, launch, remove
from controlplane.functions.host.cgroups import CgroupsUnavailable, Groups, Limits
from controlplane.functions.host.machine import PROGRAMS, look_at_folder, look_at_machine, look_at_uids
from controlplane.functions.host.network import NAMESERVER, Network, look_at_network
from controlplane.functions.host.network import PROGRAMS as NETWORK_PROGRAMS
from controlplane.functions.host.runtimes import Name, Runtime, find_runtimes
from controlplane.functions.host.seccomp import NoSeccomp, make_filter
from controlplane.operator_error import OperatorError

PROCESSES = 128  # of a cell, threads counted; three of them are bubblewrap's, one the network's
CORES = 1.0

_SYSTEM_FOLDERS = "/usr/bin:/usr/sbin:/bin:/sbin"
_ETC = {
    "passwd": "function:x:65534:65534::/tmp:/usr/sbin/nologin\n",
    "group": "function:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
_ETC_WITH_NETWORK = {
    **_ETC,
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "resolv.conf": f"nameserver {NAMESERVER}\n",
}
# Whom to trust, of the package ca-certificates, where OpenSSL looks by itself.
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_CERTIFICATES_WITHIN = "/usr/lib/ssl/cert.pem"

_PROBE_MB = 64
_PROBE_SECONDS = 20.0

_log = structlog.get_logger("functions")


class SandboxUnavailable(OperatorError):
    """Functions cannot be run safely here; `problems` has all that is missing, in sentences that say what to do."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(" ".join(problems))
        self.problems = list(problems)


class Sandbox:
    """What this machine has to run functions with: one for each host and its folder. Made by `open()`.

    `network` is whether cells can get into the internet, for whoever has to refuse a function that wants to.
    `refused_networks` are the provider's own, where cells that are started from now on do not get.
    """

    def __init__(
        self,
        *,
        folder: Path,
        uids: range,
        groups: Groups,
        programs: Mapping[str, str],
        runtimes: Mapping[Name, Runtime],
        lock: int,
        network: bool,
        refused_networks: Sequence[Refused],
    ) -> None:
        self.runtimes = runtimes
        self.network = network
        self.refused_networks = refused_networks
        self._folder = folder
        self._uids = uids
        self._groups = groups
        self._programs = programs
        self._lock = lock
        self._number = 0
        self._uid_of: dict[str, int] = {}  # of tenants that have cells, and of their networks
        self._cells_of: Counter[str] = Counter()
        self._cells: set[Cell] = set()

    @classmethod
    def open(cls, folder: Path, uids: range, *, refused_networks: Sequence[Refused] = ()) -> Self:
        """Get everything ready, and end what a host of this folder that was killed has left behind.

        Every tenant with a running function has one of `uids`, and a second one for its networks; they must be nobody
        else's on this machine, another host's neither. The code of functions lies below `folder`, which every user must
        be able to pass through.
        Blocks for a moment. Raises SandboxUnavailable.
        """
        folder = folder.resolve()
        programs = {name: shutil.which(name, path=_SYSTEM_FOLDERS) or "" for name in (*PROGRAMS, *NETWORK_PROGRAMS)}
        problems = [*look_at_machine(programs), *look_at_uids(uids)]
        if os.geteuid() != 0:  # so nothing else can be found out either
            raise SandboxUnavailable(problems)
        try:
            lock = _lock(folder)
        except BlockingIOError:
            problems.append(f"Another host uses {folder}: stop it, or choose another folder.")
            raise SandboxUnavailable(problems) from None
        except OSError as error:
            problems.append(f"The folder {folder} cannot be used: {error}.")
            raise SandboxUnavailable(problems) from error
        problems += look_at_folder(folder)
        runtimes, groups = {}, None
        try:
            runtimes = _furnish(folder)
        except (OSError, CalledProcessError, NoSeccomp) as error:
            problems.append(f"What functions need cannot be made ready: {error}.")
        try:
            groups = Groups.open(f"htx-functions-{hashlib.sha256(bytes(folder)).hexdigest()[:12]}")
        except CgroupsUnavailable as error:
            problems.append(str(error))
        if groups is None or problems:
            if groups is not None:
                groups.close()
            os.close(lock)
            raise SandboxUnavailable(problems)
        if no_network := list(look_at_network(programs, uids.start)):
            _log.info("functions get no network", why=no_network)
        return cls(
            folder=folder,
            uids=uids,
            groups=groups,
            programs=programs,
            runtimes=runtimes,
            lock=lock,
            network=not no_network,
            refused_networks=refused_networks,
        )

    async def check(self) -> list[str]:
        """Try it: have a process in a cell look around, look at it from outside; return what is not as it must be."""
        python = self.runtimes["python3"]
        probe = Confined(
            tenant="",
            command=(*python.command[:-1], "/runtime/probe.py", str(2 * _PROBE_MB)),
            folder="/tmp",  # noqa: S108 - its own
            mounts=python.mounts,
            memory_mb=_PROBE_MB,
        )
        with tempfile.TemporaryFile() as output:
            ours, theirs = socket.socketpair()
            with theirs:
                cell = await self.start(probe, channel=theirs, stdout=output.fileno(), stderr=output.fileno())
            reader, writer = await asyncio.open_connection(sock=ours)
            try:
                async with asyncio.timeout(_PROBE_SECONDS):
                    facts = json.loads(await reader.readline())
                    problems = [*_look_from_within(facts), *_look_from_outside(cell)]
                    writer.write(b"\n")
                    await asyncio.shield(cell.ended)
            except (TimeoutError, OSError, ValueError):
                output.seek(0)
                said = output.read().decode(errors="replace").strip()
                return [f"A process in the sandbox does not come up: {said or 'it says nothing'}."]
            finally:
                writer.close()
                cell.kill()
                await asyncio.shield(cell.ended)
        if not cell.is_out_of_memory:
            problems.append(f"A process in the sandbox may use more memory than its {_PROBE_MB} MB.")
        return problems

    async def start(self, confined: Confined, *, channel: socket.socket, stdout: int, stderr: int) -> Cell:
        """Start a process; `channel` becomes its descriptor 3. Raises SandboxUnavailable."""
        self._number += 1
        group = self._groups.group(str(self._number))
        with ExitStack() as begun:
            uid = self._take_uid(confined.tenant, begun)
            network = None
            try:
                group.make(Limits(memory_bytes=confined.memory_mb * MB, processes=PROCESSES))
                group.set_cores(CORES)
                if confined.network:
                    network = await Network.open(
                        programs=self._programs,
                        group=group,
                        uid=self._take_uid(f"{confined.tenant}'s networks", begun),
                        refused=self.refused_networks,
                    )
                cell = await launch(
                    replace(confined, mounts={**confined.mounts, **self._mounts(network=confined.network)}),
                    programs=self._programs,
                    group=group,
                    uid=uid,
                    network=network,
                    filter_file=self._folder / "calls.bpf",
                    channel=channel,
                    stdout=stdout,
                    stderr=stderr,
                )
            except BaseException as error:
                await remove(group)
                if isinstance(error, OSError):
                    raise SandboxUnavailable([f"A process in the sandbox cannot be started: {error}."]) from error
                raise
            taken = begun.pop_all()
        self._cells.add(cell)
        cell.ended.add_done_callback(lambda _: self._see_off(cell, taken))
        return cell

    async def close(self) -> None:
        """End all cells, and leave nothing in the control groups; nothing happens the second time."""
        if self._lock < 0:
            return
        for cell in self._cells:
            cell.kill()
        await asyncio.gather(*(cell.ended for cell in self._cells))
        self._groups.close()
        os.close(self._lock)
        self._lock = -1

    def _mounts(self, *, network: bool) -> dict[str, Path]:
        if not network:
            return {"/etc": self._folder / "etc"}
        trust = {_CERTIFICATES_WITHIN: _CERTIFICATES} if _CERTIFICATES.exists() else {}
        return {"/etc": self._folder / "etc-with-network", **trust}

    def _see_off(self, cell: Cell, taken: ExitStack) -> None:
        self._cells.discard(cell)
        taken.close()

    def _take_uid(self, name: str, taken: ExitStack) -> int:
        """Return the uid of a tenant, or of its networks; it is nobody else's until all who took it have closed."""
        if name not in self._uid_of:
            in_use = set(self._uid_of.values())
            uid = next((each for each in self._uids if each not in in_use), None)
            if uid is None:
                raise SandboxUnavailable([f"All {len(self._uids)} users for functions are in use: allow for more."])
            self._uid_of[name] = uid
        self._cells_of[name] += 1
        taken.callback(self._give_back_uid, name)
        return self._uid_of[name]

    def _give_back_uid(self, name: str) -> None:
        self._cells_of[name] -= 1
        if not self._cells_of[name]:
            del self._cells_of[name], self._uid_of[name]


def _lock(folder: Path) -> int:
    folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    lock = os.open(folder / "sandbox.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _furnish(folder: Path) -> dict[Name, Runtime]:
    """Put into the folder what cells need, and return the runtimes."""
    for etc, files in ((folder / "etc", _ETC), (folder / "etc-with-network", _ETC_WITH_NETWORK)):
        etc.mkdir(exist_ok=True)
        etc.chmod(0o755)
        for name, text in files.items():
            (etc / name).write_text(text)
            (etc / name).chmod(0o644)
    (folder / "calls.bpf").write_bytes(make_filter())
    return find_runtimes(folder)


def _look_from_within(facts: Mapping[str, Any]) -> Iterator[str]:
    """Compare what the probe has found with what it must be."""
    expected = {
        "user": 65534,
        "capabilities": 0,
        "filter": 2,
        "no_new_privileges": 1,
        "interfaces": ["lo"],
        "processes": ["1", "2"],
        "writable": ["/dev/shm", "/tmp"],  # noqa: S108 - these are the cell's own
        "can_unshare": False,
    }
    for name, value in expected.items():
        if facts[name] != value:
            yield f"In the sandbox '{name}' is {facts[name]!r}, and must be {value!r}."
    if not 0 < facts["forks"] < PROCESSES:
        yield f"In the sandbox {facts['forks']} processes can be started, and must be fewer than {PROCESSES}."


def _look_from_outside(cell: Cell) -> Iterator[str]:
    """Compare what the processes in the cell's group are to this machine with what they must be."""
    statuses = [_status(pid) for pid in cell.group.pids]
    users = {user for status in statuses for user in status["Uid"].split()}
    if users != {str(cell.uid)}:
        yield f"The sandbox's processes belong to the users {sorted(users)}, and must all belong to {cell.uid}."
    if any(int(status[name], 16) for status in statuses for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")):
        yield "The sandbox's processes have capabilities on this machine, and must have none."


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
