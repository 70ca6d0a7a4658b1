"""The catalogue: what is wrong with one is said in a sentence with its place; what is in it is shown over REST."""

import tomllib
from pathlib import Path

import pytest

from controlplane.catalog.model import BUILT_IN, Catalog, CatalogError
from tests.stack import Customer, Stack

GOOD = BUILT_IN.read_text()
PLAN, SKU, REGION = 'name = "starter"', 'name = "db-s-1vcpu-1gb"', 'name = "local"\ntitle'
CLUSTER = 'name = "local-postgresql"'
ELSEWHERE = 'admin = "env:HTX_NOT_SET"\nhost = "db.example.com"\nport = 5432'

# What is replaced by what, and the sentence that it must give.
PROBLEMS = [
    ('default_plan = "starter"', "", "default_plan: Field required"),
    ('default_plan = "starter"', 'default_plan = "gold"', "default_plan: there is no plan 'gold'"),
    ('default_region = "local"', 'default_region = "mars"', "default_region: there is no region 'mars'"),
    (
        'region = "local"\nadmin',
        'region = "mars"\nadmin',
        "clusters.local-postgresql.region: there is no region 'mars'",
    ),
    ('name = "business"', PLAN, "plans: 'starter' stands there more than once"),
    ('name = "db-s-1vcpu-2gb"', SKU, "skus: 'db-s-1vcpu-1gb' stands there more than once"),
    (PLAN, 'name = "Starter Plan"', "plans.0.name: String should match pattern"),
    (PLAN, f"{PLAN}\ncolour = 1", "plans.0.colour: Extra inputs are not permitted"),
    ("databases = 5,", "databases = -1,", "plans.0.quotas.databases: Input should be greater than or equal to 0"),
    ("databases = 5,", "datebases = 5,", "plans.0.quotas.datebases: Extra inputs are not permitted"),
    ("rate_limit_per_minute = 120", "rate_limit_per_minute = 0", "plans.0.rate_limit_per_minute: Input should be"),
    (SKU, 'name = "xl-1"', "skus.0: 'xl-1' must begin with one of db-, ch-"),
    (SKU, 'name = "ch-tiny"', "skus.0: 'ch-tiny' cannot be a size of postgresql: its family is clickhouse"),
    ('engines = ["clickhouse"]', 'engines = ["oracle"]', "skus.3.engines.0: Input should be 'postgresql', 'mysql'"),
    ('engines = ["clickhouse"]', "engines = []", "skus.3.engines: Tuple should have at least 1 item"),
    ("connections = 80", "connections = 0", "skus.2.connections: Input should be greater than or equal to 1"),
    ("memory_mb = 4096", 'memory_mb = "much"', "skus.2.memory_mb: Input should be a valid integer"),
    (REGION, 'name = "local"\ntitel', "regions.0.title: Field required"),
    (
        'engine = "postgresql"\nregion',
        'engine = "mongodb"\nregion',
        "clusters.0: 'admin = \"embedded\"' is for postgresql, mysql, clickhouse only",
    ),
    ('admin = "embedded"', 'admin = "postgresql://a@b/c"', "clusters.0: 'host' and 'port' must say where"),
    (
        'admin = "embedded"',
        'admin = "somewhere"\nhost = "h"\nport = 1',
        "clusters.0: 'admin' must be a URL, 'env:NAME', 'file:PATH' or 'embedded'",
    ),
    ("capacity = 200", "capacity = -1", "clusters.0.capacity: Input should be greater than or equal to 0"),
    (
        'admin = "embedded"',
        ELSEWHERE.replace("5432", "99999"),
        "clusters.0.port: Input should be less than or equal to 65535",
    ),
    ("[[plans]]", "[[plans]", "is not TOML: "),
]


@pytest.mark.parametrize(("old", "new", "sentence"), PROBLEMS)
def test_each_problem_has_its_sentence(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    """The sentence begins with the file, then the place, then what is wrong there."""
    file = tmp_path / "catalog.toml"
    assert old in GOOD
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(CatalogError) as wrong:
        Catalog.load(file)
    assert str(wrong.value).startswith(f"{file}: {sentence}")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """An operator sees every wrong field in one go."""
    file = tmp_path / "catalog.toml"
    file.write_text(GOOD.replace("vcpus = 1", "vcpus = 0").replace('title = "This machine"', 'title = ""\nsize = 1'))
    with pytest.raises(CatalogError) as wrong:
        Catalog.load(file)
    places = [problem.partition(":")[0] for problem in wrong.value.problems]
    assert {*places} >= {"skus.0.vcpus", "skus.1.vcpus", "skus.3.vcpus", "regions.0.title", "regions.0.size"}
    assert len(str(wrong.value).splitlines()) == len(places)


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, content: bytes | None) -> None:
    """A missing file, and one that is not UTF-8, are one sentence too."""
    file = tmp_path / "catalog.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CatalogError, match="cannot be read: No such file" if content is None else "is not TOML"):
        Catalog.load(file)


def test_the_built_in_catalogue_is_fine() -> None:
    """Without a file there is a catalogue that works as it stands, and everything in it can be placed."""
    catalog = Catalog.load(None)
    assert catalog.plan(catalog.default_plan).rate_limit_per_minute == 120
    for engine in ("postgresql", "mysql", "clickhouse"):
        assert catalog.clusters_for(engine=engine, region=catalog.default_region)
        assert any(engine in sku.engines for sku in catalog.skus)
    assert {plan.name for plan in catalog.plans} == {"starter", "business"}


def test_the_built_in_examples_are_fine(tmp_path: Path) -> None:
    """The cluster that stands in the comments can be used as it stands there."""
    commented = GOOD.split("# [[clusters]]\n")[1].split("\n")
    lines = "\n".join(line.removeprefix("# ").partition("   #")[0] for line in commented)
    file = tmp_path / "catalog.toml"
    file.write_text(f'{GOOD}\n[[regions]]\nname = "fra1"\ntitle = "Frankfurt"\n[[clusters]]\n{lines}')
    assert Catalog.load(file).clusters[-1].name == "fra1-postgresql-1"


def test_an_admin_url_may_be_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The URL with the password comes from a variable or a file, and is in no message."""
    url = "postgresql://admin:hunter2@db.example.com:5432/postgres"
    secret = tmp_path / "url"
    file = tmp_path / "catalog.toml"
    for admin in ("env:HTX_ADMIN_URL", f"file:{secret}", url):
        elsewhere = ELSEWHERE.replace("env:HTX_NOT_SET", admin)
        file.write_text(GOOD.replace('admin = "embedded"', elsewhere))
        cluster = Catalog.load(file).clusters[0]
        if admin != url:
            with pytest.raises(CatalogError, match=f"admin: {admin} holds no URL"):
                cluster.admin_url()
            monkeypatch.setenv("HTX_ADMIN_URL", url)
            secret.write_text(f"{url}\n")
        assert cluster.admin_url() == url
        assert "hunter2" not in repr(cluster)
        monkeypatch.delenv("HTX_ADMIN_URL", raising=False)
        secret.unlink(missing_ok=True)


@pytest.mark.usefixtures("functions", "proxy_port")
async def test_rest_lists_what_is_for_sale(stack: Stack, customer: Customer) -> None:
    """Plans, sizes and regions are the catalogue's, in its order, with what runs there and nothing of the clusters."""
    assert stack.settings.catalog is not None
    catalog = tomllib.loads(stack.settings.catalog.read_text())
    for kind in ("plans", "skus"):
        answer = await customer.call("GET", f"/api/portal/{kind}")
        assert answer.status_code == 200
        assert answer.json() == catalog[kind]
    regions = await customer.call("GET", "/api/portal/regions")
    lacking = {"engines": [], "runtimes": [], "function_network": False, "proxies": False}
    local, elsewhere = regions.json()
    assert (
        local.items() >= {"name": "local", "title": "This machine", "engines": ["postgresql"], "proxies": True}.items()
    )
    assert "python3" in local["runtimes"]
    assert elsewhere == {"name": "elsewhere", "title": "A region without clusters", **lacking}
