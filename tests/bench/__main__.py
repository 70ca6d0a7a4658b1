"""The benchmark's command."""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

import click

from controlplane.settings import Settings
from tests.bench.commits import committing
from tests.bench.load import LoadError, Run, run_load
from tests.bench.peers import Peer, PeerError, peers
from tests.bench.report import Report, Result
from tests.bench.revocation import check_revocation
from tests.bench.same import check_same_work
from tests.bench.seed import seed
from tests.stack import free_port

RESULTS = Path("build/bench")


@click.command()
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="How often every peer runs.")
@click.option("--seconds", default=2, show_default=True, type=click.IntRange(1), help="How long each run lasts.")
def main(rounds: int, seconds: int) -> None:
    """Measure the list of databases beside the usual way to build it; write build/bench/latest.json and .md.

    Exit status 1, and nothing is reported: a run had errors, a peer does other work, or a revoked token still worked.
    2: wrk is missing.
    """
    if shutil.which("wrk") is None:
        click.echo("There is no wrk: `apt-get install wrk`.", err=True)
        sys.exit(2)
    signal.signal(signal.SIGTERM, _interrupt)
    # Ours alone: a developer's own settings must not decide what is measured.
    for name in [name for name in os.environ if name.startswith(("HTX_", "OTEL_"))]:
        del os.environ[name]
    try:
        with tempfile.TemporaryDirectory(prefix="htx-bench-") as folder:
            report = _measure(Path(folder), rounds, seconds)
    except (LoadError, PeerError) as error:
        click.echo(f"Nothing is reported: {error}", err=True)
        sys.exit(1)
    report.write(RESULTS)
    click.echo(f"\n{report.text()}\n\nWritten to {RESULTS}/latest.json and {RESULTS}/latest.md.")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does, so that no process is left behind."""
    del number, frame
    raise KeyboardInterrupt


def _measure(folder: Path, rounds: int, seconds: int) -> Report:
    busy = os.getloadavg()[0]
    settings = Settings(
        data_dir=folder,
        catalog=folder / "catalog.toml",
        http_port=free_port(),
        grpc_port=free_port(),
        metrics_port=free_port(),
        edge_metrics_port=free_port(),
    )
    settings.run_dir.mkdir()
    seeded = asyncio.run(seed(settings))
    click.echo("Starting the peers…", err=True)
    with peers(settings, seeded, seconds=seconds) as every:
        check_same_work(every, seeded, f"127.0.0.1:{settings.grpc_port}")
        click.echo("All answer the same. Warming up…", err=True)
        for peer in every:
            _run(peer, seconds, settings.data_dir)
        results = [Result(peer.name, peer.title) for peer in every]
        for number in range(rounds):
            click.echo(f"Round {number + 1} of {rounds}…", err=True)
            for index in [(number + place) % len(every) for place in range(len(every))]:
                _add_run(results[index], every[index], seconds, settings.data_dir)
        for result, peer in zip(results, every, strict=True):
            result.process_mb, result.all_mb = _memory(peer)
        click.echo("Revoking tokens under load…", err=True)
        revocation = check_revocation(every[0], seeded, folder / "controlplane.db")
    return Report(results, revocation, seconds=seconds, busy=busy)


def _add_run(result: Result, peer: Peer, seconds: int, folder: Path) -> None:
    server_before, before = peer.cpu_seconds()
    run = _run(peer, seconds, folder)
    server_after, after = peer.cpu_seconds()
    result.runs.append(run)
    result.server_cpu.append((server_after - server_before) / run.requests * 1e6)
    result.cpu.append((after - before) / run.requests * 1e6)


def _run(peer: Peer, seconds: int, folder: Path) -> Run:
    try:
        with committing(folder / "controlplane.db", a_second=peer.commits):
            return run_load(peer.load, seconds)
    except LoadError as error:
        raise LoadError(f"{peer.title}: {error}") from None


def _memory(peer: Peer) -> tuple[float, float]:
    """Return the MB of the server's largest process, and of all of the peer's."""
    largest, _ = peer.server.memory()
    return largest, sum(process.memory()[1] for process in peer.processes)


if __name__ == "__main__":
    main()
