"""The text encoder: a prompt's tokens through umT5's encoder.

Source: umT5-XXL as Wan2.2 uses it, without the padding to 512 tokens: padding is not attended, and positions are
relative, so a prompt's own tokens have the same embeddings. Axes: b batch, n tokens, d width.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from avatar.checkpoints.fields import (
    EPSILON,
    MAX_LAYERS,
    MAX_SIZE,
    Range,
    check_ranges,
    known_fields,
    transformers_config,
)
from avatar.checkpoints.files import TOKENIZER, foreign_content, save
from avatar.checkpoints.part import Part, load_weights
from avatar.text.prompt import clean

EMBEDDING = "embed_tokens.weight"
BUCKETS, DISTANCE = "relative_attention_num_buckets", "relative_attention_max_distance"
RANGES: dict[str, Range] = {
    **dict.fromkeys(("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", DISTANCE), (1, MAX_SIZE)),
    "num_layers": (1, MAX_LAYERS),
    BUCKETS: (4, MAX_SIZE),  # a quarter of them are of one position each
    "layer_norm_epsilon": EPSILON,
}


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Configuration of a text encoder, as in a checkpoint's config.json.

    network: the sizes, under transformers.UMT5Config's names.
    max_tokens: a prompt is truncated to so many tokens, the end token included; at most the denoiser's text_len.
    """

    network: Mapping[str, Any]
    encoder: str = "umt5"
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.encoder != "umt5":
            raise ValueError(f"encoder is {self.encoder!r}, expected 'umt5'")
        check_ranges(vars(self), {"max_tokens": (1, MAX_SIZE)})


class TextEncoder:
    """A tokenizer and umT5's encoder: prompts to embeddings.

    width: d of an embedding.
    """

    def __init__(self, network: nn.Module, config: TextConfig, tokenizer: Tokenizer) -> None:
        """network: from `build`, with weights loaded. ValueError if the tokenizer does not fit it."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        vocabulary, self.width = network.get_parameter(EMBEDDING).shape
        if tokenizer.get_vocab_size() > vocabulary:
            raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the encoder has {vocabulary}")
        if (count := len(tokenizer.encode("").ids)) != 1:
            raise ValueError(f"the tokenizer adds {count} tokens to a text, expected one at its end")
        tokenizer.enable_truncation(config.max_tokens)
        self.network, self.config = network.eval().requires_grad_(False), config
        self._tokenizer = tokenizer

    @property
    def dtype(self) -> torch.dtype:
        return self.network.get_parameter(EMBEDDING).dtype

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that `load` reads as a part, floating point tensors as `dtype` if it is given."""
        save(folder, asdict(self.config), self.network, dtype)
        self._tokenizer.save(str(folder / TOKENIZER))

    def warm(self) -> None:
        """Embed a short and, on a GPU, a long prompt, so that no other has to initialise the device's libraries."""
        is_cpu = self.network.get_parameter(EMBEDDING).device.type == "cpu"  # where a long one takes a minute
        for num_tokens in (8,) if is_cpu else (8, self.config.max_tokens):
            ids = torch.zeros(1, num_tokens, dtype=torch.long)
            encode(self.network, ids, torch.ones_like(ids)).cpu()

    def embed(self, prompt: str) -> Tensor:
        """Return the embedding (n, d) of a prompt, 1 <= n <= max_tokens, in the encoder's dtype, on the CPU.

        It has a row for each token of the cleaned prompt and one for the end token; tokens past max_tokens are dropped.
        """
        ids = torch.tensor([self._tokenizer.encode(clean(prompt)).ids])
        return encode(self.network, ids, torch.ones_like(ids))[0].cpu()


@torch.no_grad()
def encode(network: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the embeddings (b, n, d) of token ids (b, n), those of padding included.

    mask: (b, n), 1 for tokens to attend to and 0 for padding.
    """
    device = network.get_parameter(EMBEDDING).device
    rows: Tensor = network(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
    return rows


def build(config: TextConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build umT5's encoder on the meta device. ValueError if transformers rejects the sizes."""
    # Slow to import, and only needed where an encoder runs.
    import transformers

    sizes = known_fields(config.network, vars(transformers.UMT5Config()), "network.")
    network = transformers_config(transformers.UMT5Config, sizes, RANGES)
    buckets, distance = getattr(network, BUCKETS), getattr(network, DISTANCE)
    if distance <= buckets // 4:
        raise ValueError(f"network.{DISTANCE} must be above {buckets // 4}, a quarter of {BUCKETS}, got {distance}")
    with torch.device("meta"):
        # Only the encoder stack: the model around it holds the token embedding a second time.
        encoder: nn.Module = transformers.UMT5EncoderModel(network).encoder
    return encoder.to(dtype)


def load(part: Part, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> TextEncoder:
    """Return the text encoder of a checkpoint's part. ValueError if its config, tokenizer or weights do not fit."""
    config = part.parse(TextConfig)
    try:
        tokenizer = Tokenizer.from_file(str(part.tokenizer))
    except Exception as error:  # the library raises nothing narrower
        assert part.tokenizer is not None
        raise ValueError(
            f"{part.tokenizer} {foreign_content(part.tokenizer) or f'is not a tokenizer: {error}'}"
        ) from error
    with part.naming_config():
        network = build(config, dtype)
    load_weights(network, part, device)
    try:
        return TextEncoder(network, config, tokenizer)
    except ValueError as error:
        raise ValueError(f"{part.tokenizer}: {error}") from error
