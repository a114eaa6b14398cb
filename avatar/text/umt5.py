"""umT5's encoder: the text encoder of the public Live Avatar weights.

Its tensors have the names of transformers' encoder stack in our checkpoints, the reference's own in the public one.

Axes: b batch, n tokens, d width.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from avatar import checkpoint
from avatar.text.prompt import clean

TOKENIZER = "tokenizer.json"
PADDING = "<pad>"
EMBEDDING = "embed_tokens.weight"
# Names of the public checkpoint and of transformers, both with the layer's index in front.
LAYER_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
NAMES = {"token_embedding": "embed_tokens", "norm": "final_layer_norm"}
LAYER = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What a checkpoint's config.json says of its text encoder.

    network: the sizes, as transformers.UMT5Config names them.
    max_tokens: what counts of a prompt, the end included; as many rows as the network reads.
    """

    network: Mapping[str, Any]
    encoder: str = "umt5"
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.encoder != "umt5":
            raise ValueError(f"encoder is {self.encoder!r}, expected 'umt5'")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


class TextEncoder:
    """Prompts to embeddings, by a tokenizer and umT5's encoder.

    width: of an embedding.
    """

    def __init__(self, network: nn.Module, config: TextConfig, tokenizer: Tokenizer) -> None:
        """network: `build`'s, with its weights. ValueError if the tokenizer is not one for it."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        padding, (vocabulary, self.width) = tokenizer.token_to_id(PADDING), network.get_parameter(EMBEDDING).shape
        if padding is None:
            raise ValueError(f"the tokenizer has no {PADDING}")
        if tokenizer.get_vocab_size() > vocabulary:
            raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the encoder knows {vocabulary}")
        if (count := len(tokenizer.encode("").ids)) != 1:
            raise ValueError(f"the tokenizer puts {count} tokens around a text, expected one at its end")
        tokenizer.enable_truncation(config.max_tokens)
        tokenizer.enable_padding(pad_id=padding, pad_token=PADDING, length=config.max_tokens)
        self.network, self.config = network.eval().requires_grad_(False), config
        self._tokenizer = tokenizer

    @property
    def dtype(self) -> torch.dtype:
        return self.network.get_parameter(EMBEDDING).dtype

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the files of our layout, floating point tensors as `dtype` if it is given."""
        checkpoint.save(folder, asdict(self.config), self.network, dtype)
        self._tokenizer.save(str(folder / TOKENIZER))

    def embed(self, prompt: str) -> Tensor:
        """The embedding (n, d) of a prompt as it was written: the rows of its tokens and of the end, on the CPU.

        1 <= n <= max_tokens, in the encoder's dtype; tokens past max_tokens do not count.
        """
        tokens = self._tokenizer.encode(clean(prompt))
        mask = torch.tensor([tokens.attention_mask])
        return encode(self.network, torch.tensor([tokens.ids]), mask)[0, : int(mask.sum())].cpu()


@torch.no_grad()
def encode(network: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """All rows (b, n, d) of tokens (b, n), those of padding included.

    mask: (b, n), 1 for tokens that are attended and 0 for padding.
    """
    device = network.get_parameter(EMBEDDING).device
    rows: Tensor = network(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
    return rows


def build(config: TextConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The encoder's module without weights, on the meta device. ValueError if there is no such network."""
    # Slow to import, and only needed where an encoder runs.
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        network = transformers.UMT5Config(**config.network)
    except StrictDataclassError as error:
        raise ValueError(f"network: {' '.join(str(error).split())}") from error
    with torch.device("meta"):
        # The stack alone: what is around it holds the token embedding a second time.
        encoder: nn.Module = transformers.UMT5EncoderModel(network).encoder
    return encoder.to(dtype)


def module_name(name: str) -> str:
    """The name in `build`'s module of what the public checkpoint calls `name`; a name that it has not is kept."""
    stem, _, kind = name.rpartition(".")
    if match := LAYER.fullmatch(stem):
        layer, part = match.groups()
        return f"block.{layer}.{LAYER_NAMES.get(part, part)}.{kind}"
    return f"{NAMES.get(stem, stem)}.{kind}"


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes, as transformers.UMT5Config names them, of a public checkpoint's tensors, which has no config.json.

    ValueError names a tensor that is missing.
    """
    try:
        vocabulary, width = shapes["token_embedding.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        attention_width, _ = shapes["blocks.0.attn.q.weight"]
        ffn_width, _ = shapes["blocks.0.ffn.fc1.weight"]
    except KeyError as error:
        raise ValueError(f"missing {error.args[0]}") from error
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": attention_width // heads,
        "d_ff": ffn_width,
        "num_layers": 1 + max(int(match[1]) for name in shapes if (match := LAYER.match(name))),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
