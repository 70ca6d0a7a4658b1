"""The contract as the descriptors state it: of every RPC its REST route, who may call it, and what it answers."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from google.api import annotations_pb2, http_pb2
from google.protobuf.descriptor import Descriptor, FileDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from controlplane.api import v1
from controlplane.api.buf.validate import validate_pb2
from controlplane.api.v1 import access_pb2

_WORD = re.compile("[A-Z][a-z]*")


@dataclass(frozen=True, slots=True)
class Rpc:
    """One RPC.

    `path` is the gRPC path, `/package.Service/Method`. `verb` and `route` are those of the REST route; `body` is the
    request's field that the JSON body fills, `response_body` the response's field that the JSON answer shows, each
    empty when there is none. `writes` is whether it may change something, which a GET may not unless it says so.
    `status` is the HTTP status of success, `errors` those of failures that are its own. `longest_wait` is for how many
    seconds a caller can have it wait until there is something to answer with; 0 for an RPC that answers at once.
    `seconds` is for how long it may run beyond what others may, `max_body_bytes` how large its body may be, 0 where the
    setting holds.
    """

    descriptor: MethodDescriptor
    path: str
    verb: str
    route: str
    body: str
    response_body: str
    access: access_pb2.Access
    writes: bool
    status: int
    errors: tuple[int, ...]
    longest_wait: int
    seconds: int
    max_body_bytes: int
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
    def waits(self) -> bool:
        """Whether it may wait until there is something to answer with."""
        return self.longest_wait > 0

    @property
    def action(self) -> str:
        """What it does, as `resource.verb`: `database.create` for CreateDatabase."""
        verb, *noun = _WORD.findall(self.name)
        return f"{'_'.join(noun)}.{verb}".lower()


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
    answer, bounds = options.Extensions[access_pb2.answer], options.Extensions[access_pb2.bounds]
    says_writes = options.HasExtension(access_pb2.writes)
    return Rpc(
        descriptor=method,
        path=f"/{method.containing_service.full_name}/{method.name}",
        verb=verb.upper(),
        route=getattr(rule, verb),
        body=rule.body,
        response_body=rule.response_body,
        access=access,
        writes=options.Extensions[access_pb2.writes] if says_writes else verb != "get",
        status=answer.status or 200,
        errors=tuple(answer.errors),
        longest_wait=_longest_wait(method.input_type),
        seconds=bounds.seconds,
        max_body_bytes=bounds.max_body_bytes,
        request=GetMessageClass(method.input_type),
        response=GetMessageClass(method.output_type),
    )


def _longest_wait(request: Descriptor) -> int:
    wait = request.fields_by_name.get("wait")
    return wait.GetOptions().Extensions[validate_pb2.field].int32.lte if wait is not None else 0
