"""Held-out clips, spoken once more by a checkpoint, beside what was really to be seen.

Axes: s samples at 16 kHz, f pixel frames, H W height and width of frames.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avatar.vae.vae import BLOCK_FRAMES, HIDDEN_FRAMES
from training.data import StoredClip
from training.figures import correlation, edge_energy, ratio
from training.landmarks import Landmarks, mouth_opening
from training.rollouts import Models, Pixels, Rollout, Sound, spoken

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Take:
    """A clip as it was made by a checkpoint, and the truth at the same times.

    made, truth: (f, H, W, 3). reference: (H, W, 3), what the checkpoint knew of the person. rollout: what it cost.
    """

    clip: StoredClip
    made: Pixels
    truth: Pixels
    reference: Pixels
    rollout: Rollout

    @property
    def jaw(self) -> Floats | None:
        """(f,) how far the mouth was to be open, where that is known."""
        return np.array(self.clip.array("jaw")[-len(self.truth) :]) if self.clip.has("jaw") else None


@dataclass(frozen=True, eq=False)
class Mouths:
    """Curves (f,) of a take: the lips' opening as it is read in what was made and in the truth, and the truth itself.

    truth: the jaw's curve where that is known, else the opening that is read.
    """

    made: Floats
    read: Floats
    truth: Floats


def sound_of(clip: StoredClip) -> Sound:
    """(s,) all sound of a clip, in [-1, 1]."""
    return clip.array("sound").astype(np.float32) / np.float32(32768)


def take_of(models: Models, clip: StoredClip) -> Take:
    """The clip, made from its reference and its sound; the rollout runs over the sound before the pictures too."""
    reference = models.picture(np.array(clip.array("reference")))
    made, rollout = pictured(models, reference, clip)
    truth = np.array(clip.array("frames")[-len(made) :])
    if truth.shape != made.shape:
        truth = np.stack([models.picture(frame) for frame in truth])
    return Take(clip, made, truth, reference, rollout)


def pictured(models: Models, reference: Pixels, clip: StoredClip) -> tuple[Pixels, Rollout]:
    """What a person says to a clip's sound while it was pictured, (f, H, W, 3), and the rollout that made it.

    A stream's first HIDDEN_FRAMES frames are never shown: of a clip without sound before it the rest is returned.
    """
    lead, end = clip.info["lead_frames"], clip.info["lead_frames"] + len(clip.array("frames"))
    rollout = Rollout(models, reference)
    frames = spoken(rollout, sound_of(clip), -(-end // BLOCK_FRAMES))
    return frames[max(0, lead - HIDDEN_FRAMES) : end - HIDDEN_FRAMES], rollout


def mouths_of(take: Take, landmarks: Landmarks) -> Mouths:
    """The curves of a take; NaN where most frames have no face."""
    made, read = (mouth_opening(landmarks.points(frames)) for frames in (take.made, take.truth))
    jaw = take.jaw
    return Mouths(made, read, read if jaw is None else jaw)


def readable(mouths: Iterable[Mouths]) -> Iterator[Mouths]:
    """Those whose curves are all known."""
    return (each for each in mouths if all(np.isfinite(curve).all() for curve in (each.made, each.read, each.truth)))


def mouth_figures(mouths: Sequence[Mouths]) -> dict[str, float | None]:
    """lip_sync_r, the mean of r over takes, and mouth_amplitude, deviation of the opening by that of the truth."""
    known = list(readable(mouths))
    if not known:
        return {"lip_sync_r": None, "mouth_amplitude": None}
    return {
        "lip_sync_r": float(np.mean([correlation(each.made, each.truth) for each in known])),
        "mouth_amplitude": ratio(
            [float(each.made.std()) for each in known], [float(each.read.std()) for each in known]
        ),
    }


def edge_ratio(takes: Sequence[Take]) -> float | None:
    """Edge energy of what was made by that of the truth."""
    return ratio([edge_energy(take.made) for take in takes], [edge_energy(take.truth) for take in takes])
