"""What a function prints: read as it comes, cut into lines, and never more of it than the host can bear."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LONGEST_LINE = 8 << 10  # bytes; a longer one comes in pieces
_BURST = 1 << 20  # so many bytes at once,
_PER_SECOND = 256 << 10  # and so many in the long run; what is beyond is read, counted and dropped
_LINE = 64  # what an empty line counts for
_CHUNK = 64 << 10  # what a pipe holds
_LONGEST_CHARACTER = 4  # bytes
_CONTINUES = 0b10  # the upper bits of its bytes but the first
_CHUNKS_AT_ONCE = 16
_PAUSE = 0.01  # seconds between chunks that are dropped: reading them all would keep us from everything else


class Lines:
    """Reads pipes, and calls `on_line` with the stream's name and each line, without its end.

    What comes before `release()` is kept aside: it may not be meant for the customer.
    """

    def __init__(self, on_line: Callable[[str, str], None]) -> None:
        self._on_line = on_line
        self._loop = asyncio.get_running_loop()
        self._pipes: dict[int, _Pipe] = {}
        self._aside: bytes | None = b""
        self._budget = float(_BURST)
        self._budget_at = time.monotonic()
        self._dropped = 0

    def open(self, stream: str) -> int:
        """Return the end of a new pipe for a program to write to, which the caller closes."""
        read, write = os.pipe()
        os.set_blocking(read, False)
        self._pipes[read] = _Pipe(read, stream)
        self._loop.add_reader(read, self._on_readable, self._pipes[read])
        return write

    def release(self) -> None:
        """Let through what comes from now on."""
        self._aside = None

    @property
    def aside(self) -> str:
        """What came before `release()`."""
        return (self._aside or b"").decode(errors="replace").strip()

    def catch_up(self) -> None:
        """Hand over what is in the pipes by now, also a line without an end."""
        for pipe in list(self._pipes.values()):
            for _ in range(_CHUNKS_AT_ONCE):
                if not self._read(pipe):
                    break
            self._end_line(pipe)
        self._report_dropped()

    def close(self) -> None:
        """Catch up, and read no more."""
        self.catch_up()
        for pipe in list(self._pipes.values()):
            self._close(pipe)

    def _on_readable(self, pipe: "_Pipe") -> None:
        self._read(pipe)
        if self._dropped and pipe.descriptor in self._pipes:
            self._loop.remove_reader(pipe.descriptor)
            self._loop.call_later(_PAUSE, self._resume, pipe)

    def _resume(self, pipe: "_Pipe") -> None:
        if self._pipes.get(pipe.descriptor) is pipe:
            self._loop.add_reader(pipe.descriptor, self._on_readable, pipe)

    def _read(self, pipe: "_Pipe") -> bool:
        """Take a chunk; return whether there may be more."""
        if pipe.descriptor not in self._pipes:
            return False
        try:
            chunk = os.read(pipe.descriptor, _CHUNK)
        except BlockingIOError:
            return False
        if not chunk:
            self._end_line(pipe)
            self._close(pipe)
            return False
        if self._aside is not None:
            self._aside = (self._aside + chunk)[:_CHUNK]
            return True
        *lines, rest = (pipe.rest + chunk).split(b"\n")
        for line in lines:
            for piece in _pieces(line):
                self._say(pipe, piece)
        *pieces, pipe.rest = _pieces(rest)
        for piece in pieces:
            self._say(pipe, piece)
        return True

    def _end_line(self, pipe: "_Pipe") -> None:
        if pipe.rest:
            line, pipe.rest = pipe.rest, b""
            self._say(pipe, line)

    def _say(self, pipe: "_Pipe", line: bytes) -> None:
        now = time.monotonic()
        self._budget = min(_BURST, self._budget + (now - self._budget_at) * _PER_SECOND)
        self._budget_at = now
        if (cost := len(line) + _LINE) > self._budget:
            self._dropped += 1
            return
        self._budget -= cost
        self._report_dropped()
        # Databases that keep text refuse NUL.
        self._on_line(pipe.stream, line.decode(errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}"))

    def _report_dropped(self) -> None:
        if self._dropped:
            count, self._dropped = self._dropped, 0
            self._on_line("stderr", f"[{count} lines dropped: at most {_PER_SECOND >> 10} KiB a second are kept]")

    def _close(self, pipe: "_Pipe") -> None:
        del self._pipes[pipe.descriptor]
        self._loop.remove_reader(pipe.descriptor)
        os.close(pipe.descriptor)


def _pieces(line: bytes) -> Iterator[bytes]:
    """Cut a line where it is too long, but not within a character."""
    while len(line) > LONGEST_LINE:
        cut = LONGEST_LINE
        while line[cut] >> 6 == _CONTINUES and cut > LONGEST_LINE - _LONGEST_CHARACTER:
            cut -= 1
        yield line[:cut]
        line = line[cut:]
    yield line


@dataclass(slots=True, eq=False)
class _Pipe:
    descriptor: int
    stream: str
    rest: bytes = b""  # a line that has not ended yet
