"""Pages of the site that are not written in docs/: those of other folders, and the reference that the protos are.

A hook of MkDocs (mkdocs.yml); the comments of a .proto are its manual, so the reference is made of nothing else.
"""

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

ROOT = Path(__file__).parents[1]
# Where a page of the repository stands in the site.
COPIED = {"README.md": "index.md", "models/tiny/README.md": "models/tiny/README.md"}
COPIED |= {"services/README.md": "services/README.md"}
REFERENCES = {"api.md": ("API reference", "avatar/v1"), "workers.md": ("Contract of the workers", "avatar/worker/v1")}

# The numbers by which a FileDescriptorProto names its parts.
MESSAGE, ENUM, SERVICE = 4, 5, 6
FIELD, NESTED, NESTED_ENUM = 2, 3, 4


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    pages = {target: moved(source, target) for source, target in COPIED.items()}
    pages |= {target: reference(title, folder) for target, (title, folder) in REFERENCES.items()}
    for target, text in pages.items():
        files.append(File.generated(config, target, content=text))
    return files


def moved(source: str, target: str) -> str:
    """A page of the repository, its links as they are from its place in the site."""

    def link(match: re.Match[str]) -> str:
        wanted = os.path.normpath(Path(source).parent / match[1])
        at = COPIED.get(wanted, wanted.removeprefix("docs/"))
        return f"]({os.path.relpath(at, Path(target).parent)}"

    return re.sub(r"\]\((?!\w+:|#)([^)#]+)", link, (ROOT / source).read_text(encoding="utf-8"))


def reference(title: str, folder: str) -> str:
    """Services, messages and enumerations of a package, in the words of its files."""
    files = sorted((ROOT / "protos" / folder).glob("*.proto"))
    parts = [f"# {title}", f"Package `{folder.replace('/', '.')}`; the files are in `protos/{folder}`."]
    described = [Described(file) for file in descriptors(files)]
    for each in described:
        parts += each.services()
    for each in described:
        parts += each.types()
    return "\n\n".join(parts) + "\n"


def descriptors(files: Sequence[Path]) -> list[FileDescriptorProto]:
    """What the compiler makes of the files, comments included."""
    with tempfile.NamedTemporaryFile() as out:
        arguments = [f"--proto_path={ROOT / 'protos'}", "--include_source_info", f"--descriptor_set_out={out.name}"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments, *map(str, files)], check=True)
        return list(FileDescriptorSet.FromString(Path(out.name).read_bytes()).file)


class Described:
    """One file's parts as Markdown."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._comments = {
            tuple(each.path): textwrap.dedent(each.leading_comments or each.trailing_comments).strip("\n")
            for each in file.source_code_info.location
        }

    def services(self) -> Iterator[str]:
        for i, service in enumerate(self._file.service):
            yield f"## {service.name}"
            yield self._comments[SERVICE, i]
            for j, method in enumerate(service.method):
                yield f"### {method.name}"
                asked = ("stream " if method.client_streaming else "") + short(method.input_type)
                answered = ("stream " if method.server_streaming else "") + short(method.output_type)
                yield f"`{method.name}({asked}) returns ({answered})`"
                yield self._comments[SERVICE, i, 2, j]

    def types(self) -> Iterator[str]:
        for i, message in enumerate(self._file.message_type):
            yield from self._message(message, (MESSAGE, i), "")
        for i, enum in enumerate(self._file.enum_type):
            yield from self._enum(enum, (ENUM, i), "")

    def _message(self, message: DescriptorProto, path: tuple[int, ...], outer: str) -> Iterator[str]:
        name = outer + message.name
        yield f"## {name}"
        yield self._comments[path]
        if message.field:
            rows = [
                f"| `{field.name}` | {kind(field)} | {self._cell((*path, FIELD, i))} |"
                for i, field in enumerate(message.field)
            ]
            yield "\n".join(["| field | type | meaning |", "| --- | --- | --- |", *rows])
        for i, nested in enumerate(message.nested_type):
            yield from self._message(nested, (*path, NESTED, i), f"{name}.")
        for i, enum in enumerate(message.enum_type):
            yield from self._enum(enum, (*path, NESTED_ENUM, i), f"{name}.")

    def _enum(self, enum: EnumDescriptorProto, path: tuple[int, ...], outer: str) -> Iterator[str]:
        yield f"## {outer}{enum.name}"
        yield self._comments.get(path, "")
        rows = [f"| `{value.name}` | {self._cell((*path, 2, i))} |" for i, value in enumerate(enum.value)]
        yield "\n".join(["| value | meaning |", "| --- | --- |", *rows])

    def _cell(self, path: tuple[int, ...]) -> str:
        return " ".join(self._comments.get(path, "").split()).replace("|", "\\|")


def short(name: str) -> str:
    return name.rpartition(".")[2]


def kind(field: FieldDescriptorProto) -> str:
    """A field's type, with what it may be: one of several, several, or not set."""
    name = short(field.type_name) or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated `{name}`"
    if field.proto3_optional:
        return f"optional `{name}`"
    return f"one of: `{name}`" if field.HasField("oneof_index") else f"`{name}`"
