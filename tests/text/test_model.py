"""Tests of avatar.text.model: a checkpoint's text encoder in our layout and in the public one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from avatar.text.model import embed, find, knows_text, load
from tests.text import tiny

PROMPT = "a person who weeps"
PUBLIC = "models_t5_umt5-xxl-enc-bf16.pth"


@pytest.fixture(params=["ours", "public"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint that knows text, and nothing else."""
    if request.param == "ours":
        tiny.encoder().save(tmp_path / "text")
    else:
        tiny.write_public(tmp_path, tiny.encoder())
    return tmp_path


def test_a_saved_encoder_embeds_as_before(folder: Path) -> None:
    assert knows_text(folder)
    made = embed(folder, PROMPT)
    torch.testing.assert_close(made, tiny.encoder().embed(PROMPT), rtol=1e-5, atol=1e-5)
    assert made.shape == (5, 16)


def test_weights_are_cast_as_they_are_read(folder: Path) -> None:
    encoder = load(find(folder), dtype=torch.bfloat16)
    assert {each.dtype for each in encoder.network.parameters()} == {torch.bfloat16}
    assert encoder.embed(PROMPT).dtype == torch.bfloat16


def test_the_public_encoder_reads_512_tokens(tmp_path: Path) -> None:
    tiny.write_public(tmp_path, tiny.encoder())
    assert embed(tmp_path, "abc " * 600).shape == (512, 16)


def test_a_checkpoint_without_text_says_so(checkpoint: Path) -> None:
    assert not knows_text(checkpoint)
    with pytest.raises(ValueError, match=f"knows no text: expected a folder text, or {PUBLIC}"):
        embed(checkpoint, PROMPT)


def without(path: Path) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / path).unlink()


def with_text(path: Path, text: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / path).write_text(text)


def without_a_tensor(checkpoint: Path) -> None:
    path = checkpoint / "text/model.safetensors"
    tensors = load_file(path)
    del tensors["final_layer_norm.weight"]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(Path("text/config.json")), r"expected a file .*text/config\.json"),
        (without(Path("text/tokenizer.json")), r"no tokenizer .* expected a file .*text/tokenizer\.json"),
        (without(Path("text/model.safetensors")), "no weights in"),
        (with_text(Path("text/tokenizer.json"), "{}"), r"tokenizer\.json is not a tokenizer"),
        (with_text(Path("text/config.json"), '{"network": {}, "max_token": 3}'), "config of .*max_token"),
        (with_text(Path("text/config.json"), '{"network": {"d_model": 8}}'), r"model\.safetensors does not fit"),
        (without_a_tensor, r"does not fit.*final_layer_norm\.weight"),
    ],
)
def test_our_files_that_are_not_what_they_should_be_are_named(
    tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    tiny.encoder().save(tmp_path / "text")
    change(tmp_path)
    with pytest.raises(ValueError, match=words):
        load(find(tmp_path))


def without_a_public_tensor(checkpoint: Path) -> None:
    weights = torch.load(checkpoint / PUBLIC)
    del weights["blocks.1.norm2.weight"]
    torch.save(weights, checkpoint / PUBLIC)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(Path("google/umt5-xxl/tokenizer.json")), r"expected a file .*google/umt5-xxl/tokenizer\.json"),
        (with_text(Path(PUBLIC), "weights"), f"{PUBLIC} is not"),
        (without_a_public_tensor, rf"{PUBLIC} does not fit.*block\.1\.layer\.1\.layer_norm\.weight"),
    ],
)
def test_public_files_that_are_not_what_they_should_be_are_named(
    tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    tiny.write_public(tmp_path, tiny.encoder())
    change(tmp_path)
    with pytest.raises(ValueError, match=words):
        load(find(tmp_path))


def test_a_digest_tells_encoders_apart(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        tiny.encoder(seed).save(tmp_path / name / "text")
    one, same, other = (find(tmp_path / name).digest() for name in ("one", "same", "other"))
    assert one == same != other
    tokenizer = tmp_path / "same/text/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("▁weeps", "▁sighs"))
    assert find(tmp_path / "same").digest() != one
