"""Tests of avatar.text.umt5. The numbers themselves are held by the golden umt5_tiny (tests/parity)."""

import pytest
import torch
from tokenizers import Tokenizer, models, processors

from avatar.text import umt5
from avatar.text.umt5 import TextConfig, TextEncoder, build
from tests.text import tiny

PROMPT = "a person who smiles"


@pytest.fixture
def encoder() -> TextEncoder:
    return tiny.encoder()


def test_an_embedding_has_a_row_for_each_token_and_the_end(encoder: TextEncoder) -> None:
    rows = encoder.embed(PROMPT)
    assert rows.shape == (5, encoder.width)
    assert rows.isfinite().all()
    assert encoder.embed("").shape == (1, encoder.width)


def test_an_embedding_is_all_rows_cut_to_the_prompt(encoder: TextEncoder) -> None:
    ids = torch.full((1, tiny.MAX_TOKENS), tiny.PADDING)
    tokens = tiny.tokenizer().encode(PROMPT).ids
    ids[0, : len(tokens)] = torch.tensor(tokens)
    whole = umt5.encode(encoder.network, ids, (ids != tiny.PADDING).long())
    assert torch.equal(encoder.embed(PROMPT), whole[0, : len(tokens)])


def test_padding_is_not_attended(encoder: TextEncoder) -> None:
    """The number of padded rows changes nothing."""
    longer = TextEncoder(encoder.network, TextConfig(network=tiny.NETWORK, max_tokens=40), tiny.tokenizer())
    torch.testing.assert_close(longer.embed(PROMPT), encoder.embed(PROMPT), rtol=1e-5, atol=1e-5)


def test_a_long_prompt_is_cut_and_still_ends(encoder: TextEncoder) -> None:
    rows = encoder.embed("abc " * 100)
    assert rows.shape == (tiny.MAX_TOKENS, encoder.width)
    assert torch.equal(rows, encoder.embed("abc " * 100 + "and more"))
    cut = tiny.tokenizer().encode("abc " * 100).ids[: tiny.MAX_TOKENS - 1]
    ids = torch.tensor([[*cut, tiny.END]])
    assert torch.equal(rows, umt5.encode(encoder.network, ids, torch.ones_like(ids))[0])


def test_a_prompt_is_cleaned_before_it_is_embedded(encoder: TextEncoder) -> None:
    assert torch.equal(encoder.embed("  a person\n who &amp; smiles "), encoder.embed("a person who & smiles"))
    assert not torch.equal(encoder.embed("a person who smiles"), encoder.embed("a person who weeps"))


def test_an_embedding_has_the_encoders_dtype() -> None:
    encoder = tiny.encoder()
    encoder.network.bfloat16()
    assert encoder.embed(PROMPT).dtype == torch.bfloat16


def test_every_public_name_is_known(encoder: TextEncoder) -> None:
    names = list(encoder.network.state_dict())
    assert [umt5.module_name(tiny.public_name(name)) for name in names] == names
    assert [umt5.module_name(name) for name in names] == names


def test_sizes_are_those_of_the_tensors(encoder: TextEncoder) -> None:
    shapes = {tiny.public_name(name): tuple(each.shape) for name, each in encoder.network.state_dict().items()}
    assert umt5.sizes(shapes) == tiny.NETWORK
    del shapes["blocks.0.attn.q.weight"]
    with pytest.raises(ValueError, match=r"missing blocks\.0\.attn\.q\.weight"):
        umt5.sizes(shapes)


def test_the_public_encoder_has_the_published_sizes() -> None:
    sizes = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    network = build(TextConfig(network=sizes), torch.bfloat16)
    assert sum(each.numel() for each in network.parameters()) == 5_680_910_336
    assert {each.device.type for each in network.parameters()} == {"meta"}
    assert umt5.sizes({tiny.public_name(name): tuple(each.shape) for name, each in network.state_dict().items()}) == {
        **sizes,
        "relative_attention_num_buckets": 32,
    }


def with_two_ends(tokenizer: Tokenizer) -> None:
    ends = [("</s>", tiny.END)]
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=ends)


def without_padding(tokenizer: Tokenizer) -> None:
    tokenizer.model = models.Unigram([("</s>", 0.0), ("<unk>", 0.0)], unk_id=1)


def with_more_tokens(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([f"token{i}" for i in range(100)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_two_ends, "puts 2 tokens around a text, expected one at its end"),
        (without_padding, "no <pad>"),
        (with_more_tokens, "141 tokens, the encoder knows 64"),
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
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"network": {"d_model": "wide"}}, "network: .*d_model"),
    ],
)
def test_a_config_of_another_encoder_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(TextConfig(**{"network": tiny.NETWORK, **fields}))  # type: ignore[arg-type]
