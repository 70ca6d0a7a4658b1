"""The contract as the descriptors state it: of every RPC its REST route, who may call it, and what it answers."""

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from google.api import annotations_pb2, http_pb2
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from controlplane.api import v1
from controlplane.api.v1 import access_pb2


@dataclass(frozen=True, slots=True)
class Rpc:
    """One RPC.

    `path` is the gRPC path, `/package.Service/Method`. `verb` and `route` are those of the REST route; `body` is the
    request's field that the JSON body fills, `response_body` the response's field that the JSON answer shows, each
    empty when there is none. `status` is the HTTP status of success, `errors` those of failures that are its own.
    """

    descriptor: MethodDescriptor
    path: str
    verb: str
    route: str
    body: str
    response_body: str
    access: access_pb2.Access
    status: int
    errors: tuple[int, ...]
    request: type[Message]
    response: type[Message]

    @property
    def name(self) -> str:
        """The RPC's name within its service."""
        return self.descriptor.name

    @property
    def service(self) -> str:
        """The full name of its service."""
        return str(self.descriptor.containing_service.full_name)

    @property
    def writes(self) -> bool:
        """Whether it may change something; a GET may not."""
        return self.verb != "GET"


class ContractError(Exception):
    """An RPC lacks something that the server must know about it."""


@cache
def rpcs() -> dict[str, Rpc]:
    """Return every RPC of the contract by its gRPC path, in the order of the files.

    Raises ContractError for an RPC without an access policy or a REST route: the server must not start with one.
    """
    return {rpc.path: rpc for file in _files() for rpc in _rpcs(file)}


def rpcs_of(service: str) -> list[Rpc]:
    """Return the RPCs of the service with this full name."""
    return [rpc for rpc in rpcs().values() if rpc.service == service]


def _files() -> Iterator[FileDescriptor]:
    for module in pkgutil.iter_modules(v1.__path__, prefix=f"{v1.__name__}."):
        if module.name.endswith("_pb2"):
            yield importlib.import_module(module.name).DESCRIPTOR


def _rpcs(file: FileDescriptor) -> Iterator[Rpc]:
    for service in file.services_by_name.values():
        for method in service.methods:
            yield read_rpc(method)


def read_rpc(method: MethodDescriptor) -> Rpc:
    """Read one RPC from its descriptor.

    Raises ContractError if it has no access policy or no REST route.
    """
    options = method.GetOptions()
    access = options.Extensions[access_pb2.access]
    if access.WhichOneof("rule") is None:
        raise ContractError(f"{method.full_name} has no access policy: add `option (access) = {{…}}` to it.")
    rule: http_pb2.HttpRule = options.Extensions[annotations_pb2.http]
    verb = rule.WhichOneof("pattern")
    if verb is None:
        raise ContractError(f"{method.full_name} has no REST route: add `option (google.api.http) = {{…}}` to it.")
    answer = options.Extensions[access_pb2.answer]
    return Rpc(
        descriptor=method,
        path=f"/{method.containing_service.full_name}/{method.name}",
        verb=verb.upper(),
        route=getattr(rule, verb),
        body=rule.body,
        response_body=rule.response_body,
        access=access,
        status=answer.status or 200,
        errors=tuple(answer.errors),
        request=GetMessageClass(method.input_type),
        response=GetMessageClass(method.output_type),
    )
