"""All motion of the person in a dialogue, and the truth about it.

While they speak, heads sway and beat, brows rise with loud syllables, and eyes wander. While they listen, the mouth is
shut, eyes keep to the viewer, and nods, brows and smiles answer the ends of the other's phrases.

Axes: f frames at 25 Hz, e expressions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from training.data import FRAME_RATE_HZ
from training.synthetic.face import Motion
from training.synthetic.head import Floats, shape_indexes
from training.synthetic.motion import eyes, head_pose
from training.synthetic.motion.curves import arrivals, frame_times, smooth, smooth_noise, swell
from training.synthetic.motion.lips import loudness, mouth_curves
from training.synthetic.speech.dialogue import Dialogue, phrases, speaking

# Probability of a look at the viewer while speaking, and while listening.
ATTENTION_SPEAKING, ATTENTION_LISTENING = 0.65, 0.9
# Probability that brows answer a phrase, and that a smile does; rate of smiles and frowns without cause.
BROW_PROBABILITY, SMILE_PROBABILITY, SMILE_HZ, FROWN_HZ = 0.45, 0.15, 0.07, 0.06
# Less smile on lips that are busy.
SMILE_SPEAKING = 0.55


@dataclass(frozen=True, eq=False)
class Performance:
    """The motion of a face, and its truth frame by frame.

    truth, by name: blink, brow, smile (f,) 0 to 1; nod (f,) radians of pitch, part of pose; pose (f, 3) pitch, yaw,
    roll; gaze (f, 2) radians right and up of the viewer; speaking (f, 2) 0 or 1, of the person and of the other.
    """

    motion: Motion
    truth: dict[str, Floats]


class Expressions:
    """Weights of expressions that add up."""

    def __init__(self, names: Sequence[str], weights: Floats) -> None:
        self._names = list(names)
        self.weights = weights

    def add(self, name: str, curve: Floats | float) -> None:
        for index in shape_indexes(self._names, name):
            self.weights[:, index] += curve


def smiles(rng: Generator, num_frames: int, answers: Sequence[float], busy: Floats) -> Floats:
    """Draw smiles that come and go, (f,) 0 to 1.

    answers: times of reactions, some of which smile. busy: (f,) 0 to 1, while the person speaks.
    """
    times = frame_times(num_frames)
    curve: Floats = np.zeros(num_frames)
    starts = arrivals(rng, np.full(num_frames, SMILE_HZ), 1.0)
    starts += [start for start in answers if rng.random() < SMILE_PROBABILITY]
    if rng.random() < 0.15:
        starts.append(-0.5)
    for start in starts:
        event = swell(times, start, rng.uniform(0.3, 0.6), rng.uniform(0.4, 2.0), rng.uniform(0.5, 1.0))
        curve = np.maximum(curve, rng.uniform(0.3, 0.75) * event)
    return curve * (1 - (1 - SMILE_SPEAKING) * smooth(busy[:, None], 4)[:, 0])


def brows(rng: Generator, num_frames: int, answers: Sequence[float], loud: Floats) -> Floats:
    """Draw how far brows are raised, (f,) 0 to 1. answers: times of reactions. loud: of the own voice, (f,) 0 to 1."""
    times = frame_times(num_frames)
    curve: Floats = np.zeros(num_frames)
    for start in answers:
        event = swell(times, start, rng.uniform(0.12, 0.25), rng.uniform(0.1, 0.5), rng.uniform(0.3, 0.6))
        curve = np.maximum(curve, rng.uniform(0.3, 0.8) * event)
    accent = np.clip((smooth(loud[:, None], 3)[:, 0] - 0.3) * 1.6, 0, 1) * np.clip(
        0.5 + smooth_noise(rng, num_frames, 1, 0.5)[:, 0], 0, 1.2
    )
    raised: Floats = np.maximum(curve, rng.uniform(0.1, 0.55) * accent)
    return raised


def frowns(rng: Generator, num_frames: int) -> Floats:
    """Draw frowns that come and go, (f,) 0 to 1."""
    times = frame_times(num_frames)
    curve: Floats = np.zeros(num_frames)
    for start in arrivals(rng, np.full(num_frames, FROWN_HZ), 1.0):
        curve = np.maximum(curve, rng.uniform(0.2, 0.5) * swell(times, start, 0.3, rng.uniform(0.3, 1.5), 0.5))
    return curve


def express(names: Sequence[str], mouth: Floats, curves: Mapping[str, Floats], rng: Generator) -> Floats:
    """Return the weights of all expressions, (f, e) 0 to 1.

    names: of the expressions. mouth: (f, e) their weights in speech, zero for a person who says nothing. curves: blink,
    brow, smile and frown, (f,) 0 to 1.
    """
    blink, brow, smile, frown = (curves[name] for name in ("blink", "brow", "smile", "frown"))
    face = Expressions(names, mouth)
    face.add("mouthSmile", smile + max(0.0, rng.uniform(-0.05, 0.15)))
    face.add("cheekSquint", 0.6 * smile)
    face.add("eyeSquint", 0.35 * smile + rng.uniform(0, 0.15))
    face.add("eyeBlink", blink)
    face.add("eyeWide", rng.uniform(0, 0.15) + 0.25 * brow * (1 - blink))
    face.add("browInnerUp", 0.8 * brow)
    face.add("browOuterUp", 0.7 * brow)
    face.add("browDown", frown * (1 - brow))
    face.add("noseSneer", 0.15 * frown)
    weights: Floats = np.clip(face.weights, 0, 1).astype(np.float32)
    return weights


def perform(dialogue: Dialogue, names: Sequence[str], num_frames: int, rng: Generator) -> Performance:
    """Return the person's motion in a dialogue; rng determines everything except the lips."""
    person, other = dialogue.person, dialogue.other
    times = frame_times(num_frames)
    busy, heard = (speaking(speech, times).astype(float) for speech in (person, other))
    listens = smooth((heard * (1 - busy))[:, None], 6)[:, 0]
    own_ends, other_ends = ([end for _, end in phrases(speech)] for speech in (person, other))
    loud = loudness(person.samples, num_frames) * busy

    # A person who speaks does not nod to the other.
    heard_ends = [end for end in other_ends if not np.interp(end + 0.3, times, busy)]
    nod = head_pose.nods(rng, num_frames, head_pose.reactions(rng, heard_ends, head_pose.NOD_PROBABILITY))
    shifts, shift_times = head_pose.shifts(rng, num_frames)
    calm = (1 - (1 - head_pose.LISTENING) * listens)[:, None]
    moved = head_pose.sway(rng, num_frames) * calm + shifts * calm + rng.normal(0, (0.02, 0.03, 0.012))
    moved[:, 0] += head_pose.beats(rng, loud) + nod
    pose = head_pose.limited(moved)

    attention = ATTENTION_SPEAKING + (ATTENTION_LISTENING - ATTENTION_SPEAKING) * listens
    directions, jumps = eyes.gaze(rng, num_frames, attention)
    starts = eyes.blink_times(rng, num_frames, own_ends + other_ends, jumps + shift_times)
    blink = eyes.lids(rng, num_frames, starts)
    smile = smiles(rng, num_frames, head_pose.reactions(rng, heard_ends, 1.0), busy)
    brow = brows(rng, num_frames, head_pose.reactions(rng, heard_ends, BROW_PROBABILITY), loud)
    frown = frowns(rng, num_frames)
    mouth = mouth_curves(person, names, num_frames) * rng.uniform(0.9, 1.1)
    weights = express(names, mouth, {"blink": blink, "brow": brow, "smile": smile, "frown": frown}, rng)
    motion = Motion(weights, pose, eyes.eyes_in_head(directions, pose))
    truth = {
        "blink": blink,
        "pose": pose,
        "gaze": directions,
        "nod": nod,
        "brow": brow,
        "smile": smile,
        "speaking": np.stack([busy, heard], 1),
    }
    return Performance(motion, truth)


def portrait_of(motion: Motion, names: Sequence[str], rng: Generator) -> Motion:
    """Return one frame as a portrait of the person: mouth at rest, eyes to the viewer, about the same pose."""
    weights = np.zeros((1, motion.weights.shape[1]), np.float32)
    resting = [i for name in ("mouthSmile", "eyeWide", "eyeSquint") for i in shape_indexes(list(names), name)]
    weights[0, resting] = motion.weights[:, resting].min(0)
    pose = head_pose.limited(motion.turn.mean(0, keepdims=True) + rng.normal(0, head_pose.SWAY, (1, 3)))
    return Motion(weights, pose, eyes.eyes_in_head(np.zeros((1, 2)), pose))


def blinks_a_minute(blink: Floats) -> float:
    """Count the blinks of a curve (f,) of the lids, per minute: rises through one half."""
    rises = (blink[1:] >= 0.5) & (blink[:-1] < 0.5)
    return float(rises.sum()) * 60 * FRAME_RATE_HZ / len(blink)
