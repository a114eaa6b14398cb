"""Audio features of a whole file, as the public Live Avatar weights were trained on.

    samples --resample, normalise--> audio --wav2vec2--> states at 50 Hz --> grid at 30 Hz --> pixel frames of clips

Statistics, attention and interpolation span the file. It serves comparison with the reference and rendering of files; a
stream (`model.py`) approximates it.
Source: `audio_encoder.py` of Wan2.2-S2V. Axes: a audio channels, s samples, t encoder frames or grid points, f pixel
frames, l the input of the layers and the output of each, d width.
"""

from collections.abc import Iterator
from fractions import Fraction

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from avatar.audio.alignment import ENCODER_HZ, BlockGrid
from avatar.audio.encoder import AudioEncoder
from avatar.audio.resample import MonoResampler, check_piece
from avatar.audio.statistics import standardise
from avatar.audio.wav2vec2 import Wav2Vec2
from avatar.types import BLOCK_LATENTS, AudioPiece, Block

GRID_HZ = 30


def file_blocks(encoder: AudioEncoder, samples: Tensor, rate_hz: int, clip_frames: int) -> Iterator[Block]:
    """Yield the blocks of features (l, d, f) of a file, to the end of its last clip; after the audio they are zero.

    samples: (a, s) float32 in [-1, 1]. clip_frames: pixel frames of a clip, a multiple of a block's.
    ValueError if the samples are invalid (`check_piece`), or the encoder is not wav2vec2.
    """
    if not isinstance(encoder, Wav2Vec2):
        raise ValueError("features of a whole file need wav2vec2; this checkpoint's encoder takes live audio only")
    with torch.no_grad():
        states = encoder.hidden_states(normalise(to_16khz(samples, rate_hz)))
    features = model_input(bucket(to_grid(states), clip_frames=clip_frames))[0]
    for index, block in enumerate(torch.split(features, encoder.grid.frames, dim=-1)):
        yield Block(index, block.contiguous())


def to_16khz(samples: Tensor, rate_hz: int) -> Tensor:
    """Resample samples (a, s) float32 in [-1, 1] to mono at 16 kHz, (s,). ValueError as `check_piece`."""
    check_piece(AudioPiece(samples, rate_hz))
    return MonoResampler(rate_hz, BlockGrid(BLOCK_LATENTS).samples)(samples, is_last=True)


def normalise(audio: Tensor) -> Tensor:
    """Normalise audio (s,) to mean 0 and variance 1."""
    variance, mean = torch.var_mean(audio, correction=0)
    return standardise(audio, float(mean), float(variance))


def to_grid(states: Tensor) -> Tensor:
    """Interpolate states (l, t, d) from 50 Hz to 30 Hz, first and last aligned. ValueError below two frames."""
    # In floats, as in the reference: the exact 3 t // 5 differs for 0.4 % of all lengths.
    length = int(states.shape[1] / float(ENCODER_HZ) * GRID_HZ)
    if length == 0:
        raise ValueError(f"audio must last two encoder frames or more, got {states.shape[1]}")
    columns = rearrange(states, "l t d -> l d t")
    return rearrange(F.interpolate(columns, length, mode="linear", align_corners=True), "l d t -> l t d")


def bucket(grid: Tensor, frame_rate: int = 25, clip_frames: int = 48, neighbours: int = 0) -> Tensor:
    """Assign grid points to the pixel frames of whole clips: (f, l, d (2 neighbours + 1)).

    grid: (l, t, d) states at 30 Hz. A frame takes the nearest point and `neighbours` points on each side, concatenated
    over d; frames after the end of the audio are zero. If the audio exactly fills its last clip, an empty clip follows,
    as in the reference.
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
    """Bring bucketed frames (f, l, d) into the network's layout, (1, l, d, f)."""
    return rearrange(frames, "f l d -> 1 l d f")
