"""Hostile code gets nowhere, its customer is told what happened, and a neighbour's function goes on."""

import asyncio
import ctypes
import errno
import json
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from controlplane.functions.host.lines import LONGEST_LINE
from controlplane.functions.host.sandbox import PROCESSES
from controlplane.functions.host.worker import InvocationFailed
from tests.functions.host.workshop import PROGRAMS, Running, Workshop, all_ended, open_workshop

_CODE = PROGRAMS / "escapes.py"
_MB = 1 << 20
_CLOSED = """
    ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp unshare setns mount umount2 pivot_root chroot fsopen
    open_tree move_mount bpf perf_event_open keyctl add_key request_key userfaultfd io_uring_setup init_module
    finit_module kexec_load reboot swapon quotactl open_by_handle_at name_to_handle_at personality clone3 seccomp setuid
    setgroups capset shmget msgget semget memfd_secret landlock_create_ruleset modify_ldt syslog acct settimeofday
    clock_settime sethostname iopl
"""


@pytest.fixture(scope="module")
async def workshop(folder: Path) -> AsyncIterator[Workshop]:
    """A sandbox for this module."""
    async with open_workshop(folder) as workshop:
        yield workshop


@pytest.fixture
async def attack(workshop: Workshop) -> AsyncIterator[Any]:
    """Call one of the hostile functions, while a neighbour's function has to answer."""
    async with workshop.running(_CODE.read_text(), entrypoint="main.echo", tenant="ac_neighbour") as neighbour:
        asking = asyncio.create_task(_keep_asking(neighbour))

        async def run(name: str, event: Any = None, *, seconds: float = 20, **wanted: Any) -> Any:
            async with workshop.running(_CODE.read_text(), entrypoint=f"main.{name}", **wanted) as function:
                return await function.call(event, seconds=seconds)

        yield run
        assert not asking.done(), asking.exception()
        asking.cancel()
        assert neighbour.worker.alive


async def _keep_asking(neighbour: Running) -> None:
    number = 0
    while True:
        number += 1
        assert await neighbour.call(number, seconds=5) == number
        await asyncio.sleep(0.01)


async def _fails(call: Any) -> InvocationFailed:
    with pytest.raises(InvocationFailed) as failed:
        await call
    return failed.value


async def test_what_there_is_to_see(attack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function sees its code, its runtime and two folders of its own; no other process, nothing of ours."""
    monkeypatch.setenv("HTX_SECRET", "hush")
    seen = await attack("look_around", environment={"COLOUR": "blue"})
    assert seen["root"] == ["code", "dev", "etc", "lib", "lib64", "proc", "runtime", "tmp", "usr"]
    assert seen["etc"] == ["group", "hosts", "nsswitch.conf", "passwd"]
    assert seen["passwd"].startswith("function:")
    assert len(seen["processes"]) == 2
    assert seen["environment"] == ["COLOUR", "HOME", "LANG", "PATH", "PWD", "TMPDIR"]
    assert seen["arguments"] == []
    assert seen["user"] == [65534, 65534, []]
    assert seen["hostname"] == "function"
    assert seen["capabilities"] == "0" * 16


async def test_files_of_others(workshop: Workshop, attack: Any) -> None:
    """Neither the host's files nor another tenant's code can be read."""
    other = workshop.program("secret = 1")
    ours = [
        "/etc/shadow",
        "/root",
        "/home",
        "/sys",
        "/usr/bin/bwrap",
        "/var",
        str(other.folder / "main.py"),
        "/dev/mem",
    ]
    assert set((await attack("read", ours)).values()) == {"No such file or directory"}
    hidden = ["/proc/kcore", "/proc/sysrq-trigger", "/proc/kmsg", "/proc/keys"]
    assert set((await attack("read", hidden)).values()) <= {"Permission denied", "No such file or directory", None}


async def test_read_only(attack: Any) -> None:
    """Only /tmp and /dev/shm can be written to."""
    folders = ["/", "/code", "/dev", "/etc", "/runtime", "/usr/lib", "/usr/bin", "/proc/sys/kernel"]
    assert set((await attack("write", folders)).values()) <= {"Read-only file system", "No such file or directory"}
    assert await attack("write", ["/tmp", "/dev/shm"]) == {"/tmp": None, "/dev/shm": None}  # noqa: S108 - its own


async def test_no_network(attack: Any) -> None:
    """A function reaches nothing: not our loopback, nor our abstract Unix sockets, nor any address."""
    name = f"htx-test-{os.getpid()}"
    with ExitStack() as held:
        addresses: list[Any] = [["192.0.2.1", 80], ["169.254.169.254", 80], ["10.0.0.1", 443], ["2001:db8::1", 80]]
        for family, place in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, f"\0{name}")):
            listener = held.enter_context(socket.socket(family))
            listener.bind(place)
            listener.listen()
            addresses.append(name if family == socket.AF_UNIX else list(listener.getsockname()))
            socket.create_connection(listener.getsockname()).close() if family == socket.AF_INET else None
        errors = await attack("connect", addresses)
    assert set(errors[:3]) == {"Network is unreachable"}
    assert errors[3] is not None  # which error depends on whether the machine has IPv6
    assert errors[4:] == ["Connection refused", "Connection refused"]


async def test_odd_sockets(attack: Any) -> None:
    """Sockets that leave the network namespace, or speak to little-used parts of the kernel, cannot be made."""
    odd = [socket.AF_VSOCK, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_ALG]
    assert set(await attack("open_sockets", [int(each) for each in odd])) == {"Function not implemented"}
    assert set(await attack("open_sockets", [int(socket.AF_INET), int(socket.AF_UNIX)])) == {None}


async def test_system_calls(attack: Any) -> None:
    """Tracing, mounting, namespaces, keys, BPF and other ways into the kernel are closed."""
    library = ctypes.CDLL("libseccomp.so.2")
    numbers = {name: library.seccomp_syscall_resolve_name(name.encode()) for name in _CLOSED.split()}
    errors = await attack("system_calls", [[number, 0, 0, 0, 0] for number in numbers.values()])
    assert dict(zip(numbers, errors, strict=True)) == dict.fromkeys(numbers, errno.ENOSYS)
    clone, ioctl = (library.seccomp_syscall_resolve_name(name) for name in (b"clone", b"ioctl"))
    new_user, new_network, child, type_into_terminal = 0x10000000, 0x40000000, 17, 0x5412
    calls = [[clone, new_user | child, 0], [clone, new_network | child, 0], [ioctl, 0, type_into_terminal, 0]]
    # What the kernel leaves of the number is not what the filter sees.
    calls += [[ioctl, 0, type_into_terminal | 1 << 32, 0]]
    assert await attack("system_calls", calls) == [errno.ENOSYS] * 4


async def test_fork_bomb(workshop: Workshop, attack: Any) -> None:
    """A fork bomb has few processes, and all of them end with its worker."""
    async with workshop.running(_CODE.read_text(), entrypoint="main.fork_bomb") as bomb:
        assert 0 < await bomb.call() < PROCESSES
        group = bomb.worker._cell.group  # noqa: SLF001 - what only the machine can see
        assert len(group.pids) > PROCESSES // 2
        await attack("echo")
    assert group.pids == set()


async def test_nothing_stays(workshop: Workshop) -> None:
    """A process that has left its family ends with the worker, and the control groups are gone."""
    async with workshop.running(_CODE.read_text(), entrypoint="main.hide") as function:
        await function.call()
        group = function.worker._cell.group  # noqa: SLF001 - likewise
        pids = group.pids
        assert len(pids) == 4  # two of bubblewrap, the function's, and the hidden one
    await all_ended(pids)
    assert not any(file.parent.exists() for file in group.entrances)


@pytest.mark.parametrize("way", ["heap", "children", "files", "memfd"])
async def test_memory(attack: Any, way: str) -> None:
    """Memory is what a function's processes and files have together, and more of it ends the function."""
    failed = await _fails(attack("take_memory", way, memory_mb=64))
    assert (failed.kind, failed.message) == ("out_of_memory", "The function used more than its 64 MB of memory.")


async def test_disk(attack: Any) -> None:
    """The files of a function are few, and its disk is full before it does harm."""
    size, error = await attack("fill", "/tmp", memory_mb=256)  # noqa: S108 - its own
    assert error == "No space left on device"
    assert 60 < size <= 64
    size, error = await attack("fill", "/dev/shm", memory_mb=256)  # noqa: S108 - its own
    assert error == "No space left on device"
    assert size <= 16


async def test_endless_loop(attack: Any) -> None:
    """A function that never ends is ended in time."""
    began = time.monotonic()
    failed = await _fails(attack("spin", seconds=0.5))
    assert (failed.kind, failed.message) == ("timeout", "The function did not answer within 0.5 s.")
    assert time.monotonic() - began < 3


async def test_work_between_calls(workshop: Workshop) -> None:
    """What a function does in the background gets next to no time while nobody calls it."""
    async with workshop.running(_CODE.read_text(), entrypoint="main.spin_aside") as function:
        await function.call()
        before = await function.call()
        await asyncio.sleep(1)  # how much it does of itself in a second
        assert await function.call() - before < 0.4


async def test_signals(attack: Any) -> None:
    """A function can end nobody but itself."""
    assert await attack("send_signals") == "alive"


async def test_scribbles_on_the_channel(attack: Any) -> None:
    """Garbage on every descriptor ends the worker, and the customer hears of it."""
    failed = await _fails(attack("scribble", 1000))
    assert failed.kind == "crashed"
    assert "wrote to the channel" in failed.message


@pytest.mark.parametrize(
    ("kind", "number", "length", "body"),
    [
        ("A", 2, 4_000_000_000, "{}"),
        ("A", 9, 2, "{}"),
        ("?", 2, 2, "{}"),
        ("X", 2, 2, "{}"),
        ("X", 2, 2, "[]"),
        ("X", 2, 8, "{}{}{}{}"),
        ("X", 2, 40, '{"kind":"odd","message":"","trace":null}'),
        ("X", 2, 100_000_000, "{}"),
    ],
)
async def test_forged_answers(attack: Any, kind: str, number: int, length: int, body: str) -> None:
    """A frame that is none of ours ends the worker: nothing of it is believed."""
    failed = await _fails(attack("forge", [kind, number, length, body], seconds=5))
    assert failed.kind == "crashed"
    assert "wrote to the channel" in failed.message


async def test_forged_right(workshop: Workshop) -> None:
    """An answer forged as ours would be is the customer's own loss: the next call finds the worker out."""
    async with workshop.running(_CODE.read_text(), entrypoint="main.forge") as function:
        event = ["A", 2, 8, '"forged"']
        assert await function.call(event) == "forged"
        failed = await _fails(function.call(event))
        assert failed.kind == "crashed"
        assert not function.worker.alive


async def test_closes_everything(attack: Any) -> None:
    """A function that closes the channel is ended, and not waited for."""
    failed = await _fails(attack("close_everything"))
    assert (failed.kind, failed.message) == ("crashed", "The function's process ended by itself, with exit status 76.")


async def test_leaves(attack: Any) -> None:
    """A process that ends by itself is a crash; sys.exit() is only an error."""
    failed = await _fails(attack("leave", 0))
    assert (failed.kind, failed.message) == ("crashed", "The function's process ended by itself, with exit status 0.")
    failed = await _fails(attack("break_memory"))
    assert (failed.kind, failed.message) == ("crashed", "The function's process was ended by SIGSEGV.")
    failed = await _fails(attack("leave_by_exception", 3))
    assert (failed.kind, failed.message) == ("error", "The function called sys.exit(3): return instead.")


async def test_recursion(attack: Any) -> None:
    """Endless recursion is an error with a traceback that one can read."""
    failed = await _fails(attack("recurse"))
    assert failed.kind == "error"
    assert failed.message.startswith("RecursionError")
    assert failed.trace is not None
    assert len(failed.trace) < 2_000


async def test_flood(workshop: Workshop, attack: Any) -> None:
    """Who prints without end loses lines, is told how many, and keeps nobody from answering."""
    async with workshop.running(_CODE.read_text(), entrypoint="main.flood") as function:
        failed = await _fails(function.call(seconds=1))
        assert failed.kind == "timeout"
        kept = sum(len(line) for _, line in function.lines)
        assert kept < 2 * _MB
        assert any("lines dropped" in line for line in function.printed("stderr"))
        await attack("echo")


async def test_long_line(workshop: Workshop) -> None:
    """A line without an end comes in pieces, and all of it comes."""
    text = "€" * 100_000
    source = f"import sys\ndef handler(event, context): sys.stdout.write('€' * {len(text)})"
    async with workshop.running(source) as function:
        await function.call()
        assert max(len(line.encode()) for line in function.printed()) <= LONGEST_LINE
        assert "".join(function.printed()) == text


async def test_secrets_on_command_lines(workshop: Workshop) -> None:
    """No process of a function shows its secrets to who lists the machine's processes."""
    environment = {"PASSWORD": "correct horse"}
    async with workshop.running(_CODE.read_text(), entrypoint="main.echo", environment=environment) as function:
        pids = function.worker._cell.group.pids  # noqa: SLF001 - likewise
        assert pids
        command_lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids]  # noqa: ASYNC240 - of the kernel
        assert not any(b"correct horse" in line for line in command_lines)


async def test_uids(workshop: Workshop) -> None:
    """Tenants have uids apart, a tenant's workers share one, and it is free again after the last."""

    def uids(function: Running) -> set[str]:
        pids = function.worker._cell.group.pids  # noqa: SLF001 - likewise
        return {line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Uid" in line}

    source = _CODE.read_text()
    async with workshop.running(source, entrypoint="main.echo", tenant="ac_a") as first:
        async with workshop.running(source, entrypoint="main.echo", tenant="ac_a") as second:
            assert len(uids(first)) == 1
            assert uids(first) == uids(second)
        async with workshop.running(source, entrypoint="main.echo", tenant="ac_b") as third:
            assert len(uids(third) - uids(first)) == 1
            assert "\t0" not in json.dumps([*uids(first), *uids(third)])
        was = uids(first)
    async with workshop.running(source, entrypoint="main.echo", tenant="ac_c") as fourth:
        assert uids(fourth) == was
