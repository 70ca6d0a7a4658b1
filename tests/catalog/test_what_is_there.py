"""A region has what its clusters that are really there can take, and the log says why a database is where it is."""

from pathlib import Path

import pytest
import structlog

from controlplane.catalog.model import Catalog
from controlplane.databases.placement import place
from controlplane.errors import Conflict
from tests.stack import Stack

CLUSTER = """
[[clusters]]
name = "{name}"
engine = "{engine}"
region = "elsewhere"
admin = "env:NOT_NEEDED"
host = "db.example.com"
port = 1
{rest}
"""


@pytest.fixture
def several(tmp_path: Path, catalog: Path) -> Catalog:
    """A catalogue with several clusters in one region."""
    clusters = [
        CLUSTER.format(name="choice-small", engine="postgresql", rest="capacity = 2"),
        CLUSTER.format(name="choice-large", engine="postgresql", rest="capacity = 3"),
        CLUSTER.format(name="choice-old", engine="postgresql", rest="drained = true"),
        CLUSTER.format(name="choice-mysql", engine="mysql", rest="capacity = 1"),
    ]
    file = tmp_path / "catalog.toml"
    file.write_text(catalog.read_text() + "".join(clusters))
    return Catalog.load(file)


async def test_the_log_explains_the_choice(stack: Stack, several: Catalog) -> None:
    """The line names each candidate with its use and capacity, and the drained clusters that were none."""
    async with stack.server.store.session() as session:
        with structlog.testing.capture_logs() as lines:
            chosen = [(await place(session, several, engine="postgresql", region="elsewhere")).name for _ in range(3)]
    assert chosen == ["choice-large", "choice-small", "choice-large"]
    assert [line["candidates"] for line in lines] == [
        {"choice-small": "0 of 2 used", "choice-large": "0 of 3 used"},
        {"choice-small": "0 of 2 used", "choice-large": "1 of 3 used"},
        {"choice-small": "1 of 2 used", "choice-large": "1 of 3 used"},
    ]
    assert {(line["event"], *line["drained"]) for line in lines} == {("placed", "choice-old")}


async def test_a_cluster_that_is_not_there_takes_nothing(stack: Stack, several: Catalog) -> None:
    """A catalogue without a cluster does not list its engine, and refuses an order with what the region has."""
    assert several.engines_in("elsewhere") == ["mysql", "postgresql"]
    there = several.with_clusters({"choice-small"})
    assert there.engines_in("elsewhere") == ["postgresql"]
    nothing = there.with_clusters(())
    for catalog, has in ((there, "postgresql"), (nothing, "nothing yet")):
        async with stack.server.store.session() as session:
            with pytest.raises(Conflict, match=f"The region 'elsewhere' has no mysql, it has {has}: /api/portal/regi"):
                await place(session, catalog, engine="mysql", region="elsewhere")
