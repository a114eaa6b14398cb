"""Whisper's encoder over a short sliding window of constant length.

The window moves with the blocks, with silence before the stream's first sample, so every block has the same positional
embedding and a stream has no seams. Whisper was trained on windows of 30 s; a denoiser that uses these features must be
trained with this window, which is therefore part of the encoder's configuration.

Axes: s samples, m mel bins, t encoder frames (two mel frames each), l the input of the layers and the
output of each, d width.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from avatar.audio.alignment import FRAME_SAMPLES, SAMPLE_RATE_HZ, BlockGrid
from avatar.audio.statistics import AudioStatistics
from avatar.checkpoints.fields import MAX_LAYERS, MAX_SIZE, Range, check_ranges, known_fields, transformers_config
from avatar.checkpoints.files import save
from avatar.checkpoints.part import Part, load_weights
from avatar.types import BLOCK_LATENTS

FFT_SAMPLES = 400
HOP_SAMPLES = 160
# Peaks whose silence is kept.
MAX_SILENCES = 16
DYNAMIC_RANGE = 8.0
"""Decades of mel power below the peak that the encoder distinguishes."""
# Positions of transformers' default, for 30 s, and the most that are allowed, for ten minutes.
POSITIONS, NUM_POSITIONS, MAX_POSITIONS = "max_source_positions", 1500, 30_000
RANGES: dict[str, Range] = {
    **dict.fromkeys(("d_model", "encoder_attention_heads", "encoder_ffn_dim"), (1, MAX_SIZE)),
    "encoder_layers": (1, MAX_LAYERS),
    "num_mel_bins": (1, FFT_SAMPLES // 2),
    POSITIONS: (1, MAX_POSITIONS),
}


@dataclass(frozen=True, kw_only=True)
class WhisperConfig:
    """Configuration of a Whisper encoder, as in a checkpoint's config.json.

    network: the sizes, under transformers.WhisperConfig's names.
    window_frames: encoder frames of a window. The time to encode a block depends on it alone, however short blocks are.
    right_frames: encoder frames of the window after the block (right context): 20 ms of latency each.
    """

    encoder: str = "whisper"
    network: dict[str, Any]
    window_frames: int = 150
    right_frames: int = 10

    def __post_init__(self) -> None:
        check_ranges(vars(self), {"window_frames": (1, MAX_POSITIONS), "right_frames": (0, MAX_POSITIONS)})

    def check(self, grid: BlockGrid) -> None:
        """Raise ValueError unless the window holds a block, the frame before it and the right context."""
        shortest, longest = grid.encoder_frames + 1 + self.right_frames, self.network.get(POSITIONS, NUM_POSITIONS)
        if not shortest <= self.window_frames <= longest:
            raise ValueError(
                f"window_frames must be {shortest} to {longest} with right_frames {self.right_frames} and blocks of "
                f"{grid.latents} latents, got {self.window_frames}"
            )


def tiny_en() -> WhisperConfig:
    """OpenAI's tiny.en with a window of 3 s, of which 0.2 s are right context."""
    sizes = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
    return WhisperConfig(network={**sizes, "num_mel_bins": 80, "max_source_positions": 1500})


class Whisper(nn.Module):
    """An `AudioEncoder` around transformers' Whisper encoder."""

    def __init__(self, config: WhisperConfig, block_latents: int = BLOCK_LATENTS) -> None:
        """block_latents: latent frames of a block. ValueError if the window is too short for it."""
        super().__init__()
        # Slow to import, and only needed where an encoder runs.
        import transformers
        from transformers.audio_utils import mel_filter_bank
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        sizes = transformers_config(transformers.WhisperConfig, config.network, RANGES)
        self.config, self.grid = config, BlockGrid(block_latents)
        config.check(self.grid)
        self.network = WhisperEncoder(sizes)
        self.num_states = len(self.network.layers) + 1
        self.width = self.network.config.d_model
        self.right_frames, self.right_is_free = config.right_frames, False
        # The first mel frame of the window is centred on its encoder frame's first sample.
        self.left_samples = (
            config.window_frames - self.grid.encoder_frames - config.right_frames
        ) * FRAME_SAMPLES + FFT_SAMPLES // 2
        filters = mel_filter_bank(
            num_frequency_bins=FFT_SAMPLES // 2 + 1,
            num_mel_filters=self.network.config.num_mel_bins,
            min_frequency=0.0,
            max_frequency=8000.0,
            sampling_rate=SAMPLE_RATE_HZ,
            norm="slaney",
            mel_scale="slaney",
        )
        self.filters: Tensor
        self.hann: Tensor
        self.register_buffer("filters", torch.from_numpy(filters.T).float(), persistent=False)
        self.register_buffer("hann", torch.hann_window(FFT_SAMPLES), persistent=False)
        self._silences: dict[tuple[float, int, int], Tensor] = {}
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, part: Part, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> "Whisper":
        # Slow to import, and only needed where an encoder runs.
        import transformers

        config = part.parse(WhisperConfig)
        with part.naming_config():
            sizes = known_fields(config.network, vars(transformers.WhisperConfig()), "network.")
            config = replace(config, network=sizes)
            encoder = cls(config, part.block_latents).to(device)
        nn.Module.to(encoder.network, dtype)  # log-mel stays float32: its powers span eight decades
        load_weights(encoder.network, part)
        return encoder

    @classmethod
    def tiny(cls, block_latents: int = BLOCK_LATENTS) -> "Whisper":
        sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
        network = {**sizes, "num_mel_bins": 16, "max_source_positions": 64}
        return cls(WhisperConfig(network=network, window_frames=64, right_frames=4), block_latents)

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        save(folder, asdict(self.config), self.network, dtype)

    def encode(self, window: Tensor, statistics: AudioStatistics, right_frames: int) -> tuple[Tensor, AudioStatistics]:
        silence = self.left_samples + self.grid.window_end(0, self.right_frames) - len(window)
        end = self.config.window_frames - right_frames
        frames = slice(end - self.grid.encoder_frames - 1, end)
        if not window.any():
            # One of two people is often silent; the states of silence depend on the peak alone.
            return self._silent_states(statistics.peak, frames), statistics
        mel = self.log_mel(F.pad(window, (silence, 0)))
        statistics = statistics.with_peak(float(mel.max()))
        return self.hidden_states(compress(mel, statistics.peak), frames), statistics

    def _silent_states(self, peak: float, frames: slice) -> Tensor:
        """Return the hidden states of a window of digital silence, (l, t, d); those of the last peaks are kept."""
        key = (peak, frames.start, frames.stop)
        if key not in self._silences:
            samples = self.left_samples + self.grid.window_end(0, self.right_frames)
            mel = self.log_mel(torch.zeros(samples))
            if len(self._silences) == MAX_SILENCES:
                self._silences.pop(next(iter(self._silences)))
            self._silences[key] = self.hidden_states(compress(mel, peak), frames)
        return self._silences[key]

    def log_mel(self, samples: Tensor) -> Tensor:
        """Return log10 of mel power, (m, t), at least -10; mel frame t covers samples 160 t .. 160 t + 399 of (s,)."""
        spectrum = torch.stft(
            samples.to(self.hann), FFT_SAMPLES, HOP_SAMPLES, window=self.hann, center=False, return_complex=True
        )
        return (self.filters @ spectrum.abs().square()).clamp(min=1e-10).log10()

    def hidden_states(self, mel: Tensor, frames: slice = slice(None)) -> Tensor:
        """Return the layers' input and the output of each layer, the last one normalised, (l, t, d) float32.

        mel: (m, 2 t) compressed log-mel, at positions from 0. frames: the t that are returned.
        Source: AudioEncoder of openai/whisper; transformers' module computes the same but takes windows of 30 s only.
        """
        network = self.network
        x = mel.to(network.conv1.weight.dtype)[None]
        x = F.gelu(network.conv2(F.gelu(network.conv1(x))))
        x = rearrange(x, "1 d t -> 1 t d")
        x = x + network.embed_positions.weight[: x.shape[1]]
        states = [x[:, frames]]
        for layer in network.layers[:-1]:
            x = layer(x, None)
            states.append(x[:, frames])
        states.append(network.layer_norm(last_layer(network.layers[-1], x, frames)))
        stacked: Tensor = rearrange(states, "l 1 t d -> l t d")
        return stacked.float()


def last_layer(layer: Any, x: Tensor, frames: slice) -> Tensor:
    """Return a transformers layer's output, (1, t, d), at the given frames only; they attend to all frames of x."""
    normed = layer.self_attn_layer_norm(x)
    attended: Tensor = layer.self_attn(normed[:, frames], key_value_states=normed)[0]
    x = x[:, frames] + attended
    transformed: Tensor = layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
    return x + transformed


def compress(mel: Tensor, peak: float) -> Tensor:
    """Compress log-mel (m, t) as in Whisper's training: 8 decades below the peak, to about [-1, 1.5]."""
    return (mel.clamp(min=peak - DYNAMIC_RANGE) + 4) / 4
