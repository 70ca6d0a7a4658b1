"""A resolver for the tests: what is asked of the network otherwise."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest


class Names:
    """A resolver whose answers the test gives: each asking takes the next one, the last one stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._answers: dict[str, list[list[str]]] = {}
        self._slow = threading.Event()
        self._ask = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._asked)

    def __setitem__(self, name: str, answers: list[list[str]]) -> None:
        self._answers[name] = answers

    def answer_slow(self) -> None:
        """Let those be answered that have asked for `slow.test`."""
        self._slow.set()

    def _asked(self, host: Any, port: Any, *args: Any, **options: Any) -> list[Any]:
        name = host.decode() if isinstance(host, bytes) else host
        if name == "slow.test":
            assert self._slow.wait(60)
        if not isinstance(name, str) or not name.endswith(".test"):
            return self._ask(host, port, *args, **options)
        answers = self._answers.get(name)
        if answers is None:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [each for address in addresses for each in self._ask(address, port, *args, **options)]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    """The names under `.test`; there are none yet."""
    made = Names(monkeypatch)
    yield made
    made.answer_slow()
