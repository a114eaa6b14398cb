"""Motion of a face from speech: lips that follow the phones, and blinks, glances, brows and nods.

Each phone has a target for the mouth, and neighbouring targets are blended by their dominance (Cohen and Massaro's
model of co-articulation), so the lips match the audio exactly. The weight of `jawOpen` is the true opening of the jaw
that evaluation compares with.

Axes: f frames at 25 Hz, g grid points at 200 Hz, e expressions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.data import AUDIO_RATE_HZ, FRAME_RATE_HZ
from training.synthetic.face import Motion
from training.synthetic.head import Floats, shape_indexes
from training.synthetic.voices import PAUSE, Speech, strip_marks

GRID_HZ = 200
BLEND_S = 0.03
# Standard deviations of the head's pitch, yaw and roll during speech, in radians. With twice as much, most of the error
# of a network is the position of the head's edges.
SWAY = (0.01, 0.02, 0.006)
PUNCTUATION = frozenset(",.;:?!^$")


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
        if phone == PAUSE or (not letters and set(phone) & PUNCTUATION):
            mouths = [REST]
        else:
            mouths = [VISEMES[letter] for letter in letters if letter in VISEMES] or [BETWEEN]
        times = np.linspace(start, max(start, end), len(mouths) + 1)
        result += list(zip(times[:-1].tolist(), times[1:].tolist(), mouths, strict=True))
    return result


def smooth(curves: Floats, deviation: float) -> Floats:
    """Blur in time with a Gaussian, edge values repeated: (g, e) -> (g, e). deviation: in points."""
    reach = max(1, round(4 * deviation))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(curves, ((reach, reach), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel, "valid") for column in padded.T], 1)


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


def smooth_noise(rng: Generator, num_frames: int, count: int, tau_s: float) -> Floats:
    """Draw slow, smooth noise of unit variance: (f, count). tau_s: its time scale."""
    deviation = tau_s * FRAME_RATE_HZ
    margin = round(4 * deviation)
    noise = smooth(rng.normal(size=(num_frames + 2 * margin, count)), deviation)[margin:-margin]
    scaled: Floats = noise * np.sqrt(2 * np.sqrt(np.pi) * deviation)
    return scaled


def blinks(rng: Generator, num_frames: int) -> NDArray[np.float64]:
    """Draw how far the eyes are closed, (f,) 0 to 1: a blink of 0.2 s every 1.5 to 5 s."""
    seconds = np.arange(num_frames) / FRAME_RATE_HZ
    closed: NDArray[np.float64] = np.zeros(num_frames)
    moment = rng.uniform(0, 4)
    while moment < num_frames / FRAME_RATE_HZ:
        closed = np.maximum(closed, np.exp(-(((seconds - moment) / 0.075) ** 2)))
        moment += rng.uniform(1.5, 5)
    return closed


def glances(rng: Generator, num_frames: int) -> Floats:
    """Draw a gaze (f, 2): mostly at the viewer, sometimes elsewhere for a second."""
    gaze, frame = np.zeros((num_frames, 2)), 0
    while frame < num_frames:
        length = int(rng.uniform(0.5, 2) * FRAME_RATE_HZ)
        gaze[frame : frame + length] = rng.normal(0, (0.25, 0.12)) if rng.random() < 0.4 else rng.normal(0, 0.03, 2)
        frame += length
    return np.clip(smooth(gaze, 0.7), -0.8, 0.8)


def motion_of(speech: Speech, names: Sequence[str], num_frames: int, rng: Generator) -> Motion:
    """Return the motion of a face that speaks; rng determines everything except the lips."""
    weights = mouth_curves(speech, names, num_frames) * rng.uniform(0.9, 1.1)
    loud = loudness(speech.samples, num_frames)
    slow = smooth_noise(rng, num_frames, 5, 0.6)

    def add(name: str, curve: Floats | float) -> None:
        for index in shape_indexes(list(names), name):
            weights[:, index] += curve

    add("mouthSmile", rng.uniform(-0.02, 0.22))
    add("eyeBlink", blinks(rng, num_frames))
    add("eyeWide", rng.uniform(0, 0.15))
    add("browInnerUp", np.clip(0.15 * slow[:, 0] + rng.uniform(0.05, 0.35) * loud, 0, 0.7))
    add("browOuterUp", np.clip(0.12 * slow[:, 1] + rng.uniform(0, 0.25) * loud, 0, 0.6))
    add("browDown", np.clip(-0.2 * slow[:, 0], 0, 0.4))
    still = rng.normal(0, (0.03, 0.06, 0.02))
    turn = still + slow[:, 2:] * SWAY + np.outer(loud, (rng.uniform(0, 0.015), 0, 0))
    return Motion(np.clip(weights, 0, 1).astype(np.float32), turn, glances(rng, num_frames))


def portrait_of(motion: Motion, names: Sequence[str], rng: Generator) -> Motion:
    """Return one frame as a portrait of the speaker: mouth at rest, eyes to the viewer, about the same pose."""
    weights = np.zeros((1, motion.weights.shape[1]), np.float32)
    resting = [i for name in ("mouthSmile", "eyeWide") for i in shape_indexes(list(names), name)]
    weights[0, resting] = motion.weights[:, resting].min(0)
    return Motion(weights, motion.turn.mean(0, keepdims=True) + rng.normal(0, SWAY, (1, 3)), np.zeros((1, 2)))
