"""Tests of docs.pages: what the site's pages are made of."""

import re

import pytest

from avatar.v1 import avatar_service_pb2, types_pb2
from avatar.worker.v1 import audio_pb2, denoiser_pb2, text_pb2, vae_pb2
from docs.pages import COPIED, REFERENCES, ROOT, moved, reference

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


def test_streams_are_told_from_single_messages() -> None:
    text = reference(*REFERENCES["api.md"])
    assert "`StreamAvatar(stream StreamAvatarRequest) returns (stream StreamAvatarResponse)`" in text
    assert "`CreateSession(CreateSessionRequest) returns (CreateSessionResponse)`" in text


def test_a_page_that_moves_takes_its_links_along() -> None:
    links = re.findall(r"\]\(([^)]*)\)", moved("README.md", "index.md"))
    assert {"architecture.md", "models/tiny/README.md", "demo.png"} <= set(links)
    assert [link for link in links if link.startswith("docs/")] == []
    assert "../../training.md" in re.findall(r"\]\(([^)]*)\)", moved("models/tiny/README.md", "models/tiny/README.md"))


def test_every_page_that_is_copied_is_there() -> None:
    assert [source for source in COPIED if not (ROOT / source).is_file()] == []
