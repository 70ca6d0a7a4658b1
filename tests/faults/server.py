"""Servers to be killed: a program that imports everything once, and forks a server for each connection to its socket.

So a start costs 0.1 s and not 1.5. The connection is the server's life: the first line that comes in has its settings,
further ones say at which of its points it is to be killed or paused (`points.py`); what goes out are its process id,
that it is ready, the points that it passes, and the one at which it is killed or paused. It ends with the process, and
the process with it.
"""

import gc
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import IO, Any

import aiosqlite  # noqa: F401 - here and below: what a server loads when it needs it
import argon2
import pymongo  # noqa: F401
import pymysql  # noqa: F401
import uvloop
from sqlalchemy.dialects.postgresql import asyncpg  # noqa: F401
from sqlalchemy.dialects.sqlite import aiosqlite as _dialect  # noqa: F401

import controlplane.cli.main  # noqa: F401 - it sets up what gRPC looks at when it is loaded
from controlplane import server
from controlplane.databases import provisioner
from controlplane.databases.engines import clickhouse, mongodb, mysql  # noqa: F401
from controlplane.hosts import model as hosts
from controlplane.observe import logs
from controlplane.reconcile import loop
from controlplane.settings import Settings
from tests.faults.points import Points, put_everywhere


def main(path: str) -> None:
    """Fork a server for each connection to this Unix socket."""
    # 0.1 s at each start, for the password of nobody, and nobody logs in with one here.
    hashed = argon2.PasswordHasher().hash("")
    argon2.PasswordHasher.hash = lambda *_password: hashed  # type: ignore[method-assign]
    loop._LOOK_EVERY = 0.1  # noqa: SLF001 - seconds: of what only time makes due, nobody tells the reconciler
    # What is done now and then is no part of a transition.
    server.FLUSH_EVERY = 3600.0  # type: ignore[attr-defined]
    provisioner._FIRST_LOOK = timedelta(hours=1)  # noqa: SLF001
    hosts._PATIENCE = timedelta(seconds=0.1)  # noqa: SLF001 - less than a host takes to find a server that is back
    gc.freeze()  # or each server's collector would write to, and so copy, the memory that they share
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:  # before there is anything of gRPC's, which does not survive it
                listener.close()
                _serve(connection)
            connection.close()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # bury those that have ended
                    pass


def _serve(connection: socket.socket) -> None:
    lines = connection.makefile("r")
    if not (line := lines.readline()):
        os._exit(0)  # somebody wanted to know whether we listen
    order = json.loads(line)
    os.environ.update(order["settings"])
    settings = Settings()
    with (settings.data_dir / "server.log").open("ab") as log:
        os.dup2(log.fileno(), 2)
    report = _Report(connection)
    points = Points(report, scope=order["scope"])
    put_everywhere(points, settings.data_dir / "backups")
    threading.Thread(target=_obey, args=(lines, points, report), daemon=True).start()

    class Reporting(server.Server):
        """The server, which says when it is ready."""

        async def start(self) -> None:
            await super().start()
            report({"ready": True})

    server.Server = Reporting  # type: ignore[misc]
    report({"pid": os.getpid()})
    logs.configure(settings)
    uvloop.run(server.run(settings))
    os._exit(0)


class _Report:
    """Writes lines to the connection, from whatever thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def __call__(self, line: Mapping[str, Any]) -> None:
        with self._lock:
            self._connection.sendall(json.dumps(line).encode() + b"\n")


def _obey(lines: IO[str], points: Points, report: _Report) -> None:
    try:
        for line in lines:
            order = json.loads(line)
            if "pause_at" in order:
                points.pause_at(order["pause_at"])
            else:
                points.arm(order["kill_at"], order["seconds"])
            report({"armed": True})
    finally:
        os.kill(os.getpid(), signal.SIGKILL)  # whoever started us is gone


if __name__ == "__main__":
    main(sys.argv[1])
