"""From speech to a moving face: lips that follow the sounds, and the blinks, glances, brows and nods of a speaker.

The lips are exact by construction: each sound has a target for the mouth, and neighbouring sounds share the time
between them as far as each insists on its own (dominance, after Cohen and Massaro's model of co-articulation). The
weight of `jawOpen` is the truth about the mouth that evaluation compares with.

Axes: f frames at 25 Hz, g grid points at 200 Hz, e expressions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.data import FRAME_RATE_HZ, SOUND_RATE_HZ
from training.synthetic.face import Motion
from training.synthetic.head import Floats, shape_indexes
from training.synthetic.voices import PAUSE, Speech, plain

GRID_HZ = 200
BLEND_S = 0.03
# How far a head turns about its rest while it speaks: deviations of pitch, yaw and roll, radians. With twice as much,
# most of what a network has to say of a frame is where the edges of the head are.
SWAY = (0.01, 0.02, 0.006)
PUNCTUATION = frozenset(",.;:?!^$")


@dataclass(frozen=True)
class Viseme:
    """The mouth of a sound. shapes: weights by name. dominance: how much it insists against its neighbours."""

    dominance: float
    shapes: dict[str, float]


REST = Viseme(0.6, {})
# What is between words: the mouth goes on to the next sound.
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
    """Start, end (seconds) and mouth of every sound; the parts of a diphthong or an affricate share its time."""
    ends = [*speech.onsets[1:], len(speech.samples) / SOUND_RATE_HZ]
    result = []
    for start, end, sound in zip(speech.onsets, ends, speech.sounds, strict=True):
        letters = plain(sound)
        if sound == PAUSE or (not letters and set(sound) & PUNCTUATION):
            mouths = [REST]
        else:
            mouths = [VISEMES[letter] for letter in letters if letter in VISEMES] or [BETWEEN]
        times = np.linspace(start, max(start, end), len(mouths) + 1)
        result += list(zip(times[:-1].tolist(), times[1:].tolist(), mouths, strict=True))
    return result


def smooth(curves: Floats, deviation: float) -> Floats:
    """A Gaussian blur in time, the ends held: (g, e) -> (g, e). deviation: in points."""
    reach = max(1, round(4 * deviation))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(curves, ((reach, reach), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel, "valid") for column in padded.T], 1)


def mouth_curves(speech: Speech, names: Sequence[str], num_frames: int) -> Floats:
    """Weights of the mouth's expressions at the middle of each frame: (f, e).

    names: of the expressions. Silence follows where the speech ends.
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
    """(f,) how loud each frame is, 0 to 1, blurred over a syllable."""
    size = SOUND_RATE_HZ // FRAME_RATE_HZ
    whole = np.zeros(num_frames * size)
    whole[: min(len(samples), len(whole))] = samples[: len(whole)]
    power = np.sqrt((whole.reshape(num_frames, size) ** 2).mean(1))
    blurred = smooth(power[:, None], 2)[:, 0]
    return blurred / max(float(blurred.max()), 1e-4)


def drift(rng: Generator, num_frames: int, count: int, tau_s: float) -> Floats:
    """Slow, smooth noise of unit variance: (f, count)."""
    deviation = tau_s * FRAME_RATE_HZ
    margin = round(4 * deviation)
    noise = smooth(rng.normal(size=(num_frames + 2 * margin, count)), deviation)[margin:-margin]
    scaled: Floats = noise * np.sqrt(2 * np.sqrt(np.pi) * deviation)
    return scaled


def blinks(rng: Generator, num_frames: int) -> NDArray[np.float64]:
    """(f,) how far the eyes are closed: a blink of 0.2 s every 1.5 to 5 s."""
    seconds = np.arange(num_frames) / FRAME_RATE_HZ
    closed: NDArray[np.float64] = np.zeros(num_frames)
    moment = rng.uniform(0, 4)
    while moment < num_frames / FRAME_RATE_HZ:
        closed = np.maximum(closed, np.exp(-(((seconds - moment) / 0.075) ** 2)))
        moment += rng.uniform(1.5, 5)
    return closed


def glances(rng: Generator, num_frames: int) -> Floats:
    """(f, 2) gaze: mostly at the viewer, now and then elsewhere for a second."""
    gaze, frame = np.zeros((num_frames, 2)), 0
    while frame < num_frames:
        length = int(rng.uniform(0.5, 2) * FRAME_RATE_HZ)
        gaze[frame : frame + length] = rng.normal(0, (0.25, 0.12)) if rng.random() < 0.4 else rng.normal(0, 0.03, 2)
        frame += length
    return np.clip(smooth(gaze, 0.7), -0.8, 0.8)


def motion_of(speech: Speech, names: Sequence[str], num_frames: int, rng: Generator) -> Motion:
    """A face that says this; rng decides everything that the sound does not."""
    weights = mouth_curves(speech, names, num_frames) * rng.uniform(0.9, 1.1)
    loud = loudness(speech.samples, num_frames)
    slow = drift(rng, num_frames, 5, 0.6)

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
    """One frame that could be the speaker's portrait: mouth at rest, eyes to the viewer, about the same pose."""
    weights = np.zeros((1, motion.weights.shape[1]), np.float32)
    resting = [i for name in ("mouthSmile", "eyeWide") for i in shape_indexes(list(names), name)]
    weights[0, resting] = motion.weights[:, resting].min(0)
    return Motion(weights, motion.turn.mean(0, keepdims=True) + rng.normal(0, SWAY, (1, 3)), np.zeros((1, 2)))
