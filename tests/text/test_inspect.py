"""Tests of avatar.checkpoints.inspect with a text encoder."""

from pathlib import Path

import pytest
import torch

from avatar.checkpoints.inspect import inspect, pack
from avatar.checkpoints.layouts import open_part
from avatar.text.model import load
from tests.text import tiny


def test_inspect_shows_the_text_encoder(text_checkpoint: Path, checkpoint: Path, published: Path) -> None:
    text = "\n".join(inspect(text_checkpoint))
    assert f"umt5, {tiny.MAX_TOKENS} tokens of width 16" in text
    assert "5,072" in text
    # The published encoder is limited to the network's text_len.
    assert "umt5, 8 tokens of width 16" in "\n".join(inspect(published))
    assert "prompts   none" in "\n".join(inspect(checkpoint))


def test_pack_copies_the_text_encoder(text_checkpoint: Path, tmp_path: Path) -> None:
    pack(text_checkpoint, tmp_path / "packed")
    given, packed = (load(open_part(folder, "text")) for folder in (text_checkpoint, tmp_path / "packed"))
    assert torch.equal(packed.embed("a person who weeps"), given.embed("a person who weeps"))


def test_a_text_encoder_that_does_not_fit_the_network_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for part in ("audio", "denoiser", "vae"):
        (tmp_path / part).symlink_to(checkpoint / part)
    tiny.encoder().save(tmp_path / "text")
    with pytest.raises(ValueError, match="at most 1 text tokens of width 8, the text encoder makes 12 of width 16"):
        list(inspect(tmp_path))
