"""Commits by another process, so that nothing can be remembered for long."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def committing(storage: Path, *, a_second: int) -> Iterator[None]:
    """Commit something small to the control plane's file, so many times a second, while the body runs."""
    if not a_second:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_commit, args=(storage, 1 / a_second, done))
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _commit(storage: Path, pause: float, done: threading.Event) -> None:
    connection = sqlite3.connect(storage, timeout=10, isolation_level=None)
    while not done.wait(pause):
        connection.execute("INSERT OR REPLACE INTO cluster_uses VALUES ('of-the-benchmark', 0)")
    connection.close()
