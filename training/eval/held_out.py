"""Held-out clips rendered by a checkpoint, compared with their true frames.

Axes: f pixel frames, H W height and width of frames.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from avatar.vae.vae import HIDDEN_FRAMES
from training.data import StoredClip
from training.eval.behaviour import Behaviour, behaviour_metrics
from training.eval.inference import Audio, Models, Pixels, render_frames, render_session
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
    speaks,
    stillness_db,
)
from training.eval.readers.eyes import EyeReader
from training.eval.readers.face_curves import face_curves
from training.eval.readers.identity import Identity
from training.eval.readers.landmarks import MISSING, Floats, Landmarks, has_face, head_motion, mouth_opening

# Frames between two that are embedded.
IDENTITY_STRIDE = 24


@dataclass(frozen=True, eq=False)
class RenderedClip:
    """A clip rendered by a checkpoint, and its true frames at the same times.

    rendered, truth: (f, H, W, 3). reference: (H, W, 3), the session's picture.
    jaw: (f,) true opening of the jaw, or None if it is unknown.
    clip: the true clip, or None for other audio. first_frame: number of the first frame in the stream.
    given: (m, f) face motion that the network was given for the frames; None if it takes none.
    """

    rendered: Pixels
    truth: Pixels
    reference: Pixels
    jaw: Floats | None
    clip: StoredClip | None = None
    first_frame: int = 0
    block_frames: int = 0
    given: Floats | None = None


def audio_of(clip: StoredClip) -> Audio:
    """Return all audio of a clip, (s,) at 16 kHz in [-1, 1]."""
    return clip.array("sound").astype(np.float32) / np.float32(32768)


def other_of(clip: StoredClip) -> Audio | None:
    """Return all audio of the other person in a clip, (s,) at 16 kHz in [-1, 1]; None if nobody is heard."""
    return clip.array("other").astype(np.float32) / np.float32(32768) if clip.is_heard else None


def render_clip(models: Models, clip: StoredClip, seed: int = 0, *, is_heard: bool = True) -> RenderedClip:
    """Render a clip from its reference and audio, including the audio before its frames.

    is_heard: False leaves out the audio of the other person.
    """
    reference = models.picture(np.array(clip.array("reference")))
    rendered, given = render_clip_session(models, reference, clip, seed, is_heard=is_heard)
    truth = clip.frames(slice(-len(rendered), None))
    if truth.shape != rendered.shape:
        truth = np.stack([models.picture(frame) for frame in truth])
    jaw = np.array(clip.array("jaw")[-len(rendered) :]) if clip.has("jaw") else None
    first_frame = clip.info["lead_frames"] + clip.num_frames - len(rendered)
    return RenderedClip(rendered, truth, reference, jaw, clip, first_frame, models.block_frames, given)


def session_seed(clip: StoredClip, seed: int) -> int:
    """Return the seed of the session that renders a clip.

    Each clip has its own: with one for all, everybody blinks in the same frames, 37 times a minute in those that clips
    of 4.8 s show of seed 0, where the same people blink 20 times with seeds of their own.
    """
    return zlib.crc32(f"{clip.name}/{seed}".encode())


def render_clip_session(
    models: Models, reference: Pixels, clip: StoredClip, seed: int = 0, *, is_heard: bool = True
) -> tuple[Pixels, Floats | None]:
    """Render any person with a clip's audio: the frames (f, H, W, 3) at the times of the clip's, and face motion.

    A stream's first HIDDEN_FRAMES frames are never shown, so a clip without audio before its frames returns fewer.
    """
    lead, end = clip.info["lead_frames"], clip.info["lead_frames"] + clip.num_frames
    num_blocks = -(-end // models.block_frames)
    other = other_of(clip) if is_heard else None
    own_seed = session_seed(clip, seed)
    frames, given = render_session(models, reference, audio_of(clip), num_blocks, other, own_seed)
    span = slice(max(0, lead - HIDDEN_FRAMES), end - HIDDEN_FRAMES)
    return frames[span], None if given is None else given[:, span]


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
    embeddings: of the reference (128,), and of some rendered frames (n, 128); None as for identity.
    behaviour: None for other audio than a clip's, and without faces.
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
    embeddings: tuple[Floats, Floats] | None = None
    behaviour: Behaviour | None = None


def score(
    clip: RenderedClip,
    landmarks: Landmarks | None,
    identity: Identity | None = None,
    eyes: EyeReader | None = None,
) -> ClipScores:
    """Measure a rendered clip. landmarks, identity, eyes: None where their packages or weights are missing."""
    openings = head = faces = distances = embeddings = behaviour = None
    jaw = clip.jaw
    if landmarks is not None:
        points, true_points = landmarks.points(clip.rendered), landmarks.points(clip.truth)
        faces = float(has_face(points).mean())
        opening, true_opening = rendered_opening(points), mouth_opening(true_points)
        openings = (opening, true_opening) if np.isfinite(true_opening).all() else None
        head = head_motion(points), head_motion(true_points)
        if identity is not None:
            [reference_points] = landmarks.points(clip.reference[None])
            embeddings = _embeddings(identity, clip, (points, true_points), reference_points)
            if embeddings is not None:
                own, rendered, true = embeddings
                distances = distance_to(own, rendered), distance_to(own, true)
        if clip.clip is not None:
            curves = face_curves(points, clip.rendered, eyes)
            true_curves = face_curves(true_points, clip.truth, eyes)
            if curves is not None and true_curves is not None:
                behaviour = Behaviour(curves, true_curves, clip.clip, clip.first_frame, clip.block_frames, clip.given)
    if jaw is None:
        jaw = openings[1] if openings else np.zeros(len(clip.truth), np.float32)
    return ClipScores(
        openings,
        jaw,
        head if head and np.isfinite(head).all() else None,
        faces,
        distances,
        _of_both(edge_energy, clip),
        _of_both(sharpness, clip),
        _of_both(flicker, clip),
        stillness_db(clip.rendered, corners(*clip.rendered.shape[1:3])),
        embeddings and embeddings[:2],
        behaviour,
    )


def rendered_opening(points: Floats) -> Floats:
    """Return the opening of a rendered mouth; zeros if most frames have no face, which lowers the score."""
    return np.nan_to_num(mouth_opening(points))


def _of_both(measure: Callable[[Pixels], float], clip: RenderedClip) -> tuple[float, float]:
    return measure(clip.rendered), measure(clip.truth)


def _embeddings(
    identity: Identity, clip: RenderedClip, points: tuple[Floats, Floats], reference_points: Floats
) -> tuple[Floats, Floats, Floats] | None:
    """Return the embeddings of the reference (128,), and of some rendered and some true frames (n, 128).

    None if any of them has no face.
    """
    own = identity.embed(clip.reference, reference_points)
    both = []
    for frames, places in zip((clip.rendered, clip.truth), points, strict=True):
        found = [identity.embed(frames[i], places[i]) for i in range(0, len(frames), IDENTITY_STRIDE)]
        both.append([each for each in found if each is not None])
    if own is None or not all(both):
        return None
    return own, np.stack(both[0]), np.stack(both[1])


def distance_to(own: Floats, embeddings: Floats) -> float:
    """Return the mean distance of embeddings (n, 128) from a reference's (128,)."""
    return float(np.linalg.norm(embeddings - own, axis=1).mean())


def held_out_metrics(scores: Sequence[ClipScores]) -> dict[str, Metric]:
    """Return the metrics of all clips together."""
    readable = [(each.openings, each.jaw) for each in scores if each.openings is not None]
    faces = [each.faces for each in scores if each.faces is not None]
    heads = [each.head for each in scores if each.head is not None]
    curves = [(openings[0], jaw) for openings, jaw in readable if speaks(jaw)]
    amplitudes = [(float(rendered.std()), float(true.std())) for (rendered, true), _ in readable]
    unread = Metric(None, "the truth has too few faces" if faces else f"no landmarks: reading lips {MISSING}")
    return {
        "lip_sync_r": mean_metric([correlation(*pair) for pair in curves]) if curves else unread,
        "best_lag_frames": lag_metric(curves) if curves else unread,
        "mouth_amplitude": ratio_metric(amplitudes) if amplitudes else unread,
        "head_motion": ratio_metric(heads) if heads else unread,
        "edge_energy": ratio_metric([each.edges for each in scores]),
        "face_found": mean_metric(faces) if faces else unread,
        **_identity_metrics(scores),
        **behaviour_metrics([each.behaviour for each in scores if each.behaviour is not None]),
        "sharpness": ratio_metric([each.sharpness for each in scores]),
        "flicker": ratio_metric([each.flicker for each in scores]),
        "background_db": mean_metric([each.stillness_db for each in scores]),
    }


def _identity_metrics(scores: Sequence[ClipScores]) -> dict[str, Metric]:
    """Return the mean and the greatest distance to the reference, and the least margin to other people's references."""
    distances = [each.identity for each in scores if each.identity is not None]
    if not distances:
        missing = Metric(None, f"no embeddings: comparing people {MISSING}")
        return dict.fromkeys(("identity_distance", "identity_worst", "identity_margin"), missing)
    (rendered, true), worst = np.mean(distances, axis=0).tolist(), np.max(distances, axis=0).tolist()
    people = [each.embeddings for each in scores if each.embeddings is not None]
    margins = [
        min(distance_to(other, rendered) for other, _ in people if other is not own) - distance_to(own, rendered)
        for own, rendered in people
        if len(people) > 1
    ]
    return {
        "identity_distance": Metric(rendered, f"true frames: {true:.2f}"),
        "identity_worst": Metric(worst[0], f"true frames: {worst[1]:.2f}"),
        "identity_margin": Metric(min(margins)) if margins else Metric(None, "needs several people"),
    }
