"""Held-out clips, spoken once more by a checkpoint, beside what was really to be seen; and what that says in numbers.

Axes: f pixel frames, H W height and width of frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from avatar.types import BLOCK_FRAMES
from avatar.vae.vae import HIDDEN_FRAMES
from training.data import StoredClip
from training.eval.identity import Identity
from training.eval.inference import Models, Pixels, Rollout, Sound, spoken, until
from training.eval.landmarks import MISSING, Floats, Landmarks, found, head_motion, mouth_opening
from training.eval.metrics import (
    Figure,
    corners,
    correlation,
    edge_energy,
    flicker,
    lag_figure,
    mean_figure,
    ratio_figure,
    sharpness,
    stillness_db,
)

# Frames between two that are embedded.
IDENTITY_STRIDE = 24


@dataclass(frozen=True, eq=False)
class Take:
    """A clip as it was made by a checkpoint, and the truth at the same times.

    made, truth: (f, H, W, 3). reference: (H, W, 3), what the checkpoint knew of the person.
    jaw: (f,) how far the mouth was to be open; None where that is not known.
    """

    made: Pixels
    truth: Pixels
    reference: Pixels
    jaw: Floats | None


def sound_of(clip: StoredClip) -> Sound:
    """(s,) all sound of a clip at 16 kHz, in [-1, 1]."""
    return clip.array("sound").astype(np.float32) / np.float32(32768)


def take_of(models: Models, clip: StoredClip) -> Take:
    """The clip, made from its reference and its sound; the rollout runs over the sound before the pictures too."""
    reference = models.picture(np.array(clip.array("reference")))
    made = pictured(models, reference, clip)
    truth = np.array(clip.array("frames")[-len(made) :])
    if truth.shape != made.shape:
        truth = np.stack([models.picture(frame) for frame in truth])
    jaw = np.array(clip.array("jaw")[-len(made) :]) if clip.has("jaw") else None
    return Take(made, truth, reference, jaw)


def pictured(models: Models, reference: Pixels, clip: StoredClip) -> Pixels:
    """What a person says to a clip's sound while it was pictured, (f, H, W, 3).

    A stream's first HIDDEN_FRAMES frames are never shown: of a clip without sound before it the rest is returned.
    """
    lead, end = clip.info["lead_frames"], clip.info["lead_frames"] + len(clip.array("frames"))
    frames = spoken(Rollout(models, reference), sound_of(clip), -(-end // BLOCK_FRAMES))
    return frames[max(0, lead - HIDDEN_FRAMES) : end - HIDDEN_FRAMES]


def speak(models: Models, reference: Pixels, sound: Sound) -> Take:
    """A person (H, W, 3) who says any sound (s,) at 16 kHz; the still reference is in the unknown truth's place."""
    made = spoken(Rollout(models, reference), sound)
    return Take(made, np.broadcast_to(reference, made.shape), reference, None)


@dataclass(frozen=True, eq=False)
class Scores:
    """What is kept of a take when its frames are gone. Pairs are of what was made and of the truth.

    openings: (f,) each, the lips' opening as it is read; None if it could not be read in the truth.
    jaw: (f,) what the first is compared with: the jaw's curve where that is known, else the second.
    head: how far the heads stray; None if either has no face.
    faces: share of the made frames with a face; None if nobody could look for faces.
    identity: mean distance to the reference's embedding; None if no faces could be compared.
    """

    openings: tuple[Floats, Floats] | None
    jaw: Floats
    head: tuple[float, float] | None
    faces: float | None
    identity: tuple[float, float] | None
    edges: tuple[float, float]
    sharpness: tuple[float, float]
    flicker: tuple[float, float]
    stillness_db: float


def score(take: Take, landmarks: Landmarks | None, identity: Identity | None = None) -> Scores:
    """Look at a take. landmarks, identity: None where their packages are missing."""
    openings = head = faces = people = None
    jaw = take.jaw
    if landmarks is not None:
        points, true_points = landmarks.points(take.made), landmarks.points(take.truth)
        faces = float(found(points).mean())
        opening, true_opening = readable_opening(points), mouth_opening(true_points)
        openings = (opening, true_opening) if np.isfinite(true_opening).all() else None
        head = head_motion(points), head_motion(true_points)
        if identity is not None:
            own = landmarks.points(take.reference[None])
            home = identity.embed(take.reference, own[0])
            people = _far(identity, home, take.made, points), _far(identity, home, take.truth, true_points)
    if jaw is None:
        jaw = openings[1] if openings else np.zeros(len(take.truth), np.float32)
    return Scores(
        openings,
        jaw,
        head if head and np.isfinite(head).all() else None,
        faces,
        people if people and np.isfinite(people).all() else None,
        _both(edge_energy, take),
        _both(sharpness, take),
        _both(flicker, take),
        stillness_db(take.made, corners(*take.made.shape[1:3])),
    )


def readable_opening(points: Floats) -> Floats:
    """The opening of a made mouth; still where most frames have no face, since that is the checkpoint's failure."""
    return np.nan_to_num(mouth_opening(points))


def _both(measure: Callable[[Pixels], float], take: Take) -> tuple[float, float]:
    return measure(take.made), measure(take.truth)


def _far(identity: Identity, home: Floats | None, frames: Pixels, points: Floats) -> float:
    """Mean distance of some frames' embeddings from home's; NaN if there is no face to compare."""
    shown = [identity.embed(frames[i], points[i]) for i in range(0, len(frames), IDENTITY_STRIDE)]
    away = [float(np.linalg.norm(each - home)) for each in shown if each is not None and home is not None]
    return float(np.mean(away)) if away else float("nan")


def held_out_figures(scores: Sequence[Scores]) -> dict[str, Figure]:
    """Figures of all takes together."""
    heard = [(each.openings, each.jaw) for each in scores if each.openings is not None]
    faces = [each.faces for each in scores if each.faces is not None]
    heads = [each.head for each in scores if each.head is not None]
    pairs = [(openings[0], jaw) for openings, jaw in heard]
    unread = Figure(None, "the truth has too few faces" if faces else f"no landmarks: reading lips {MISSING}")
    people = [each.identity for each in scores if each.identity is not None]
    return {
        "lip_sync_r": mean_figure([correlation(*pair) for pair in pairs]) if pairs else unread,
        "best_lag_frames": lag_figure(pairs) if pairs else unread,
        "mouth_amplitude": ratio_figure([(float(a.std()), float(b.std())) for (a, b), _ in heard]) if heard else unread,
        "head_motion": ratio_figure(heads) if heads else unread,
        "edge_energy": ratio_figure([each.edges for each in scores]),
        "face_found": mean_figure(faces) if faces else unread,
        "identity_distance": _identity_figure(people),
        "sharpness": ratio_figure([each.sharpness for each in scores]),
        "flicker": ratio_figure([each.flicker for each in scores]),
        "background_db": mean_figure([each.stillness_db for each in scores]),
    }


def _identity_figure(people: Sequence[tuple[float, float]]) -> Figure:
    if not people:
        return Figure(None, f"no embeddings: comparing people {MISSING}")
    made, true = np.mean(people, axis=0).tolist()
    return Figure(made, f"true frames: {true:.2f}")


def other_figure(
    models: Models, clips: Sequence[StoredClip], scores: Sequence[Scores], landmarks: Landmarks | None, deadline: float
) -> Figure:
    """r of another sound: every clip's portrait says the next clip's, and is compared with its own clip's truth.

    deadline: no clip but the first three is begun after it, seconds of time.monotonic.
    """
    values = []
    triples = zip(clips, [*clips[1:], clips[0]], scores, strict=True)
    shown = tqdm(triples, "other sounds", len(clips), unit="clip", mininterval=5)
    for clip, other, own in until(shown, deadline):
        if own.openings is None or landmarks is None:
            continue
        made = pictured(models, models.picture(np.array(clip.array("reference"))), other)
        opening = readable_opening(landmarks.points(made))
        count = min(len(opening), len(own.jaw))
        values.append(correlation(opening[:count], own.jaw[:count]))
    return mean_figure(values) if values else Figure(None, "no faces were read")
