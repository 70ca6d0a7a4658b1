"""The comments of the .proto files: the document's prose."""

from collections.abc import Iterator

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

_MESSAGE = FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER
_SERVICE = FileDescriptorProto.SERVICE_FIELD_NUMBER
_MEMBER = 2  # the number of both `DescriptorProto.field` and `ServiceDescriptorProto.method`


class Comments(dict[str, str]):
    """The comments by full name, with paragraphs apart by an empty line and no other line ends."""

    def __missing__(self, name: str) -> str:
        raise SystemExit(f"{name} has no comment in its .proto file: write the sentence that the document shall show.")


def read_comments(contract: FileDescriptorSet) -> Comments:
    """Return the comments of all services, RPCs, messages and fields that have one."""
    found = Comments()
    for file in contract.file:
        texts = {tuple(at.path): at.leading_comments for at in file.source_code_info.location}
        for name, path in _places(file):
            if texts.get(path):
                paragraphs = texts[path].strip().split("\n\n")
                found[name] = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return found


def _places(file: FileDescriptorProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each full name with its path in the source info."""
    for i, service in enumerate(file.service):
        yield f"{file.package}.{service.name}", (_SERVICE, i)
        for j, method in enumerate(service.method):
            yield f"{file.package}.{service.name}.{method.name}", (_SERVICE, i, _MEMBER, j)
    for i, message in enumerate(file.message_type):
        yield f"{file.package}.{message.name}", (_MESSAGE, i)
        for j, field in enumerate(message.field):
            yield f"{file.package}.{message.name}.{field.name}", (_MESSAGE, i, _MEMBER, j)
