"""How long a customer waits for a new database, beside the bare cost of the same statements on the same cluster."""

import json
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from controlplane.keys import Keys
from controlplane.sql import Store
from tests.bench.bare import record
from tests.bench.clusters import Cluster, catalog_of, new_target
from tests.bench.ours import Caller, CallError, Ours, new_settings, serving
from tests.bench.report import Aim, percentile, spread
from tests.bench.seed import open_account

_MOST_OVERHEAD = 20.0  # ms
_WAIT = 10  # seconds in which a database must become ready
_WARM = 3
_STEP_SECONDS = 'htx_reconciler_step_seconds_sum{kind="database"} '


@dataclass(slots=True)
class EngineResult:
    """What the creates of one engine have taken, in ms, in the order of the rounds.

    `ready` is from the POST until the event `database.ready` is here, of which `post` is until the POST was answered
    and `step` what the reconciler's step took. `driver` is the driver alone, `by_hand` the statements alone.
    """

    kind: str
    title: str
    ready: list[float] = field(default_factory=list)
    post: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    driver: list[float] = field(default_factory=list)
    by_hand: list[float] = field(default_factory=list)

    @property
    def overhead(self) -> list[float]:
        """What we add to the statements, round by round."""
        return [ours - bare for ours, bare in zip(self.ready, self.by_hand, strict=True)]

    @property
    def around(self) -> list[float]:
        """What was neither the POST nor the step: claiming the row, keeping the outcome, telling of it."""
        return [ready - post - step for ready, post, step in zip(self.ready, self.post, self.step, strict=True)]


class Provisioning:
    """The results of all engines, as a part of the report."""

    name = "provisioning"

    def __init__(self, results: Sequence[EngineResult]) -> None:
        self._results = results

    def text(self) -> list[str]:
        """Return it for a person to read."""
        rounds = len(self._results[0].ready)
        row = "{:<22} {:>9} {:>8} {:>9} {:>8} {:>24} | {:>8} {:>8} {:>8} {:>8}"
        head = ("", "ready p50", "p99", "bare p50", "p99", "ready - bare (range)", "POST", "step", "driver", "around")
        return [
            f"POST /api/portal/databases until `ready`: {rounds} in sequence on an idle server, through Envoy,",
            "over SQLite; ms. Each beside the driver alone, and beside the statements that it sends, said again by",
            "hand (bare), on the same cluster, the order rotating, each with a new connection.",
            "",
            row.format(*head),
            *(row.format(*_cells(result)) for result in self._results),
            "",
            "The end is told by the feed's long poll, which waits there before the row is settled: the waiter asks",
            "nothing meanwhile, and adds the way back through Envoy only. p99 of so few is the slowest.",
            "ready = POST + step + around. POST: until it is answered; step: the reconciler's, which is the driver",
            "in the server; around: claiming the row, keeping the outcome, telling of it. PostgreSQL does not wait",
            "for the disk (fsync = off); the server's own SQLite does, at each of its commits.",
        ]

    def aims(self) -> list[Aim]:
        """Return what is aimed at and what was reached."""
        return [
            Aim(
                f"{result.title}: less than {_MOST_OVERHEAD:.0f} ms more than the bare statements",
                f"{spread(result.overhead, digits=1)} ms",
                median(result.overhead) < _MOST_OVERHEAD,
            )
            for result in self._results
        ]

    def facts(self) -> dict[str, Any]:
        """Return it for programs."""
        return {"engines": [{**asdict(result), "overhead": result.overhead} for result in self._results]}


async def measure_provisioning(folder: Path, clusters: Sequence[Cluster], *, rounds: int = 30) -> Provisioning:
    """Create databases on every cluster, one after another, in three ways; the server's data is in this folder.

    Raises Differs if the statements by hand do not make the same, CallError if a database does not become ready.
    """
    settings = new_settings(folder, folder / "catalog.toml")
    (folder / "catalog.toml").write_text(catalog_of(clusters))
    store = Store(settings.storage_url)
    try:
        _, token = await open_account(store, Keys.load(settings.keys_path))
    finally:
        await store.close()
    results = []
    with serving(settings) as ours:
        customer = _Customer(ours, token)
        for cluster in clusters:
            await _measure(customer, cluster, rounds=_WARM)
            results.append(await _measure(customer, cluster, rounds=rounds))
    return Provisioning(results)


async def _measure(customer: "_Customer", cluster: Cluster, *, rounds: int) -> EngineResult:
    """Create in each way, again and again. Each database goes before the next comes, so that all find the same."""
    result = EngineResult(cluster.kind, cluster.title)
    make, _ = await record(cluster)

    async def ours() -> None:
        customer.create(cluster, result)

    async def alone(took: list[float], work: Callable[[], Awaitable[object]], name: str) -> None:
        began = perf_counter()
        await work()
        took.append((perf_counter() - began) * 1000)
        await cluster.engine.drop(name)

    async def driver() -> None:
        target = new_target()
        await alone(result.driver, partial(cluster.engine.apply, target), target.name)

    async def by_hand() -> None:
        name = new_target().name
        await alone(result.by_hand, make(name), name)

    ways = (ours, driver, by_hand)
    for number in range(rounds):
        for place in range(len(ways)):
            await ways[(number + place) % len(ways)]()
    return result


class _Customer:
    """Creates databases, alone in his account, so that he knows at which place of the feed each event will be."""

    def __init__(self, ours: Ours, token: str) -> None:
        self._ours = ours
        self._caller = Caller(ours, token)
        self._events = 0
        self._made = 0

    def create(self, cluster: Cluster, result: EngineResult) -> None:
        """Create a database, wait until it is ready, and have it removed again."""
        self._made += 1
        name = f"bench-{self._made}"
        before, began = self._step_seconds(), perf_counter()
        body = {"name": name, "engine": cluster.kind, "sku": cluster.sku}
        _, post = self._caller.ask("POST", "/api/portal/databases", body)
        self._wait_for("database.ready", name)
        result.ready.append((perf_counter() - began) * 1000)
        result.post.append(post)
        result.step.append((self._step_seconds() - before) * 1000)
        self._caller.ask("DELETE", f"/api/portal/databases/{name}")
        self._wait_for("database.deleted", name)

    def _wait_for(self, type_: str, name: str) -> None:
        """Wait for what becomes of an order, which is an event itself.

        Raises CallError for anything else.
        """
        text, _ = self._caller.ask("GET", f"/api/portal/events?after={self._events + 1}&wait={_WAIT}")
        self._events += 2
        events = [(event["type"], event["resource_name"], event.get("detail")) for event in json.loads(text)]
        if [event[:2] for event in events] != [(type_, name)]:
            raise CallError(f"Instead of {type_} of {name} the feed has {events}.")

    def _step_seconds(self) -> float:
        """Return how long the reconciler's steps have taken so far, as the server itself counts."""
        url = f"http://127.0.0.1:{self._ours.settings.metrics_port}/metrics"
        with urllib.request.urlopen(url) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.removeprefix(_STEP_SECONDS)) for line in lines if line.startswith(_STEP_SECONDS))


def _cells(result: EngineResult) -> tuple[str, ...]:
    return (
        result.title,
        f"{median(result.ready):.1f}",
        f"{percentile(result.ready, 99):.1f}",
        f"{median(result.by_hand):.1f}",
        f"{percentile(result.by_hand, 99):.1f}",
        spread(result.overhead, digits=1),
        *(f"{median(part):.1f}" for part in (result.post, result.step, result.driver, result.around)),
    )
