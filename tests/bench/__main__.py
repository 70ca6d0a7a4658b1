"""The benchmark's command."""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

import click
import uvloop

from tests.bench.backlog import measure_backlog
from tests.bench.bare import Differs
from tests.bench.clusters import catalog_of, other_clusters, postgresql_cluster
from tests.bench.functions import measure_functions
from tests.bench.growth import measure_growth
from tests.bench.load import LoadError
from tests.bench.ours import CallError
from tests.bench.peers import PeerError
from tests.bench.process import ProcessError
from tests.bench.provisioning import measure_provisioning
from tests.bench.report import Part, Report
from tests.bench.requests import measure_requests
from tests.bench.socks import measure_proxies

RESULTS = Path("build/bench")
_ON_CLUSTERS = ("provisioning", "backlog", "growth")
PARTS = ("requests", *_ON_CLUSTERS, "functions", "proxies")


@click.command()
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="Measure this part alone; may be repeated.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="How often every peer runs.")
@click.option("--seconds", default=2, show_default=True, type=click.IntRange(1), help="How long each run lasts.")
def main(only: tuple[str, ...], rounds: int, seconds: int) -> None:
    """Measure requests, databases, functions and proxies; write build/bench/latest.json and .md.

    Exit status 1, and nothing is reported: a run had errors, a peer does other work, a revoked token still worked, or
    a database did not become what it should. 2: wrk is missing.
    """
    chosen = only or PARTS
    if "requests" in chosen and shutil.which("wrk") is None:
        click.echo("There is no wrk: `apt-get install wrk`.", err=True)
        sys.exit(2)
    signal.signal(signal.SIGTERM, _interrupt)
    # Ours alone: a developer's own settings must not decide what is measured.
    for name in [name for name in os.environ if name.startswith(("HTX_", "OTEL_"))]:
        del os.environ[name]
    busy = os.getloadavg()[0]
    try:
        with tempfile.TemporaryDirectory(prefix="htx-bench-") as made:
            folder = Path(made)
            folder.chmod(0o711)  # clusters run as users of their own
            parts: list[Part] = []
            if "requests" in chosen:
                parts.append(measure_requests(folder / "requests", rounds=rounds, seconds=seconds))
            if "functions" in chosen:
                click.echo("Calling functions…", err=True)
                parts.append(uvloop.run(measure_functions(folder / "functions")))
            if "proxies" in chosen:
                click.echo("Carrying bytes through proxies…", err=True)
                parts.append(measure_proxies(folder / "proxies", rounds=rounds, seconds=seconds))
            if set(chosen) & set(_ON_CLUSTERS):
                parts += uvloop.run(_measure_databases(folder, chosen))
    except (CallError, Differs, LoadError, PeerError, ProcessError) as error:
        click.echo(f"Nothing is reported: {error}", err=True)
        sys.exit(1)
    report = Report(parts, busy=busy)
    report.write(RESULTS)
    click.echo(f"\n{report.text()}\n\nWritten to {RESULTS}/latest.json and {RESULTS}/latest.md.")


async def _measure_databases(folder: Path, chosen: tuple[str, ...]) -> list[Part]:
    """Measure what needs clusters."""
    parts: list[Part] = []
    async with postgresql_cluster(folder / "postgresql") as postgresql:
        if "provisioning" in chosen:
            click.echo("Creating databases of every engine…", err=True)
            async with other_clusters(folder) as others:
                parts.append(await measure_provisioning(folder / "provisioning", [postgresql, *others]))
        catalog = folder / "catalog.toml"
        catalog.write_text(catalog_of([postgresql]))
        if "backlog" in chosen:
            click.echo("Working off a backlog…", err=True)
            parts.append(await measure_backlog(folder, catalog, postgresql))
        if "growth" in chosen:
            click.echo("Reading longer and longer tables…", err=True)
            parts.append(await measure_growth(folder, catalog, postgresql))
    return parts


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does, so that no process is left behind."""
    del number, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
