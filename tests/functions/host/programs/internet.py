"""Servers on every address of a machine, which say hello until their standard input ends.

The arguments are a port, for TCP and UDP; and perhaps another one for TCP, one for names, and an address: what is said
by UDP is answered from there too, before it is answered from where it was said to.
"""

import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

_HEADER, _TYPE_AND_CLASS = 12, 4


def _take_connections(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"hello")


def _answer(server: socket.socket, answer: Callable[[bytes, Any], bytes]) -> None:
    while True:
        said, sender = server.recvfrom(1000)
        server.sendto(answer(said, sender), sender)


def _name(said: bytes, _: Any) -> bytes:
    """Answer a question for a name that begins with an address, such as 1-2-3-4.test, with that (RFC 1035)."""
    first = said[_HEADER + 1 : _HEADER + 1 + said[_HEADER]]
    end = said.index(b"\0", _HEADER) + 1
    question = said[_HEADER : end + _TYPE_AND_CLASS]
    counts, record = b"\0\1\0\0\0\0\0\0", b""
    if question.endswith(b"\0\1\0\1"):  # an IPv4 address is wanted
        counts = b"\0\1\0\1\0\0\0\0"
        record = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + bytes(map(int, first.split(b"-")))
    return said[:2] + b"\x81\x80" + counts + question + record


def _start(task: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=task, args=arguments, daemon=True).start()


def _open(kind: socket.SocketKind, port: int, address: str = "") -> socket.socket:
    """Return a socket of both families, or of one address only."""
    server = socket.socket(socket.AF_INET6, kind)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, port))
    return server


def _say_hello(_: bytes, sender: Any) -> bytes:
    for address in aside:
        with _open(socket.SOCK_DGRAM, 0, f"::ffff:{address}") as other:
            other.sendto(b"psst", sender)
    return b"hello"


port, *more = sys.argv[1:]
mail, names, aside = more[:1], more[1:2], more[2:]
for each in (port, *mail):
    listener = _open(socket.SOCK_STREAM, int(each))
    listener.listen()
    _start(_take_connections, listener)
_start(_answer, _open(socket.SOCK_DGRAM, int(port)), _say_hello)
for each in names:
    _start(_answer, _open(socket.SOCK_DGRAM, int(each)), _name)
sys.stdout.write("ready\n")
sys.stdout.flush()
sys.stdin.read()
