"""Features of a whole file, as the public Live Avatar weights were trained on. Source: Wan2.2-S2V, `audio_encoder.py`.

Statistics, attention and interpolation span the file, so this serves comparison with the reference and rendering of
files; a stream (`model.py`) comes close to it. Axes: s samples, t encoder frames or grid points, f pixel frames,
l encoder layers and the input, d width.
"""

from collections.abc import Iterator
from fractions import Fraction

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from avatar.audio.encoder import Encoder
from avatar.audio.resample import Resampler, check_piece
from avatar.audio.statistics import standardise
from avatar.audio.wav2vec2 import Wav2Vec2
from avatar.types import BLOCK_FRAMES, AudioPiece, Block

ENCODER_HZ = 50
GRID_HZ = 30


def file_blocks(encoder: Encoder, samples: Tensor, rate_hz: int, clip_frames: int) -> Iterator[Block]:
    """Blocks of features (l, d, f) of a whole file, to the end of its last clip: what is behind the sound is zero.

    samples: (a, s) float32 in [-1, 1]. clip_frames: a multiple of a block's pixel frames.
    ValueError if the sound cannot be used, or the encoder hears no whole files.
    """
    if not isinstance(encoder, Wav2Vec2):
        raise ValueError("features of a whole file need wav2vec2; this checkpoint's encoder only hears live sound")
    with torch.no_grad():
        states = encoder.hidden_states(normalise(sound_of(samples, rate_hz)))
    features = model_input(bucket(to_grid(states), clip_frames=clip_frames))[0]
    for index, block in enumerate(torch.split(features, BLOCK_FRAMES, dim=-1)):
        yield Block(index, block.contiguous())


def sound_of(samples: Tensor, rate_hz: int) -> Tensor:
    """Mono sound at 16 kHz, (s,), of samples (a, s) float32 in [-1, 1]. ValueError if they cannot be used."""
    check_piece(AudioPiece(samples, rate_hz))
    return Resampler(rate_hz)(samples, is_last=True)


def normalise(sound: Tensor) -> Tensor:
    """Sound (s,) brought to mean 0 and variance 1."""
    variance, mean = torch.var_mean(sound, correction=0)
    return standardise(sound, float(mean), float(variance))


def to_grid(states: Tensor) -> Tensor:
    """Hidden states at 50 Hz, (l, t, d), interpolated to 30 Hz so that both ends meet. ValueError below two frames."""
    # In floats, as the reference does it: the exact 3 t // 5 is another number for 0.4 % of all lengths.
    length = int(states.shape[1] / float(ENCODER_HZ) * GRID_HZ)
    if length == 0:
        raise ValueError(f"sound must last two encoder frames or more, got {states.shape[1]}")
    columns = rearrange(states, "l t d -> l d t")
    return rearrange(F.interpolate(columns, length, mode="linear", align_corners=True), "l d t -> l t d")


def bucket(grid: Tensor, frame_rate: int = 25, clip_frames: int = 48, neighbours: int = 0) -> Tensor:
    """What each pixel frame of whole clips hears, (f, l, d (2 neighbours + 1)).

    grid: (l, t, d) states at 30 Hz. A frame takes the nearest point and as many neighbours on each side, side by side;
    frames after the sound's end take zeros. One clip more than sounds follows where the sound fills its last.
    """
    length = grid.shape[1]
    num_clips = int(length / (clip_frames * (GRID_HZ / frame_rate))) + 1
    centres = [round(Fraction(n * GRID_HZ, frame_rate)) for n in range(num_clips * clip_frames)]
    stride = GRID_HZ // frame_rate
    offsets = torch.arange(-neighbours, neighbours + 1) * stride
    points = rearrange(torch.tensor(centres), "f -> f 1") + offsets
    frames = rearrange(grid[:, points.clamp(0, length - 1)], "l f n d -> f l (n d)")
    return frames * rearrange(torch.tensor(centres) < length, "f -> f 1 1")


def model_input(frames: Tensor) -> Tensor:
    """Bucketed frames (f, l, d) as the network takes them, (1, l, d, f)."""
    return rearrange(frames, "f l d -> 1 l d f")
