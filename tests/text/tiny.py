"""A tiny umT5 text encoder with random weights, and a tokenizer of a few pieces."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from avatar.text.model import TextConfig, TextEncoder, build

NETWORK = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 32,
}
MAX_TOKENS = 12
PADDING, END, UNKNOWN = range(3)
PIECES = ["▁a", "▁person", "▁who", "▁smiles", "▁weeps", "▁", *"abcdefghijklmnopqrstuvwxyz&<>'.,"]


def tokenizer() -> Tokenizer:
    """Return a unigram tokenizer like the public one: pieces of words, a mark before each word, `</s>` at the end."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces = [(piece, -float(len(PIECES) - len(piece))) for piece in PIECES]
    made = Tokenizer(models.Unigram([*special, *pieces], unk_id=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return made


def encoder(seed: int = 0) -> TextEncoder:
    network = build(TextConfig(network=NETWORK))
    generator = torch.Generator().manual_seed(seed)
    # So small that attention is spread over all tokens: padding that is attended shows.
    weights = {
        name: torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.ndim == 2 else 1)
        for name, tensor in network.state_dict().items()
    }
    network.load_state_dict(weights, assign=True)
    return TextEncoder(network, TextConfig(network=NETWORK, max_tokens=MAX_TOKENS), tokenizer())


def public_name(name: str) -> str:
    """Return the public checkpoint's name of a transformers tensor, written independently of `layouts.text_name`."""
    for ours, theirs in (
        ("embed_tokens", "token_embedding"),
        ("final_layer_norm", "norm"),
        ("block.", "blocks."),
        ("layer.0.layer_norm", "norm1"),
        ("layer.1.layer_norm", "norm2"),
        ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
        ("layer.0.SelfAttention", "attn"),
        ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
        ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
        ("layer.1.DenseReluDense.wo", "ffn.fc2"),
    ):
        name = name.replace(ours, theirs)
    return name


def write_public(checkpoint: Path, made: TextEncoder) -> None:
    """Write the encoder in the published layout: a .pth under its names, and the tokenizer's folder."""
    (checkpoint / "config.json").write_text('{"_class_name": "WanModel_S2V"}')
    weights = {public_name(name): tensor for name, tensor in made.network.state_dict().items()}
    torch.save(weights, checkpoint / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(checkpoint)


def write_tokenizer(checkpoint: Path) -> None:
    """Write the tokenizer where the published layout has it."""
    folder = checkpoint / "google" / "umt5-xxl"
    folder.mkdir(parents=True)
    tokenizer().save(str(folder / "tokenizer.json"))
