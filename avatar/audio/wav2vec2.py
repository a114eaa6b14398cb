"""The wav2vec2 encoder of the public Live Avatar weights, over a window around each block.

Axes: s samples, t encoder frames, l the input of the layers and the output of each, d width.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from avatar.audio.alignment import FRAME_SAMPLES, RECEPTIVE_FIELD_SAMPLES, BlockGrid
from avatar.audio.statistics import AudioStatistics
from avatar.checkpoints.fields import EPSILON, MAX_LAYERS, MAX_SIZE, Range, check_ranges, transformers_config
from avatar.checkpoints.files import save
from avatar.checkpoints.part import Part, load_weights
from avatar.types import BLOCK_LATENTS

# The fields of transformers.Wav2Vec2Config that define the network. No other field of a config.json is passed on: the
# others are for training, or select code to run.
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("conv_dim", "conv_stride", "conv_kernel", "conv_bias", "feat_extract_norm", "feat_extract_activation"),
    *("num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "do_stable_layer_norm"),
)
RANGES: dict[str, Range] = {
    **dict.fromkeys(("hidden_size", "num_attention_heads", "intermediate_size", "conv_dim"), (1, MAX_SIZE)),
    **dict.fromkeys(("num_hidden_layers", "conv_stride", "conv_kernel"), (1, MAX_LAYERS)),
    **dict.fromkeys(("num_conv_pos_embeddings", "num_conv_pos_embedding_groups"), (1, MAX_SIZE)),
    "layer_norm_eps": EPSILON,
}
# Frames of left and of right context: 30 s.
MAX_CONTEXT_FRAMES = 1500


@dataclass(frozen=True, kw_only=True)
class Wav2Vec2Config:
    """Configuration of a wav2vec2 encoder, as in a checkpoint's config.json.

    network: the sizes, under transformers.Wav2Vec2Config's names.
    left_frames: left context, in encoder frames before the block.
    right_frames: right context, in encoder frames after the block: 20 ms of latency each. 64 fill the positional
        convolution.
    """

    encoder: str = "wav2vec2"
    network: dict[str, Any]
    left_frames: int = 400
    right_frames: int = 24

    def __post_init__(self) -> None:
        check_ranges(vars(self), dict.fromkeys(("left_frames", "right_frames"), (0, MAX_CONTEXT_FRAMES)))


def large() -> Wav2Vec2Config:
    """The sizes of wav2vec2-large-xlsr-53: 25 states of width 1024."""
    network = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "conv_bias": True,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
    }
    return Wav2Vec2Config(network=network)


class Wav2Vec2(nn.Module):
    """An `AudioEncoder` around transformers' wav2vec2, whose last hidden state is the normalised one."""

    def __init__(self, config: Wav2Vec2Config, block_latents: int = BLOCK_LATENTS) -> None:
        """block_latents: latent frames of a block."""
        super().__init__()
        # Slow to import, and only needed where an encoder runs.
        import transformers

        # The reference's transformers (4.51) always normalised the last hidden state; today's does on request. Masking
        # is for training, and adds a parameter.
        ours: dict[str, Any] = {"tie_last_hidden_states": True, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
        sizes: dict[str, Any] = {name: value for name, value in config.network.items() if name in SIZES}
        network = transformers_config(transformers.Wav2Vec2Config, {**sizes, **ours}, RANGES)
        check_frames(network.conv_kernel, network.conv_stride)
        self.config, self.grid = replace(config, network=sizes), BlockGrid(block_latents)
        self.network = transformers.Wav2Vec2Model(network)
        self.num_states = network.num_hidden_layers + 1
        self.width = network.hidden_size
        self.right_frames, self.right_is_free = config.right_frames, True
        self.left_samples = (config.left_frames + 1) * FRAME_SAMPLES  # a block's first pixel frame uses the one before
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, part: Part, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> "Wav2Vec2":
        config = part.parse(Wav2Vec2Config)
        with torch.device("meta"), part.naming_config():
            encoder = cls(config, part.block_latents).to(dtype)
        load_weights(encoder.network, part, device)
        return encoder

    @classmethod
    def tiny(cls, block_latents: int = BLOCK_LATENTS) -> "Wav2Vec2":
        network = {
            **large().network,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "conv_dim": (16,) * 7,
        }
        return cls(Wav2Vec2Config(network=network, left_frames=40, right_frames=4), block_latents)

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        save(folder, asdict(self.config), self.network, dtype)

    def encode(self, window: Tensor, statistics: AudioStatistics, right_frames: int) -> tuple[Tensor, AudioStatistics]:
        states = self.hidden_states(statistics.normalise(window))
        end = states.shape[1] - right_frames
        return states[:, max(0, end - self.grid.encoder_frames - 1) : end], statistics

    def hidden_states(self, samples: Tensor) -> Tensor:
        """Return the layers' input and the output of each layer, the last one normalised, (l, t, d) float32.

        samples: (s,) normalised audio at 16 kHz. Before the layers, frame t covers samples 320 t .. 320 t + 399.
        """
        parameter = next(self.network.parameters())
        states = self.network(samples.to(parameter)[None], output_hidden_states=True).hidden_states
        stacked: Tensor = rearrange(list(states), "l 1 t d -> l t d")
        return stacked.float()


def check_frames(kernels: Sequence[int], strides: Sequence[int]) -> None:
    """Raise ValueError unless convolutions give encoder frames of as many samples, and as often, as blocks expect."""
    stride, field = 1, 1
    for kernel, step in zip(kernels, strides, strict=True):
        field += (kernel - 1) * stride
        stride *= step
    if (stride, field) != (FRAME_SAMPLES, RECEPTIVE_FIELD_SAMPLES):
        raise ValueError(
            f"network.conv_stride and conv_kernel must give frames of {RECEPTIVE_FIELD_SAMPLES} samples every "
            f"{FRAME_SAMPLES}, got {field} every {stride}"
        )
