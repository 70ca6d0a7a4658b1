"""Print the OpenAPI document of the contract: `python proto/openapi CONTRACT.binpb`.

Routes, policies, rules and types are those of the generated package; the file, a FileDescriptorSet with source info,
gives what the package lacks: the comments.
"""

import json
import sys
from pathlib import Path
from typing import Any

from answers import HEADERS, failures
from comments import Comments, read_comments
from google.protobuf import descriptor_pb2
from operations import PARAMETERS, Operations, tag
from schemas import Schemas

from controlplane import __version__
from controlplane.api.v1 import errors_pb2
from controlplane.rpc.contract import rpcs

INTRODUCTION = Path(__file__).with_name("introduction.md")
# The transcoder's routes cannot end in a slash, and this one is documented with it; the edge serves both.
DOCUMENTED_PATHS = {"/api/v1/account/me": "/api/v1/account/me/"}


def main(contract: Path) -> None:
    """Print the document on stdout."""
    comments = read_comments(descriptor_pb2.FileDescriptorSet.FromString(contract.read_bytes()))
    text = json.dumps(_document(comments), ensure_ascii=False, indent=2) + "\n"
    sys.stdout.buffer.write(text.encode())


def _document(comments: Comments) -> dict[str, Any]:
    schemas = Schemas(comments=comments)
    operations = Operations(schemas=schemas, comments=comments)
    tags: dict[str, dict[str, str]] = {}
    paths: dict[str, dict[str, Any]] = {}
    for rpc in rpcs().values():
        tags[rpc.service] = {"name": tag(rpc), "description": comments[rpc.service]}
        path = DOCUMENTED_PATHS.get(rpc.route, rpc.route)
        paths.setdefault(path, {})[rpc.verb.lower()] = operations.describe(rpc)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "HTX Cloud Portal API",
            "version": __version__,
            "description": INTRODUCTION.read_text(encoding="utf-8"),
        },
        "servers": [{"url": "/"}],
        "security": [{"bearerAuth": []}, {"sessionCookie": []}],
        "tags": list(tags.values()),
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearerAuth": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API token, `htx_…`. Its scope is decided when it is created.",
                },
                "sessionCookie": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": "__Host-htx_session",
                    "description": "A browser login, made by `POST /api/portal/session`.",
                },
            },
            "parameters": PARAMETERS,
            "headers": HEADERS,
            "responses": failures(schemas.refer(errors_pb2.Error.DESCRIPTOR, answer=True)),
            "schemas": schemas.components,
        },
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
