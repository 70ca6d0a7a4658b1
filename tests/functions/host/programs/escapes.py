"""What a hostile customer tries; each function takes what it needs from the event, and says how far it got."""

import contextlib
import ctypes
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)


def echo(event: Any, context: Any) -> Any:
    """Return the event."""
    del context
    return event


def look_around(event: Any, context: Any) -> Any:
    """Return what there is to see."""
    del event, context
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "root": sorted(os.listdir("/")),  # noqa: PTH208 - plain names
        "etc": sorted(os.listdir("/etc")),  # noqa: PTH208
        "passwd": Path("/etc/passwd").read_text(),
        "processes": [each for each in os.listdir("/proc") if each.isdecimal()],  # noqa: PTH208
        "environment": sorted(os.environ),
        "arguments": sys.argv[1:],
        "user": [os.getuid(), os.getgid(), os.getgroups()],
        "hostname": socket.gethostname(),
        "capabilities": {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}.pop(),
    }


def read(event: Any, context: Any) -> Any:
    """Return for each path the error of reading it, or None."""
    del context
    return {path: _error(lambda path=path: Path(path).read_bytes()) for path in event}


def write(event: Any, context: Any) -> Any:
    """Return for each folder the error of making a file in it, or None."""
    del context
    return {folder: _error(lambda folder=folder: Path(folder, "new").write_text("x")) for folder in event}


def connect(event: Any, context: Any) -> Any:
    """Return for each address the error of connecting to it, or None; a text is an abstract Unix socket's name."""
    del context
    return [_error(lambda address=address: _connect(address)) for address in event]


def _connect(address: Any) -> None:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as connection:
        connection.settimeout(2)
        connection.connect(f"\0{address}" if isinstance(address, str) else tuple(address))


def open_sockets(event: Any, context: Any) -> Any:
    """Return for each family the error of making a socket of it, or None."""
    del context
    return [_error(lambda family=family: socket.socket(family, socket.SOCK_DGRAM).close()) for family in event]


def system_calls(event: Any, context: Any) -> Any:
    """Make system calls, given as lists of their number and arguments; return their errors, 0 for none."""
    del context
    found = []
    process = os.getpid()
    for call in event:
        ctypes.set_errno(0)
        result = _libc.syscall(*(ctypes.c_long(each) for each in call))
        if os.getpid() != process:  # a clone() came through, and this is the child
            os._exit(0)
        found.append(ctypes.get_errno() if result < 0 else 0)
    return found


def fork_bomb(event: Any, context: Any) -> Any:
    """Start as many processes as there may be; return how many."""
    del event, context
    count = 0
    with contextlib.suppress(OSError):
        while True:
            if not os.fork():
                while True:
                    with contextlib.suppress(OSError):
                        os.fork()
            count += 1
    return count


def hide(event: Any, context: Any) -> Any:
    """Leave a process behind that belongs to nobody and outlives the answer."""
    del event, context
    if not (child := os.fork()):
        os.setsid()
        if not os.fork():
            os.execv("/usr/bin/python3", ["python3", "-c", "import time; time.sleep(1000)"])  # noqa: S606
        os._exit(0)
    os.waitpid(child, 0)


def take_memory(event: Any, context: Any) -> Any:
    """Take memory in one of several ways."""
    del context
    if event == "heap":
        return len(bytearray(256 << 20))
    if event == "children":
        for _ in range(10):
            if not os.fork():
                held = bytearray(32 << 20)
                time.sleep(100)
                return len(held)
        os.wait()
        os._exit(0)
    if event == "files":
        held = bytearray(30 << 20)
        return [fill(folder, None) for folder in ("/tmp", "/dev/shm")] + [len(held)]  # noqa: S108 - its own
    if event == "memfd":
        descriptors = [os.memfd_create(str(number)) for number in range(100)]
        return [os.write(descriptor, bytes(8 << 20)) for descriptor in descriptors]
    return None


def fill(event: Any, context: Any) -> Any:
    """Fill a folder; return how many MB went in, and the error that ended it."""
    del context
    size = 0
    try:
        for number in range(100):
            with Path(event, str(number)).open("wb") as file:
                for _ in range(8):
                    file.write(bytes(1 << 20))
                    size += 1
    except OSError as error:
        return [size, error.strerror]
    return [size, None]


def spin(event: Any, context: Any) -> Any:
    """Never end."""
    del event, context
    while True:
        pass


def spin_aside(event: Any, context: Any) -> Any:
    """Answer, and go on working in the background; return how far that has come (CPU seconds of the process)."""
    del event, context
    if threading.active_count() == 1:
        threading.Thread(target=spin, args=(None, None), daemon=True).start()
    return time.process_time()


def send_signals(event: Any, context: Any) -> Any:
    """Send every signal that ends a process to whatever can be seen."""
    del event, context
    for signal in (15, 9, 6, 11, 19):
        for pid in (1, os.getppid(), -1):
            with contextlib.suppress(OSError):
                os.kill(pid, signal)
    return "alive"


def scribble(event: Any, context: Any) -> Any:
    """Write to every descriptor."""
    del context
    for descriptor in range(1024):
        with contextlib.suppress(OSError):
            os.write(descriptor, bytes(event))
    return "answered"


def forge(event: Any, context: Any) -> Any:
    """Send an answer of its own to all descriptors: its kind, its number, the length that it claims, and its body."""
    del context
    kind, number, length, body = event
    for descriptor in range(3, 1024):
        with contextlib.suppress(OSError):
            os.write(descriptor, struct.pack("!cII", kind.encode(), number, length) + body.encode())
    return "answered"


def close_everything(event: Any, context: Any) -> Any:
    """Close every descriptor."""
    del event, context
    os.closerange(0, 1024)
    return "answered"


def leave(event: Any, context: Any) -> Any:
    """End the process without a word."""
    del context
    os._exit(event)


def leave_by_exception(event: Any, context: Any) -> Any:
    """End the process as one should."""
    del context
    sys.exit(event)


def break_memory(event: Any, context: Any) -> Any:
    """Read what is not there."""
    del event, context
    return ctypes.string_at(0)


def recurse(event: Any, context: Any) -> Any:
    """Call itself for ever."""
    return recurse(event, context)


def flood(event: Any, context: Any) -> Any:
    """Print so many lines, for ever without a number."""
    del context
    count = 0
    while event is None or count < event:
        sys.stdout.write(f"{count:060d}\n")
        count += 1
    return count


def _error(action: Any) -> str | None:
    try:
        action()
    except OSError as error:
        return error.strerror or type(error).__name__
    return None
