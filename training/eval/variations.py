"""Held-out clips rendered again: with another clip's audio, without the other person's audio, with other seeds.

Axes: f frames.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from training.data import StoredClip
from training.eval.behaviour import NO_FACES, Behaviour, listening_metric
from training.eval.held_out import ClipScores, render_clip, render_clip_session, rendered_opening
from training.eval.inference import Models, until
from training.eval.metrics import Metric, correlation, mean_metric, speaks
from training.eval.readers.eyes import EyeReader
from training.eval.readers.face_curves import FaceCurves, face_curves
from training.eval.readers.landmarks import Landmarks


def with_other_audio(
    models: Models,
    clips: Sequence[StoredClip],
    scores: Sequence[ClipScores],
    landmarks: Landmarks | None,
    eyes: EyeReader | None,
    deadline: float,
) -> dict[str, Metric]:
    """Return lip sync r and reactions with the wrong audio: each reference has the audio of the next clip of its kind.

    They are compared with the clip's own truth. deadline: seconds of time.monotonic; after it no clip is started,
    except the first three.
    """
    values, listeners = [], []
    progress = tqdm([*zip(clips, scores, strict=True)], "another's audio", unit="clip", mininterval=5)
    for clip, own in until(progress, deadline):
        if own.openings is None or landmarks is None:
            continue
        reference = models.picture(np.array(clip.array("reference")))
        frames, _ = render_clip_session(models, reference, next_of_kind(clip, clips))
        points = landmarks.points(frames)
        opening = rendered_opening(points)
        count = min(len(opening), len(own.jaw))
        if speaks(own.jaw):
            values.append(correlation(opening[:count], own.jaw[:count]))
        curves = face_curves(points, frames, eyes)
        if own.behaviour is not None and curves is not None and clip.has("speaking"):
            listeners.append(ending_together(own.behaviour, curves))
    return {
        "lip_sync_r_other": mean_metric(values) if values else NO_FACES,
        "listening_r_other": listening_metric(listeners) if listeners else NO_FACES,
    }


def next_of_kind(clip: StoredClip, clips: Sequence[StoredClip]) -> StoredClip:
    """Return the next of the clips that is of the same kind as one of them; the next one, if there is no other."""
    start = clips.index(clip)
    ordered = [*clips[start + 1 :], *clips[:start]] or [clip]
    return next((each for each in ordered if each.info.get("kind") == clip.info.get("kind")), ordered[0])


def ending_together(behaviour: Behaviour, rendered: FaceCurves) -> Behaviour:
    """Return the behaviour of other rendered frames than the clip's own, without the first frames that either lacks."""
    count = min(len(rendered.inner), behaviour.num_frames)
    return replace(behaviour, rendered=rendered.last(count), truth=behaviour.truth.last(count))


def without_the_other(
    models: Models, clips: Sequence[StoredClip], scores: Sequence[ClipScores], landmarks: Landmarks | None
) -> Metric:
    """Return how far lip sync r changes by the other person's audio, in clips in which both speak at once."""
    pairs = []
    for clip, own in zip(clips, scores, strict=True):
        if clip.info.get("kind") == "overlap" and clip.is_heard and own.openings is not None and landmarks is not None:
            opening = rendered_opening(landmarks.points(render_clip(models, clip, is_heard=False).rendered))
            pairs.append((correlation(own.openings[0], own.jaw), correlation(opening, own.jaw)))
    if not pairs:
        return Metric(None, "no clip in which both speak at once")
    given, alone = np.mean(pairs, axis=0)
    change = mean_metric([one - other for one, other in pairs])
    return replace(change, note=f"{given:.2f} with, {alone:.2f} without the other's audio {change.note}".rstrip())


def with_seeds(
    models: Models,
    clips: Sequence[StoredClip],
    scores: Sequence[ClipScores],
    landmarks: Landmarks | None,
    num_seeds: int,
    deadline: float,
) -> dict[str, Metric]:
    """Return the range of lip sync r over seeds, and how far heads differ by them, over how far they move in time.

    scores: with seed 0. deadline: as in `with_other_audio`.
    """
    values: list[list[float]] = []
    spreads: list[tuple[float, float]] = []
    progress = tqdm([*zip(clips, scores, strict=True)], "other seeds", unit="clip", mininterval=5)
    for clip, own in until(progress, deadline):
        if own.openings is None or own.behaviour is None or landmarks is None or num_seeds < 2:
            continue
        readings = [(own.openings[0], own.behaviour.rendered)]
        for seed in range(1, num_seeds):
            frames = render_clip(models, clip, seed).rendered
            points = landmarks.points(frames)
            if (curves := face_curves(points, frames)) is not None:
                readings.append((rendered_opening(points), curves))
        if len(readings) == num_seeds:
            values.append([correlation(opening, own.jaw) for opening, _ in readings])
            heads = np.stack([curves.head for _, curves in readings])
            spreads.append((float(heads.std(0).mean()), float(heads.std(1).mean())))
    if not values:
        return dict.fromkeys(("seed_spread", "head_diversity"), Metric(None, "only one seed, or no faces"))
    means = np.mean(values, axis=0)
    by_seed, in_time = np.mean(spreads, axis=0)
    listed = ", ".join(f"{each:.3f}" for each in means)
    return {
        "seed_spread": Metric(float(np.ptp(means)), f"r by seed: {listed}"),
        "head_diversity": Metric(float(by_seed / max(in_time, 1e-9))),
    }
