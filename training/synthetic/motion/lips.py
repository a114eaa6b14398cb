"""Lips that follow the phones of speech.

Each phone has a target for the mouth, and neighbouring targets are blended by their dominance (Cohen and Massaro's
model of co-articulation), so the lips match the audio exactly. The weight of `jawOpen` is the true opening of the jaw
that evaluation compares with.

Axes: f frames at 25 Hz, g grid points at 200 Hz, e expressions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data import AUDIO_RATE_HZ, FRAME_RATE_HZ
from training.synthetic.head import Floats, shape_indexes
from training.synthetic.motion.curves import smooth
from training.synthetic.speech.voices import Speech, is_pause, strip_marks

GRID_HZ = 200
BLEND_S = 0.03


@dataclass(frozen=True)
class Viseme:
    """The mouth of a phone. shapes: weights by name. dominance: weight against its neighbours."""

    dominance: float
    shapes: dict[str, float]


REST = Viseme(0.6, {})
# Between words: the mouth moves on to the next phone.
BETWEEN = Viseme(0.02, {})
VISEMES: dict[str, Viseme] = {
    **dict.fromkeys("ɑaɐʌɒ", Viseme(1, {"jawOpen": 0.62, "mouthLowerDown": 0.15})),
    **dict.fromkeys("æ", Viseme(1, {"jawOpen": 0.55, "mouthStretch": 0.25, "mouthLowerDown": 0.15})),
    **dict.fromkeys("ɛe", Viseme(1, {"jawOpen": 0.38, "mouthStretch": 0.3, "mouthSmile": 0.12})),
    **dict.fromkeys("əɚɜɝ", Viseme(0.7, {"jawOpen": 0.28})),
    **dict.fromkeys(
        "iɪjᵻ", Viseme(0.9, {"jawOpen": 0.17, "mouthSmile": 0.35, "mouthStretch": 0.25, "mouthUpperUp": 0.1})
    ),
    **dict.fromkeys("oɔ", Viseme(1.2, {"jawOpen": 0.38, "mouthFunnel": 0.5, "mouthPucker": 0.3})),
    **dict.fromkeys("uʊw", Viseme(1.6, {"jawOpen": 0.14, "mouthPucker": 0.8, "mouthFunnel": 0.3})),
    **dict.fromkeys("pbm", Viseme(6, {"mouthPress": 0.45, "mouthRollLower": 0.25, "mouthRollUpper": 0.2})),
    **dict.fromkeys("fv", Viseme(4, {"jawOpen": 0.05, "mouthRollLower": 0.55, "mouthUpperUp": 0.3})),
    **dict.fromkeys("θð", Viseme(1, {"jawOpen": 0.17, "tongueOut": 0.25})),
    **dict.fromkeys("tdnszɾ", Viseme(0.9, {"jawOpen": 0.10, "mouthStretch": 0.15, "mouthLowerDown": 0.15})),
    **dict.fromkeys("l", Viseme(0.6, {"jawOpen": 0.22, "mouthLowerDown": 0.1})),
    **dict.fromkeys("ʃʒ", Viseme(2, {"jawOpen": 0.10, "mouthFunnel": 0.6, "mouthPucker": 0.2})),
    **dict.fromkeys("kɡŋgx", Viseme(0.5, {"jawOpen": 0.20})),
    **dict.fromkeys("ɹr", Viseme(1, {"jawOpen": 0.15, "mouthPucker": 0.35, "mouthFunnel": 0.25})),
    **dict.fromkeys("hʔ", Viseme(0.2, {"jawOpen": 0.2})),
}


def visemes_of(speech: Speech) -> list[tuple[float, float, Viseme]]:
    """Return start, end (seconds) and viseme of every phone; the parts of a diphthong or affricate share its time."""
    ends = [*speech.onsets[1:], len(speech.samples) / AUDIO_RATE_HZ]
    result = []
    for start, end, phone in zip(speech.onsets, ends, speech.phones, strict=True):
        letters = strip_marks(phone)
        if is_pause(phone):
            mouths = [REST]
        else:
            mouths = [VISEMES[letter] for letter in letters if letter in VISEMES] or [BETWEEN]
        times = np.linspace(start, max(start, end), len(mouths) + 1)
        result += list(zip(times[:-1].tolist(), times[1:].tolist(), mouths, strict=True))
    return result


def mouth_curves(speech: Speech, names: Sequence[str], num_frames: int) -> Floats:
    """Return the weights of the mouth's expressions at the middle of each frame: (f, e).

    names: of the expressions. The mouth is at rest after the end of the speech.
    """
    num_points = round(num_frames / FRAME_RATE_HZ * GRID_HZ)
    targets, dominance = np.zeros((num_points, len(names))), np.full((num_points, 1), REST.dominance)
    for start, end, viseme in visemes_of(speech):
        span = slice(round(start * GRID_HZ), max(round(end * GRID_HZ), round(start * GRID_HZ) + 1))
        targets[span] = 0
        dominance[span] = viseme.dominance
        for name, weight in viseme.shapes.items():
            targets[span, shape_indexes(list(names), name)] = weight
    deviation = BLEND_S * GRID_HZ
    blended = smooth(targets * dominance, deviation) / smooth(dominance, deviation)
    step = GRID_HZ // FRAME_RATE_HZ
    return blended[step // 2 :: step][:num_frames]


def loudness(samples: NDArray[np.float32], num_frames: int) -> Floats:
    """Return the loudness of each frame, (f,) 0 to 1, blurred over a syllable."""
    size = AUDIO_RATE_HZ // FRAME_RATE_HZ
    whole = np.zeros(num_frames * size)
    whole[: min(len(samples), len(whole))] = samples[: len(whole)]
    power = np.sqrt((whole.reshape(num_frames, size) ** 2).mean(1))
    blurred = smooth(power[:, None], 2)[:, 0]
    return blurred / max(float(blurred.max()), 1e-4)
