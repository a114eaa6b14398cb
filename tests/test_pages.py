"""Tests of docs.pages, which generates pages of the site."""

import re
from pathlib import Path

import pytest

from avatar.errors import REASONS
from avatar.v1 import avatar_service_pb2, types_pb2
from avatar.worker.v1 import audio_pb2, denoiser_pb2, text_pb2, vae_pb2
from docs.pages import COPIED, REFERENCES, ROOT, reference, site_links

# The log names files as they were on its days.
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent.name != "log"]
PAGES += [ROOT / page for page in (*COPIED, "CHANGELOG.md")]
FOLDERS = "assets|avatar|benchmarks|deploy|docs|examples|models|protos|services|tests|third_party|training|web"
PACKAGES = {
    "api.md": (avatar_service_pb2, types_pb2),
    "workers.md": (audio_pb2, denoiser_pb2, text_pb2, vae_pb2),
}


@pytest.mark.parametrize("page", PACKAGES)
def test_every_call_message_and_field_is_explained(page: str) -> None:
    text = reference(*REFERENCES[page])
    for file in (module.DESCRIPTOR for module in PACKAGES[page]):
        for service in file.services_by_name.values():
            for method in service.methods:
                assert re.search(rf"### {method.name}\n\n`{method.name}\(.*\) returns \(.*\)`\n\n\w", text)
        for message in file.message_types_by_name.values():
            section = text.split(f"## {message.name}\n\n")[1].split("\n## ")[0]
            assert section[0].isalpha()
            for field in message.fields:
                assert re.search(rf"^\| `{field.name}` \| .+ \| \S.* \|$", section, re.MULTILINE)


def test_streams_are_marked_as_such() -> None:
    text = reference(*REFERENCES["api.md"])
    assert "`StreamAvatar(stream StreamAvatarRequest) returns (stream StreamAvatarResponse)`" in text
    assert "`CreateSession(CreateSessionRequest) returns (CreateSessionResponse)`" in text


def test_error_reasons_are_a_table() -> None:
    text = reference(*REFERENCES["api.md"])
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| `([A-Z_]+)` \| \S.* \|$", text, re.MULTILINE))
    assert rows == {reason: error.code.name for reason, error in REASONS.items()}


def test_links_lead_to_their_place_in_the_site() -> None:
    def links(text: str, page: str) -> list[str]:
        return re.findall(r"\]\(([^)]*)\)", site_links(text, page))

    assert links("[a](docs/architecture.md#failures) ![b](docs/demo.png)", "index.md") == [
        "architecture.md#failures",
        "demo.png",
    ]
    assert links("[a](../../docs/training.md)", "models/tiny/README.md") == ["../../training.md"]
    assert links("[a](../../services/README.md)", "operations/settings.md") == ["../services/README.md"]
    assert links("[a](../protos/avatar/v1/types.proto)", "integration.md") == ["api.md"]
    assert links("[a](https://grpc.io) [b](#here)", "index.md") == ["https://grpc.io", "#here"]


def test_a_link_to_a_file_that_is_no_page_becomes_its_text() -> None:
    assert site_links("[avatar/render.py](../avatar/render.py), [tests](../tests)", "decisions.md") == (
        "`avatar/render.py`, tests"
    )
    assert site_links("[gone](../gone.py)", "decisions.md") == "[gone](../gone.py)", "and MkDocs reports it"


def test_every_page_that_is_copied_is_there() -> None:
    assert [source for source in COPIED if not (ROOT / source).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = [page.parent / link for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)]
    quoted = [ROOT / path for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text)]
    assert [str(path) for path in linked + quoted if not path.exists()] == []
