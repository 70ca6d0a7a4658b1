"""`controlplane host`, as an operator runs it."""

import re

import pytest

from tests.cli.conftest import Run

PROXIES = ("--kind", "proxies", "--address", "proxy1.example.com:1080")


async def test_the_life_of_a_host(run: Run) -> None:
    """A host is taken into service, with a secret that is printed alone on a line, listed, and taken out again."""
    added = await run("host", "add", "fra1-proxies-1", *PROXIES)
    assert (added.status, re.fullmatch("hth_[0-9A-Za-z]{36}\n", added.output) is not None) == (0, True), added
    assert "HTX_HOST_SECRET_FILE" in added.errors
    assert "controlplane proxy-host" in added.errors
    assert (await run("host", "add", "fra1-functions-1", "--kind", "functions")).status == 0
    listed = (await run("host", "list")).output
    head, functions, proxies = listed.splitlines()
    assert head.split() == ["NAME", "KIND", "REGION", "ADDRESS", "PROXIES", "SEEN"]
    assert functions.split() == ["fra1-functions-1", "functions", "local", "never"]
    assert proxies.split() == [
        "fra1-proxies-1",
        "proxies",
        "local",
        "proxy1.example.com:1080",
        "0",
        "of",
        "1000",
        "never",
    ]
    assert added.output.strip() not in listed
    removed = await run("host", "remove", "fra1-proxies-1")
    assert (removed.status, removed.output) == (0, "The host fra1-proxies-1 is out of service.\n")
    assert "fra1-proxies-1" not in (await run("host", "list")).output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("add", "taken", *PROXIES), "There is a host 'taken' already."),
        (("add", "a", "--kind", "proxies"), "Say where customers reach it: --address HOST:PORT"),
        (("add", "a", *PROXIES, "--region", "mars"), "There is no region 'mars': the catalogue has local."),
        (("remove", "nobody"), "There is no host 'nobody'."),
    ],
)
async def test_a_wrong_host_is_one_sentence(run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    """What cannot be is said in a sentence, with status 1."""
    assert (await run("host", "add", "taken", *PROXIES)).status == 0
    ended = await run("host", *arguments)
    assert (ended.status, ended.output) == (1, "")
    assert ended.errors.startswith(f"controlplane: {sentence}")


@pytest.mark.parametrize("command", ["proxy-host", "functions-host"])
async def test_a_host_needs_its_secret(run: Run, command: str) -> None:
    """Without a secret a host does not start, and says how to make one."""
    ended = await run(command)
    assert ended.status == 1
    assert "is not there: make a secret with `controlplane host add NAME --kind" in ended.errors
