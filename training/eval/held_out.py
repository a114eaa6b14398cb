"""Held-out clips rendered by a checkpoint, compared with their true frames.

Axes: f pixel frames, H W height and width of frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from avatar.vae.vae import HIDDEN_FRAMES
from training.data import StoredClip
from training.eval.identity import Identity
from training.eval.inference import Audio, Models, Pixels, render_frames, until
from training.eval.landmarks import MISSING, Floats, Landmarks, has_face, head_motion, mouth_opening
from training.eval.metrics import (
    Metric,
    corners,
    correlation,
    edge_energy,
    flicker,
    lag_metric,
    mean_metric,
    ratio_metric,
    sharpness,
    stillness_db,
)

# Frames between two that are embedded.
IDENTITY_STRIDE = 24


@dataclass(frozen=True, eq=False)
class RenderedClip:
    """A clip rendered by a checkpoint, and its true frames at the same times.

    rendered, truth: (f, H, W, 3). reference: (H, W, 3), the session's picture.
    jaw: (f,) true opening of the jaw, or None if it is unknown.
    """

    rendered: Pixels
    truth: Pixels
    reference: Pixels
    jaw: Floats | None


def audio_of(clip: StoredClip) -> Audio:
    """Return all audio of a clip, (s,) at 16 kHz in [-1, 1]."""
    return clip.array("sound").astype(np.float32) / np.float32(32768)


def other_of(clip: StoredClip) -> Audio | None:
    """Return all audio of the other person in a clip, (s,) at 16 kHz in [-1, 1]; None if nobody is heard."""
    return clip.array("other").astype(np.float32) / np.float32(32768) if clip.is_heard else None


def render_clip(models: Models, clip: StoredClip) -> RenderedClip:
    """Render a clip from its reference and audio, including the audio before its frames."""
    reference = models.picture(np.array(clip.array("reference")))
    rendered = render_clip_frames(models, reference, clip)
    truth = clip.frames(slice(-len(rendered), None))
    if truth.shape != rendered.shape:
        truth = np.stack([models.picture(frame) for frame in truth])
    jaw = np.array(clip.array("jaw")[-len(rendered) :]) if clip.has("jaw") else None
    return RenderedClip(rendered, truth, reference, jaw)


def render_clip_frames(models: Models, reference: Pixels, clip: StoredClip) -> Pixels:
    """Render any person with a clip's audio: the frames (f, H, W, 3) at the times of the clip's.

    A stream's first HIDDEN_FRAMES frames are never shown, so a clip without audio before its frames returns fewer.
    """
    lead, end = clip.info["lead_frames"], clip.info["lead_frames"] + clip.num_frames
    num_blocks = -(-end // models.block_frames)
    frames = render_frames(models, reference, audio_of(clip), num_blocks, other_of(clip))
    return frames[max(0, lead - HIDDEN_FRAMES) : end - HIDDEN_FRAMES]


def render_speech(models: Models, reference: Pixels, audio: Audio) -> RenderedClip:
    """Render a person (H, W, 3) with any audio (s,) at 16 kHz. The still reference stands in for the unknown truth."""
    rendered = render_frames(models, reference, audio)
    return RenderedClip(rendered, np.broadcast_to(reference, rendered.shape), reference, None)


@dataclass(frozen=True, eq=False)
class ClipScores:
    """Measurements of a rendered clip. Pairs are of the rendered and of the true frames.

    openings: (f,) each, the measured opening of the mouth; None if the truth has too few faces.
    jaw: (f,) the curve to compare with: the true opening of the jaw if known, else the truth's measured opening.
    head: standard deviation of the head's position; None if either has no face.
    faces: share of rendered frames with a face; None without landmarks.
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


def score(clip: RenderedClip, landmarks: Landmarks | None, identity: Identity | None = None) -> ClipScores:
    """Measure a rendered clip. landmarks, identity: None where their packages are missing."""
    openings = head = faces = distances = None
    jaw = clip.jaw
    if landmarks is not None:
        points, true_points = landmarks.points(clip.rendered), landmarks.points(clip.truth)
        faces = float(has_face(points).mean())
        opening, true_opening = rendered_opening(points), mouth_opening(true_points)
        openings = (opening, true_opening) if np.isfinite(true_opening).all() else None
        head = head_motion(points), head_motion(true_points)
        if identity is not None:
            reference_points = landmarks.points(clip.reference[None])
            own = identity.embed(clip.reference, reference_points[0])
            distances = (
                _mean_distance(identity, own, clip.rendered, points),
                _mean_distance(identity, own, clip.truth, true_points),
            )
    if jaw is None:
        jaw = openings[1] if openings else np.zeros(len(clip.truth), np.float32)
    return ClipScores(
        openings,
        jaw,
        head if head and np.isfinite(head).all() else None,
        faces,
        distances if distances and np.isfinite(distances).all() else None,
        _of_both(edge_energy, clip),
        _of_both(sharpness, clip),
        _of_both(flicker, clip),
        stillness_db(clip.rendered, corners(*clip.rendered.shape[1:3])),
    )


def rendered_opening(points: Floats) -> Floats:
    """Return the opening of a rendered mouth; zeros if most frames have no face, which lowers the score."""
    return np.nan_to_num(mouth_opening(points))


def _of_both(measure: Callable[[Pixels], float], clip: RenderedClip) -> tuple[float, float]:
    return measure(clip.rendered), measure(clip.truth)


def _mean_distance(identity: Identity, own: Floats | None, frames: Pixels, points: Floats) -> float:
    """Return the mean distance of some frames' embeddings from `own`; NaN if there is no face to compare."""
    embeddings = [identity.embed(frames[i], points[i]) for i in range(0, len(frames), IDENTITY_STRIDE)]
    distances = [float(np.linalg.norm(each - own)) for each in embeddings if each is not None and own is not None]
    return float(np.mean(distances)) if distances else float("nan")


def held_out_metrics(scores: Sequence[ClipScores]) -> dict[str, Metric]:
    """Return the metrics of all clips together."""
    readable = [(each.openings, each.jaw) for each in scores if each.openings is not None]
    faces = [each.faces for each in scores if each.faces is not None]
    heads = [each.head for each in scores if each.head is not None]
    curves = [(openings[0], jaw) for openings, jaw in readable]
    amplitudes = [(float(rendered.std()), float(true.std())) for (rendered, true), _ in readable]
    unread = Metric(None, "the truth has too few faces" if faces else f"no landmarks: reading lips {MISSING}")
    return {
        "lip_sync_r": mean_metric([correlation(*pair) for pair in curves]) if curves else unread,
        "best_lag_frames": lag_metric(curves) if curves else unread,
        "mouth_amplitude": ratio_metric(amplitudes) if amplitudes else unread,
        "head_motion": ratio_metric(heads) if heads else unread,
        "edge_energy": ratio_metric([each.edges for each in scores]),
        "face_found": mean_metric(faces) if faces else unread,
        "identity_distance": _identity_metric([each.identity for each in scores if each.identity is not None]),
        "sharpness": ratio_metric([each.sharpness for each in scores]),
        "flicker": ratio_metric([each.flicker for each in scores]),
        "background_db": mean_metric([each.stillness_db for each in scores]),
    }


def _identity_metric(distances: Sequence[tuple[float, float]]) -> Metric:
    if not distances:
        return Metric(None, f"no embeddings: comparing people {MISSING}")
    rendered, true = np.mean(distances, axis=0).tolist()
    return Metric(rendered, f"true frames: {true:.2f}")


def mismatched_sync(
    models: Models,
    clips: Sequence[StoredClip],
    scores: Sequence[ClipScores],
    landmarks: Landmarks | None,
    deadline: float,
) -> Metric:
    """Return lip sync r with the wrong audio: each clip's reference speaks the next clip's, compared with its own jaw.

    deadline: seconds of time.monotonic; after it no clip is started, except the first three.
    """
    values = []
    triples = zip(clips, [*clips[1:], clips[0]], scores, strict=True)
    progress = tqdm(triples, "mismatched audio", len(clips), unit="clip", mininterval=5)
    for clip, other, own in until(progress, deadline):
        if own.openings is None or landmarks is None:
            continue
        rendered = render_clip_frames(models, models.picture(np.array(clip.array("reference"))), other)
        opening = rendered_opening(landmarks.points(rendered))
        count = min(len(opening), len(own.jaw))
        values.append(correlation(opening[:count], own.jaw[:count]))
    return mean_metric(values) if values else Metric(None, "no faces were found")
