"""``python protos/reference.py``: writes docs/api.md from the comments of the protos.

Owns the page's form. What it says is the protos'; a test holds the page to them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
PACKAGE = ".starmesh.v1."

# Field numbers of descriptor.proto: the paths of its source locations are made of them.
MESSAGES, ENUMS, SERVICES, FIELDS, VALUES, METHODS, ONEOFS = 4, 5, 6, 2, 2, 2, 8

FILES = {
    "inference": "For clients: the router's public service. With API keys it asks for the scope `generate`.",
    "cluster": "For operators: the router's `ClusterService`, scope `operate`; and what each instance answers.",
    "sequence": "What the other files share.",
    "prefill": "Within the mesh: what the router asks of prefill instances.",
    "decode": "Within the mesh: streams between routers and decode instances, and the migration protocol.",
    "transfer": "Within the mesh: how instances pull KV blocks from each other.",
    "predictor": "Within the mesh: what predicts remaining tokens.",
}
"""What each proto is, in the order of the page."""

HEAD = """# API reference

Made from the comments of `protos/` by `python protos/reference.py`; edit those, not this page. Fields are added, never
renumbered; what a peer does not know it ignores. Errors are gRPC status codes with `google.rpc` details: `BadRequest`
names the field, `RetryInfo` says when to come again.
"""

SCALARS = {
    number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items() if number != 11
}


class Commented:
    """A file's descriptors with the comments above them."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self.file = file
        self._comments = {
            tuple(location.path): location.leading_comments.strip() for location in file.source_code_info.location
        }

    def comment(self, *path: int) -> str:
        """What stands above the declaration at ``path``, its line breaks kept."""
        return "\n".join(line.strip() for line in self._comments.get(path, "").splitlines())


def read_protos() -> dict[str, Commented]:
    """All protos by their file's stem. Raises CalledProcessError when protoc fails; its message is on stderr."""
    include = [f"-I{ROOT / 'protos'}", f"-I{files('grpc_tools') / '_proto'}"]
    paths = sorted(str(path) for path in (ROOT / "protos").rglob("*.proto"))
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "protos.binpb"
        # In a process of its own: protoc's library does not get on with others that bring a protobuf of their own.
        protoc = [sys.executable, "-m", "grpc_tools.protoc", *include]
        subprocess.run([*protoc, "--include_source_info", f"--descriptor_set_out={output}", *paths], check=True)
        found = FileDescriptorSet.FromString(output.read_bytes())
    return {Path(file.name).stem: Commented(file) for file in found.file}


def page(protos: dict[str, Commented]) -> str:
    """The whole page. Raises KeyError for a proto that ``FILES`` says nothing of, and for one that is gone."""
    unknown = protos.keys() - FILES.keys()
    if unknown:
        raise KeyError(f"say in protos/reference.py what {', '.join(sorted(unknown))} is")
    parts = [HEAD, "\n".join(_contents(protos))]
    for name, about in FILES.items():
        parts.append(f"## {name}.proto\n\n{about}\n")
        parts += _file(protos[name])
    return "\n".join(parts).rstrip() + "\n"


def _contents(protos: dict[str, Commented]) -> Iterator[str]:
    for name in FILES:
        services = ", ".join(f"[{found.name}](#{found.name.lower()})" for found in protos[name].file.service)
        yield f"- [{name}.proto](#{name}proto){f': {services}' if services else ''}"
    yield ""


def _file(found: Commented) -> Iterator[str]:
    for number, service in enumerate(found.file.service):
        yield from _service(found, service, number)
    for number, message in enumerate(found.file.message_type):
        yield from _message(found, message, number)
    for number, enum in enumerate(found.file.enum_type):
        yield from _enum(found, enum, number)


def _service(found: Commented, service: ServiceDescriptorProto, number: int) -> Iterator[str]:
    yield f"### {service.name}\n"
    yield found.comment(SERVICES, number) + "\n"
    for index, method in enumerate(service.method):
        yield f"**{method.name}** ({_signature(method)})\n"
        yield found.comment(SERVICES, number, METHODS, index) + "\n"


def _signature(method: MethodDescriptorProto) -> str:
    sent = f"{'stream of ' if method.client_streaming else ''}{_link(method.input_type)}"
    answered = f"{'stream of ' if method.server_streaming else ''}{_link(method.output_type)}"
    return f"{sent} → {answered}"


def _message(found: Commented, message: DescriptorProto, number: int) -> Iterator[str]:
    yield f"### {message.name}\n"
    yield found.comment(MESSAGES, number) + "\n"
    if message.field:
        rows = [
            (f"`{field.name}`", _type(field, message), _cell(_about(found, message, number, index)))
            for index, field in enumerate(message.field)
        ]
        yield from _table(("field", "type", "meaning"), rows)


def _about(found: Commented, message: DescriptorProto, number: int, index: int) -> str:
    """A field's comment, and of which choice it is one."""
    field = message.field[index]
    about = found.comment(MESSAGES, number, FIELDS, index)
    if field.HasField("oneof_index") and not field.proto3_optional:
        choice = found.comment(MESSAGES, number, ONEOFS, field.oneof_index)
        about += f" (one of `{message.oneof_decl[field.oneof_index].name}`: {choice[:1].lower()}{choice[1:]})"
    return about


def _enum(found: Commented, enum: EnumDescriptorProto, number: int) -> Iterator[str]:
    yield f"### {enum.name}\n"
    yield found.comment(ENUMS, number) + "\n"
    rows = [
        (f"`{value.name}`", str(value.number), _cell(found.comment(ENUMS, number, VALUES, index)))
        for index, value in enumerate(enum.value)
    ]
    yield from _table(("value", "number", "meaning"), rows)


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    entry = next((nested for nested in message.nested_type if field.type_name.endswith(f".{nested.name}")), None)
    if entry is not None and entry.options.map_entry:
        return f"map of {_type(entry.field[0], entry)} to {_type(entry.field[1], entry)}"
    name = _link(field.type_name) if field.type_name else SCALARS[field.type]
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"list of {name}"
    return f"{name}, may be unset" if field.proto3_optional else name


def _link(type_name: str) -> str:
    """Our own types link to their sections, others are named in full."""
    if type_name.startswith(PACKAGE):
        name = type_name.removeprefix(PACKAGE)
        return f"[{name}](#{name.lower()})"
    return f"`{type_name.lstrip('.')}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def main() -> None:
    PAGE.write_text(page(read_protos()))
    sys.stdout.write(f"wrote {PAGE.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
