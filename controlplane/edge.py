"""The edge's configuration: `envoy/envoy.yaml.in`, filled in from the settings and the contract.

`python -m controlplane.edge` prints the one for a container, which is committed as `envoy/envoy.yaml`.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from controlplane.api.v1 import access_pb2
from controlplane.rpc.contract import Rpc, rpcs
from controlplane.settings import HEALTH_CHECK_EVERY, HEALTH_CHECK_PATIENCE, Settings

_VARIABLE = re.compile(r"\{(\w+)\}")


def main() -> None:
    """Print the configuration for a container, whatever this machine, its user and its variables are like."""
    # Not Settings(), which would read the variables.
    settings = Settings.model_construct(data_dir=Path("/var/lib/htx"), http_host="0.0.0.0")  # noqa: S104
    sys.stdout.write(_render(settings, Path("/etc/htx/envoy/transcoder.binpb")))


def write(settings: Settings) -> Path:
    """Write what Envoy starts with into the run folder; return the configuration's path."""
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    if settings.tls_cert is not None and settings.tls_key is not None:
        certificate = render_certificate(settings.tls_cert, settings.tls_key)
        (settings.run_dir / "edge-certificate.json").write_text(certificate)
    config = settings.run_dir / "envoy.yaml"
    config.write_text(render(settings))
    return config


def render(settings: Settings) -> str:
    """Return Envoy's configuration (YAML)."""
    return _render(settings, _folder() / "transcoder.binpb")


def render_certificate(cert: Path, key: Path) -> str:
    """Return what belongs into `edge-certificate.json` in the run folder before Envoy starts, when there is TLS.

    Envoy takes up a renewed certificate when it is renamed into place, after its key.
    """
    certificate = {
        "certificate_chain": {"filename": str(cert.absolute())},
        "private_key": {"filename": str(key.absolute())},
        "watched_directory": {"path": str(cert.absolute().parent)},
    }
    kind = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
    return json.dumps({"resources": [{"@type": kind, "name": "certificate", "tls_certificate": certificate}]})


def _render(settings: Settings, transcoder: Path) -> str:
    jinja = Environment(  # noqa: S701  # this is YAML for Envoy and no page for a browser
        loader=FileSystemLoader(_folder()),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    contract = rpcs().values()
    function_body = next(rpc.max_body_bytes for rpc in contract if rpc.name == "InvokeFunction")
    return jinja.get_template("envoy.yaml.in").render(
        settings=settings,
        sockets=settings.server_sockets,
        health_check_every=HEALTH_CHECK_EVERY,
        health_check_patience=HEALTH_CHECK_PATIENCE,
        transcoder=transcoder,
        package=access_pb2.DESCRIPTOR.package,
        services=sorted({rpc.service for rpc in contract}),
        utf8=_utf8(),
        variables=_variables(contract),
        verbs=_verbs(contract),
        awaits=_pattern(rpc for rpc in contract if rpc.waits),
        longest_wait=max(rpc.longest_wait for rpc in contract),
        largest_body=max(settings.max_body_bytes, *(rpc.max_body_bytes for rpc in contract)),
        # Later than the host's own answer that it took too long.
        function_seconds=max(rpc.seconds for rpc in contract) + settings.upstream_timeout,
        function_body=function_body,
        large_bodies=[
            ("function", function_body),
            *((rpc.name, rpc.max_body_bytes) for rpc in contract if rpc.max_body_bytes),
        ],
        function_hosts=[_place(address) for address in settings.function_host_addresses],
        long_reads=_pattern(rpc for rpc in contract if _answers_long(rpc)),
        reads=_pattern(rpc for rpc in contract if not rpc.writes),
        bodies=[(rpc, _pattern([rpc]), _fields(rpc.request.DESCRIPTOR)[rpc.body]) for rpc in contract if rpc.body],
        writes=_pattern(rpc for rpc in contract if rpc.writes),
    )


def _place(address: str) -> tuple[str, str, int]:
    """Return the kind of an address, unix or tcp, and its path, or its host and port."""
    if address.startswith("unix:"):
        return "unix", address.removeprefix("unix:"), 0
    host, _, port = address.rpartition(":")
    return "tcp", host.strip("[]"), int(port)


def _folder() -> Path:
    """Return the folder of the template: in a checkout beside the package, when installed inside it.

    Inside comes first: beside an installed package lies the `envoy` package that brings the program.
    """
    package = Path(__file__).resolve().parent
    inside = package / "envoy"
    return inside if inside.is_dir() else package.parent / "envoy"


def _utf8() -> str:
    """Return an RE2 pattern of what is UTF-8 once its percent-escapes are decoded (RFC 3629, section 4)."""
    x, tail = "[0-9a-f]", "%[89ab][0-9a-f]"
    two = f"(c[2-9a-f]|d{x})"
    three = f"(e0%[ab]{x}|e[1-9a-cef]{tail}|ed%[89]{x})"
    four = f"(f0%[9ab]{x}|f[1-3]{tail}|f4%8{x}){tail}"
    return f"(?i)([^%]|%[0-7]{x}|%({two}|{three}|{four}){tail})*"


def _variables(contract: Iterable[Rpc]) -> list[tuple[str, str]]:
    """Return the variables of the routes as a query can spell them, each with the pattern of the paths that have it."""
    having: dict[str, list[Rpc]] = defaultdict(list)
    for rpc in contract:
        for name in _VARIABLE.findall(rpc.route):
            for spelling in {name, rpc.request.DESCRIPTOR.fields_by_name[name].json_name}:
                having[spelling].append(rpc)
    return [(name, _pattern(having[name])) for name in sorted(having)]


def _verbs(contract: Iterable[Rpc]) -> list[tuple[list[str], str]]:
    """Return each set of verbs that some path has, with the pattern of the paths that have exactly those."""
    of_route: dict[str, list[Rpc]] = defaultdict(list)
    for rpc in contract:
        of_route[rpc.route].append(rpc)
    having: dict[tuple[str, ...], list[Rpc]] = defaultdict(list)
    for same in of_route.values():
        having[tuple(sorted(rpc.verb for rpc in same))] += same
    return [(list(verbs), _pattern(having[verbs])) for verbs in sorted(having)]


def _answers_long(rpc: Rpc) -> bool:
    """Whether the answer is a list or a document: worth compressing, and without secrets that this could leak."""
    return bool(rpc.response_body) or rpc.response.DESCRIPTOR.full_name == "google.api.HttpBody"


def _pattern(contract: Iterable[Rpc]) -> str:
    """Return an RE2 pattern of the paths of these RPCs, also with one last slash, which the transcoder overlooks."""
    routes = sorted({rpc.route for rpc in contract})
    return "(" + "|".join(_VARIABLE.sub("[^/]+", route) for route in routes) + ")/?"


def _fields(message: Any) -> dict[str, Any]:
    """Return the names of a message's fields, each with those inside it, or with none where any may be."""
    names: dict[str, Any] = {}
    for field in message.fields:
        inner = field.message_type
        closed = inner is not None and inner.file.package == message.file.package and not inner.GetOptions().map_entry
        names[field.name] = _fields(inner) if closed else {}
    return names


if __name__ == "__main__":
    main()
