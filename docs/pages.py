"""Generate the site's pages that are not written in docs/: READMEs of other folders and the reference of the protos.

A hook of MkDocs (mkdocs.yml). The comments of a .proto are its manual, so the reference is generated from them alone.
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
DOCS = Path("docs")
# Pages of the site by their file in the repository, for files outside docs/.
COPIED = {"README.md": "index.md", "models/tiny/README.md": "models/tiny/README.md"}
COPIED |= {"services/README.md": "services/README.md"}
REFERENCES = {"api.md": ("API reference", "avatar/v1"), "workers.md": ("Worker contract", "avatar/worker/v1")}

# Field numbers of a FileDescriptorProto's and a DescriptorProto's parts, which paths to comments consist of.
MESSAGE, ENUM, SERVICE = 4, 5, 6
FIELD, NESTED, NESTED_ENUM = 2, 3, 4

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Leave out the error page, whose links are absolute and fail in a site that is opened from a file."""
    config.theme.static_templates.discard("404.html")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    pages = {target: (ROOT / source).read_text(encoding="utf-8") for source, target in COPIED.items()}
    pages |= {target: reference(title, folder) for target, (title, folder) in REFERENCES.items()}
    for target, text in pages.items():
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Adapt a page's links to the site."""
    return site_links(markdown, page.file.src_uri)


def site_links(markdown: str, page: str) -> str:
    """Return a page with its links as they are in the site.

    page: path of the page in the site. A link to a file that is not in the site becomes its text; a link to a file that
    does not exist stays, and MkDocs reports it.
    """
    sources = {target: source for source, target in COPIED.items()}
    folder = Path(sources.get(page, DOCS / page)).parent

    def adapt(match: re.Match[str]) -> str:
        image, text, wanted, anchor = match.groups()
        source = os.path.normpath(folder / wanted)
        target = site_path(source)
        if target is not None:
            return f"{image}[{text}]({os.path.relpath(target, Path(page).parent)}{anchor or ''})"
        if (ROOT / source).exists():
            return text if text.startswith("`") else f"`{text}`" if "/" in text or "." in text else text
        return match[0]

    return LINK.sub(adapt, markdown)


def site_path(source: str) -> str | None:
    """Return the place in the site of a file of the repository; None if the site does not contain it."""
    if source in COPIED:
        return COPIED[source]
    for page, (_, folder) in REFERENCES.items():
        if source.startswith(f"protos/{folder}"):
            return page
    path = Path(source)
    is_page = path.is_relative_to(DOCS) and path.suffix != ".py" and (ROOT / path).is_file()
    return path.relative_to(DOCS).as_posix() if is_page else None


def reference(title: str, folder: str) -> str:
    """Return the services, messages and enumerations of a proto package as Markdown."""
    files = sorted((ROOT / "protos" / folder).glob("*.proto"))
    parts = [f"# {title}", f"Package `{folder.replace('/', '.')}`; the files are in `protos/{folder}`."]
    described = [Described(file) for file in descriptors(files)]
    for each in described:
        parts += each.services()
    for each in described:
        parts += each.types()
    return "\n\n".join(parts) + "\n"


def descriptors(files: Sequence[Path]) -> list[FileDescriptorProto]:
    """Compile the files and return their descriptors, comments included."""
    with tempfile.NamedTemporaryFile() as out:
        arguments = [f"--proto_path={ROOT / 'protos'}", "--include_source_info", f"--descriptor_set_out={out.name}"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments, *map(str, files)], check=True)
        return list(FileDescriptorSet.FromString(Path(out.name).read_bytes()).file)


class Described:
    """The parts of one .proto file as Markdown."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._comments = {
            tuple(each.path): textwrap.dedent(each.leading_comments or each.trailing_comments).strip("\n")
            for each in file.source_code_info.location
        }

    def services(self) -> Iterator[str]:
        for i, service in enumerate(self._file.service):
            yield f"## {service.name}"
            yield with_tables(self._comments[SERVICE, i])
            for j, method in enumerate(service.method):
                yield f"### {method.name}"
                request = ("stream " if method.client_streaming else "") + short(method.input_type)
                response = ("stream " if method.server_streaming else "") + short(method.output_type)
                yield f"`{method.name}({request}) returns ({response})`"
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
        return cell(self._comments.get(path, ""))


def with_tables(comment: str) -> str:
    """Return a comment whose indented list of error reasons is a table.

    A row is `REASON  STATUS  text`, the columns at least two spaces apart; the text may go on in deeper lines.
    """
    blocks = comment.split("\n\n")
    return "\n\n".join(table_of(block) or block for block in blocks)


def table_of(block: str) -> str | None:
    """Return the table of a block of lines `REASON  STATUS  text`; None if it has other lines."""
    rows: list[list[str]] = []
    for line in block.splitlines():
        if row := re.fullmatch(r" {4}([A-Z_]+) {2,}([A-Z_]+) {2,}(\S.*)", line):
            rows.append(list(row.groups()))
        elif rows and line.startswith(" " * 8):
            rows[-1][-1] += " " + line.strip()
        else:
            return None
    lines = [f"| `{reason}` | `{status}` | {cell(text)} |" for reason, status, text in rows]
    return "\n".join(["| reason | gRPC status | meaning |", "| --- | --- | --- |", *lines])


def cell(text: str) -> str:
    """Return text as the cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def short(name: str) -> str:
    """Return a type's name without its package."""
    return name.rpartition(".")[2]


def kind(field: FieldDescriptorProto) -> str:
    """Return a field's type with its multiplicity: one of several, repeated, or optional."""
    name = short(field.type_name) or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated `{name}`"
    if field.proto3_optional:
        return f"optional `{name}`"
    return f"one of: `{name}`" if field.HasField("oneof_index") else f"`{name}`"
