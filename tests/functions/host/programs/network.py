"""What a function tries that wants to get somewhere; each says what it was told there, or how it failed."""

import ctypes
import errno
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_NEW_NETWORK = 0x40000000
_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_SECONDS = 3
_SECONDS_TO_LISTEN = 1


def reach(event: Any, context: Any) -> Any:
    """Say hello by "tcp" or "udp" to an address and a port, each by way of an interface if one is named."""
    del context
    return [_outcome(_reach, *each) for each in event]


def _reach(kind: str, address: str, port: int, interface: str = "") -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, _KINDS[kind]) as ours:
        ours.settimeout(_SECONDS)
        if interface:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        ours.connect((address, port))
        ours.send(b"hello")
        return ours.recv(100).decode()


def hear(event: Any, context: Any) -> Any:
    """Say hello by UDP, and return the addresses of all who answer."""
    del context
    heard = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
        ours.settimeout(_SECONDS_TO_LISTEN)
        ours.sendto(b"hello", tuple(event))
        try:
            while True:
                heard.append(ours.recvfrom(100)[1][0])
        except TimeoutError:
            return heard


def look_up(event: Any, context: Any) -> Any:
    """Return for each name its first address."""
    del context
    return [_outcome(_first_address, name) for name in event]


def _first_address(name: str) -> Any:
    return socket.getaddrinfo(name, 80)[0][4][0]


def serve(event: Any, context: Any) -> None:
    """Take connections from now on: at a port of every address, and at an abstract Unix socket of that name."""
    del context
    for family, place in ((socket.AF_INET, ("", event)), (socket.AF_UNIX, f"\0{event}")):
        listener = socket.socket(family)
        listener.bind(place)
        listener.listen()
        threading.Thread(target=_greet, args=(listener,), daemon=True).start()


def _greet(listener: socket.socket) -> None:
    while True:
        with listener.accept()[0] as theirs:
            theirs.send(b"hello")


def reach_by_name(event: Any, context: Any) -> Any:
    """Connect to an abstract Unix socket."""
    del context
    with socket.socket(socket.AF_UNIX) as ours:
        return _outcome(ours.connect, f"\0{event}")


def tamper(event: Any, context: Any) -> Any:
    """Try what the rules could be changed or avoided with."""
    del context
    internet, control = socket.AF_INET, socket.IPPROTO_ICMP
    return {
        "netlink": _outcome(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW),
        "packets": _outcome(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
        "raw": _outcome(socket.socket, internet, socket.SOCK_RAW, control),
        "ping": _outcome(socket.socket, internet, socket.SOCK_DGRAM, control),
        "unshare": _outcome(_unshare),
        **{switch: _outcome(Path("/proc/sys/net", switch).write_text, "1") for switch in event},
    }


def count_authorities(event: Any, context: Any) -> Any:
    """Return how many authorities a server's certificate may be from."""
    del event, context
    return len(ssl.create_default_context().get_ca_certs())


def _outcome(attempt: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return attempt(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)


def _unshare() -> None:
    if _libc.unshare(_NEW_NETWORK) != 0:
        raise OSError(ctypes.get_errno(), "refused")
