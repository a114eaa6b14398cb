"""Tests of avatar.text.model. The golden umt5_tiny (tests/parity) checks the numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, processors
from torch.utils.flop_counter import FlopCounterMode

from avatar.checkpoints.layouts import TEXT_FILE, has_text_encoder, open_part, text_name, text_sizes
from avatar.text.model import TextConfig, TextEncoder, build, encode, load
from tests.text import tiny

PROMPT = "a person who smiles"


@pytest.fixture
def encoder() -> TextEncoder:
    return tiny.encoder()


def test_an_embedding_has_a_row_per_token_and_one_for_the_end(encoder: TextEncoder) -> None:
    rows = encoder.embed(PROMPT)
    assert rows.shape == (5, encoder.width)
    assert rows.isfinite().all()
    assert encoder.embed("").shape == (1, encoder.width)


def test_an_embedding_equals_that_of_padded_tokens(encoder: TextEncoder) -> None:
    ids = torch.full((1, tiny.MAX_TOKENS), tiny.PADDING)
    tokens = tiny.tokenizer().encode(PROMPT).ids
    ids[0, : len(tokens)] = torch.tensor(tokens)
    whole = encode(encoder.network, ids, (ids != tiny.PADDING).long())
    torch.testing.assert_close(encoder.embed(PROMPT), whole[0, : len(tokens)], rtol=0, atol=1e-5)


def test_a_prompt_of_20_tokens_costs_a_25th_of_512() -> None:
    encoder = TextEncoder(tiny.encoder().network, TextConfig(network=tiny.NETWORK, max_tokens=512), tiny.tokenizer())
    cost, rows = [], []
    for prompt in ("a " * 19, "a " * 600):
        with FlopCounterMode(display=False) as counter:
            rows.append(len(encoder.embed(prompt)))
        # Without attention, whose cost is quadratic: in the public encoder it is a fiftieth of the rest.
        cost.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm])
    assert rows == [20, 512]
    assert 25 * cost[0] < cost[1]


def test_a_long_prompt_is_truncated_and_keeps_its_end_token(encoder: TextEncoder) -> None:
    rows = encoder.embed("abc " * 100)
    assert rows.shape == (tiny.MAX_TOKENS, encoder.width)
    assert torch.equal(rows, encoder.embed("abc " * 100 + "and more"))
    cut = tiny.tokenizer().encode("abc " * 100).ids[: tiny.MAX_TOKENS - 1]
    ids = torch.tensor([[*cut, tiny.END]])
    assert torch.equal(rows, encode(encoder.network, ids, torch.ones_like(ids))[0])


def test_a_prompt_is_cleaned_before_it_is_embedded(encoder: TextEncoder) -> None:
    assert torch.equal(encoder.embed("  a person\n who &amp; smiles "), encoder.embed("a person who & smiles"))
    assert not torch.equal(encoder.embed("a person who smiles"), encoder.embed("a person who weeps"))


def with_two_ends(tokenizer: Tokenizer) -> None:
    ends = [("</s>", tiny.END)]
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=ends)


def with_more_tokens(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([f"token{i}" for i in range(100)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_two_ends, "adds 2 tokens to a text, expected one at its end"),
        (with_more_tokens, "141 tokens, the encoder has 64"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(encoder: TextEncoder, change: object, words: str) -> None:
    tokenizer = tiny.tokenizer()
    assert callable(change)
    change(tokenizer)
    with pytest.raises(ValueError, match=words):
        TextEncoder(encoder.network, encoder.config, tokenizer)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"encoder": "clip"}, "encoder is 'clip'"),
        ({"max_tokens": 0}, "max_tokens must be 1 to"),
        ({"network": {"d_model": "wide"}}, r"network\.d_model must be a whole number, got 'wide'"),
        ({"network": {"num_heads": 0}}, r"network\.num_heads must be 1 to \d+, got 0"),
        ({"network": {"num_layers": 10**9}}, r"network\.num_layers must be 1 to 1024"),
        ({"network": {"layer_norm_epsilon": float("nan")}}, r"network\.layer_norm_epsilon must be a finite number"),
        ({"network": {"relative_attention_num_buckets": 1}}, "buckets must be 4 to"),
        ({"network": {"relative_attention_max_distance": 8}}, "max_distance must be above 8, a quarter"),
        ({"network": {"feed_forward_proj": "gated-wave"}}, "dense_act_fn must be an activation function .*'wave'"),
        ({"network": {"dropout_rate": "much"}}, "network: .*dropout_rate"),
    ],
)
def test_a_config_of_another_encoder_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(TextConfig(**{"network": tiny.NETWORK, **fields}))  # type: ignore[arg-type]


@pytest.fixture(params=["ours", "public"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint with a text encoder only."""
    if request.param == "ours":
        tiny.encoder().save(tmp_path / "text")
    else:
        tiny.write_public(tmp_path, tiny.encoder())
    return tmp_path


def test_a_saved_encoder_loads_with_equal_embeddings(folder: Path) -> None:
    assert has_text_encoder(folder)
    made = load(open_part(folder, "text")).embed(PROMPT)
    torch.testing.assert_close(made, tiny.encoder().embed(PROMPT), rtol=1e-5, atol=1e-5)
    assert made.shape == (5, 16)


def test_weights_are_cast_as_they_are_read(folder: Path) -> None:
    encoder = load(open_part(folder, "text"), dtype=torch.bfloat16)
    assert {each.dtype for each in encoder.network.parameters()} == {torch.bfloat16}
    assert encoder.embed(PROMPT).dtype == torch.bfloat16


def test_the_public_encoder_reads_512_tokens(tmp_path: Path) -> None:
    tiny.write_public(tmp_path, tiny.encoder())
    assert load(open_part(tmp_path, "text")).embed("abc " * 600).shape == (512, 16)


def test_a_checkpoint_without_a_text_encoder_says_so(checkpoint: Path) -> None:
    assert not has_text_encoder(checkpoint)
    with pytest.raises(ValueError, match=f"has no text encoder: expected a folder text, or {TEXT_FILE}"):
        open_part(checkpoint, "text")


def without(path: Path) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / path).unlink()


def with_text(path: Path, text: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / path).write_text(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(Path("text/tokenizer.json")), r"no tokenizer .* expected a file .*text/tokenizer\.json"),
        (with_text(Path("text/tokenizer.json"), "{}"), r"tokenizer\.json is not a tokenizer"),
        (with_text(Path("text/config.json"), '{"network": 3}'), "configuration in .*network must be an object"),
        (with_text(Path("text/config.json"), '{"network": {"d_model": 8}}'), r"model\.safetensors do not fit"),
    ],
)
def test_invalid_files_of_our_layout_are_named(tmp_path: Path, change: Callable[[Path], object], words: str) -> None:
    tiny.encoder().save(tmp_path / "text")
    change(tmp_path)
    with pytest.raises(ValueError, match=words):
        load(open_part(tmp_path, "text"))


def without_a_public_tensor(checkpoint: Path) -> None:
    weights = torch.load(checkpoint / TEXT_FILE)
    del weights["blocks.1.norm2.weight"]
    torch.save(weights, checkpoint / TEXT_FILE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(Path("google/umt5-xxl/tokenizer.json")), r"expected a file .*google/umt5-xxl/tokenizer\.json"),
        (with_text(Path(TEXT_FILE), "weights"), f"{TEXT_FILE} is text, which servers send as an error"),
        (without_a_public_tensor, rf"{TEXT_FILE} do not fit.*missing block\.1\.layer\.1\.layer_norm\.weight"),
    ],
)
def test_invalid_files_of_the_published_layout_are_named(
    tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    tiny.write_public(tmp_path, tiny.encoder())
    change(tmp_path)
    with pytest.raises(ValueError, match=words):
        load(open_part(tmp_path, "text"))


def test_encoders_have_different_digests(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        tiny.encoder(seed).save(tmp_path / name / "text")
    one, same, other = (open_part(tmp_path / name, "text").digest() for name in ("one", "same", "other"))
    assert one == same != other
    tokenizer = tmp_path / "same/text/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("▁weeps", "▁sighs"))
    assert open_part(tmp_path / "same", "text").digest() != one


def test_every_published_name_is_mapped() -> None:
    names = list(tiny.encoder().network.state_dict())
    assert [text_name(tiny.public_name(name)) for name in names] == names


def test_sizes_come_from_the_tensors() -> None:
    """The published encoder's sizes give its 5.7 billion parameters."""
    large = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    large["relative_attention_num_buckets"] = 32
    for sizes, num_parameters in ((tiny.NETWORK, 5072), (large, 5_680_910_336)):
        network = build(TextConfig(network=sizes))
        assert {each.device.type for each in network.parameters()} == {"meta"}
        assert sum(each.numel() for each in network.parameters()) == num_parameters
        assert text_sizes({name: tuple(each.shape) for name, each in network.state_dict().items()}) == sizes
