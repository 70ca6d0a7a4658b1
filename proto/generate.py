"""Derive from the .proto files everything that is committed and never edited: `make proto`.

With `--check`, write nothing and fail if what is committed differs: `make proto-check`. With `--image FILE`, write all
descriptors with their comments to a file and nothing else, for buf's checks.

    controlplane/api/v1/*_pb2.py, *_pb2_grpc.py, *.pyi   messages, servicers and stubs, with types
    controlplane/api/openapi.json                        the OpenAPI document
    envoy/transcoder.binpb                               the descriptors as Envoy's transcoder needs them
    envoy/envoy.yaml                                     the edge's configuration with the default settings
    docs/permissions.md                                  the table of who may call what
"""

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc_tools
from google.api import annotations_pb2, httpbody_pb2
from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from protovalidate import ViolationPb

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
# The field rules are not published as a .proto file, but the validating library carries their descriptor.
VALIDATE = descriptor_pb2.FileDescriptorProto.FromString(ViolationPb.desc().file.proto.to_binary())

_INSIDE = "controlplane.api.hosts."  # what hosts ask, which the edge never sees
_DEPENDENCIES_OF_HTTPBODY = tuple(file.name for file in httpbody_pb2.DESCRIPTOR.dependencies)


def main() -> int:
    """Generate in place, or say what is stale."""
    if sys.argv[1:2] == ["--image"]:
        with tempfile.TemporaryDirectory() as scratch:
            _write(Path(sys.argv[2]), _compile(Path(scratch)).read_bytes())
        return 0
    if sys.argv[1:] != ["--check"]:
        _generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        _generate(fresh)
        made = sorted(path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file())
        stale = [
            str(path)
            for path in made
            if not (ROOT / path).exists() or not filecmp.cmp(ROOT / path, fresh / path, shallow=False)
        ]
        stale += [
            f"{path.relative_to(ROOT)} (no longer generated)"
            for path in sorted((ROOT / "controlplane/api").rglob("*_pb2*"))
            if path.suffix in {".py", ".pyi"} and path.relative_to(ROOT) not in made
        ]
    for path in stale:
        print(f"stale: {path}", file=sys.stderr)
    if stale:
        print("Run 'make proto' and commit what it writes.", file=sys.stderr)
    return 1 if stale else 0


def _generate(root: Path) -> None:
    """Write everything below `root`."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        image = _compile(out)
        _write_package(out, root / "controlplane/api")
        contract = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes())
        _write(root / "envoy/transcoder.binpb", _transcoder_set(contract).SerializeToString(deterministic=True))
        # In processes of their own, because they import the package that was written just now.
        _write(root / "controlplane/api/openapi.json", _run(str(HERE / "openapi"), str(image)))
        _write(root / "envoy/envoy.yaml", _run("-m", "controlplane.edge"))
        _write(root / "docs/permissions.md", _run(str(HERE / "permissions.py")))


def _compile(out: Path) -> Path:
    """Run protoc over our files and the field rules; return the path of all descriptors with their comments."""
    rules, image = out / "rules.binpb", out / "contract.binpb"
    rules.write_bytes(descriptor_pb2.FileDescriptorSet(file=[VALIDATE]).SerializeToString())
    programs = Path(sys.executable).parent
    site = Path(annotations_pb2.__file__).parent.parent.parent
    arguments = [
        "protoc",
        f"--proto_path={HERE}",
        f"--proto_path={site}",
        f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
        f"--descriptor_set_in={rules}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        *(f"--plugin={plugin}={programs / plugin}" for plugin in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet,only_async:{out}",
        "--include_imports",
        "--include_source_info",
        f"--descriptor_set_out={image}",
        "buf/validate/validate.proto",
        *sorted(str(path.relative_to(HERE)) for path in (HERE / "controlplane").rglob("*.proto")),
    ]
    if protoc.main(arguments) != 0:
        sys.exit(1)
    return image


def _write_package(out: Path, package: Path) -> None:
    """Copy protoc's Python below `package`, with the field rules as a part of it and not as a package of their own."""
    for old in package.rglob("*_pb2*"):
        old.unlink()
    for made in sorted(out.rglob("*_pb2*.py*")):
        inside = made.relative_to(out)
        if inside.name.startswith("validate_pb2_grpc"):
            continue
        text = made.read_text().replace("from buf.validate import", "from controlplane.api.buf.validate import")
        text = text.replace("import buf.validate", "import controlplane.api.buf.validate")
        text = text.replace("buf.validate.validate_pb2", "controlplane.api.buf.validate.validate_pb2")
        text = text.replace("controlplane.api.controlplane.api.", "controlplane.api.")
        target = package / inside if inside.parts[0] == "buf" else package.parent / inside.relative_to("controlplane")
        _write(target, text.encode())
    for folder in {path.parent for path in package.rglob("*_pb2.py")} | {package, package / "buf"}:
        _write(folder / "__init__.py", b'"""Generated from the .proto files by `make proto`; never edited."""\n')


def _transcoder_set(contract: descriptor_pb2.FileDescriptorSet) -> descriptor_pb2.FileDescriptorSet:
    """Return the descriptors as Envoy's JSON transcoder needs them.

    Its `google.rpc.Status` has the fields of our `Error`, so that it prints the bytes of `grpc-status-details-bin` in
    our own shape: number 2 is the message that Status has anyway, the others are appended by the server and unknown to
    native clients. A List RPC answers with `HttpBody`, as the server does for REST callers: a bare array is no message,
    and the transcoder knows `response_body` for `HttpBody` only.
    """
    first = (*_DEPENDENCIES_OF_HTTPBODY, httpbody_pb2.DESCRIPTOR.name)  # Envoy reads the files in their order
    made = descriptor_pb2.FileDescriptorSet(
        file=sorted(
            (file for file in contract.file if not file.package.startswith(_INSIDE)),
            key=lambda file: first.index(file.name) if file.name in first else len(first),
        )
    )
    for file in made.file:
        file.ClearField("source_code_info")
        for service in file.service:
            for method in service.method:
                rule = method.options.Extensions[annotations_pb2.http]
                if rule.response_body:
                    rule.ClearField("response_body")
                    method.output_type = f".{httpbody_pb2.HttpBody.DESCRIPTOR.full_name}"
                    if httpbody_pb2.DESCRIPTOR.name not in file.dependency:
                        file.dependency.append(httpbody_pb2.DESCRIPTOR.name)
        for message in file.message_type:
            if file.name == "controlplane/api/v1/errors.proto" and message.name == "Error":
                status = made.file.add(
                    name="google/rpc/status.proto", package="google.rpc", syntax="proto3", dependency=[file.name]
                )
                status.message_type.add(name="Status", field=message.field)
                break
    return made


def _run(*arguments: str) -> bytes:
    return subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
