"""Metrics of behaviour: lips that close, a head that moves like a head, and a person who listens.

Curves of rendered frames are compared with those that the same readers read from the true frames, or with the truth.

Axes: f frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from training.data import FRAME_RATE_HZ, StoredClip
from training.eval.metrics import Curve, Metric, correlation, ratio_metric
from training.eval.readers.face_curves import FaceCurves
from training.synthetic.motion.curves import smooth

BILABIALS = frozenset("pbm")
# Shares of the true clip's range of openings: lips below the first are closed. A phone counts if the true lips close at
# it, and are open beyond the second share within OPEN_WITHIN frames: a mouth at rest closes nothing.
CLOSED, OPEN, OPEN_WITHIN = 0.25, 0.4, 8
# Frames around speech in which lips still move.
SPEECH_MARGIN = 6
# Half a second.
LAG = 12
# Deviations, in frames, of the band of nods and of the envelope whose times are compared: reactions are late by a
# random 0.3 to 1 s, so single dips agree only by chance.
NOD_BAND, ENVELOPE = (1.5, 5.0), 8.0
# Lids that are closed so far blink.
BLINK = 0.5
# A reaction to the end of a phrase is expected within these frames after it, 0.3 to 1.1 s; its strength at the end is
# the mean from PHRASE_END[0] frames before it to PHRASE_END[1] after it. Deviation in frames of the curves' blur.
REACTION, PHRASE_END, BLUR = (8, 28), (3, 5), 1.5
# Ranges below which nobody reacts: radians of pitch, share of raised brows.
LEAST = {"nod": 0.02, "brow": 0.1}
AXES = ("pitch", "yaw", "roll")
# A given curve with a smaller deviation is left out of the r that tells if faces follow it.
FOLLOWED = 0.01
NO_TRUTH = Metric(None, "needs clips with the truth about speech")
NO_EYES = Metric(None, "needs a reader: --eye-reader, which training.eval.readers.eyes trains")
NO_FACES = Metric(None, "no faces were read")

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Behaviour:
    """Curves of a rendered clip; all have its f frames.

    rendered, truth: read from the frames. clip: the true clip, which ends with these frames. first_frame: number of the
    first of them in the stream. block_frames: of a block. given: (m, f) face motion that the network was given for the
    rendered frames, or more frames before them; None if it takes none.
    """

    rendered: FaceCurves
    truth: FaceCurves
    clip: StoredClip
    first_frame: int
    block_frames: int
    given: Curve | None = None

    @property
    def num_frames(self) -> int:
        return len(self.rendered.inner)

    def true(self, name: str) -> Curve:
        """Return the truth of a name, (f, ...)."""
        return np.array(self.clip.array(name)[-self.num_frames :], np.float32)

    def speaking(self, who: int) -> Mask:
        """Return the frames (f,) in which the person (0) or the other (1) speaks."""
        spoken: Mask = self.true("speaking")[:, who] > 0.5
        return spoken


def behaviour_metrics(clips: Sequence[Behaviour]) -> dict[str, Metric]:
    """Return the metrics of clips together, without those of another's audio."""
    if not clips:
        keys = ("inner_lips", "closure_recall", "mouth_silent", "mouth_listening", "border_motion", "head_smoothness")
        more = ("head_rotation", "motion_followed", "blinks", "listening_r", "response", "response_latency")
        return dict.fromkeys((*keys, *more), NO_FACES)
    spoken = [each for each in clips if each.clip.has("speaking")]
    return {
        "inner_lips": ratio_metric([(float(c.rendered.inner.std()), float(c.truth.inner.std())) for c in clips]),
        "closure_recall": closure_metric(clips),
        "mouth_silent": stillness_metric(spoken, listening=False),
        "mouth_listening": stillness_metric(spoken, listening=True),
        "border_motion": border_metric(clips),
        "head_smoothness": smoothness_metric(clips),
        "head_rotation": rotation_metric(clips),
        "motion_followed": followed_metric(clips),
        "blinks": blink_metric(clips),
        "listening_r": listening_metric(spoken),
        **response_metrics(spoken),
    }


def closure_metric(clips: Sequence[Behaviour]) -> Metric:
    """Return the share of the closures at p, b and m that are closed in the rendered clips, too."""
    closed = [closed_lips for clip in clips for closed_lips in closures(clip)]
    return Metric(float(np.mean(closed)), f"of {len(closed)}") if closed else NO_TRUTH


def closures(clip: Behaviour) -> list[bool]:
    """Return for each closure of the true lips at a bilabial phone, if the rendered lips close there, too.

    Lips that are shut all the time close nothing.
    """
    phones = clip.clip.info.get("phones", [])
    hidden = clip.clip.num_frames - clip.num_frames
    low, high = np.percentile(clip.truth.inner, (5, 95))
    found = []
    for (onset, phone), (end, _) in pairwise(phones):
        if not BILABIALS & set(phone):
            continue
        first, last = (int(np.floor(time * FRAME_RATE_HZ)) - hidden for time in (onset, end))
        if first - 1 < 0 or last + 1 >= clip.num_frames:
            continue
        during, around = slice(first - 1, last + 2), slice(max(0, first - OPEN_WITHIN), last + OPEN_WITHIN)
        truth, rendered = (
            bool(inner[during].min() < low + CLOSED * (high - low) and inner[around].max() > low + OPEN * (high - low))
            for inner in (clip.truth.inner, clip.rendered.inner)
        )
        if truth:
            found.append(rendered)
    return found


def stillness_metric(clips: Sequence[Behaviour], *, listening: bool) -> Metric:
    """Return the motion of lips that say nothing, beyond that of true ones, over that of true lips that speak.

    Per frame. True lips at rest seem to move, because the mesh trembles. listening: only while the other speaks.
    """
    means = []
    for curves in ([each.rendered for each in clips], [each.truth for each in clips]):
        quiet, busy = np.zeros(2), np.zeros(2)
        for clip, read in zip(clips, curves, strict=True):
            motion = np.abs(np.diff(smooth(read.inner[:, None], 1.0)[:, 0]))
            speaks = clip.speaking(0)
            silent = ~widened(speaks, SPEECH_MARGIN) & (clip.speaking(1) if listening else True)
            for sums, frames in ((quiet, silent), (busy, speaks)):
                sums += motion[frames[1:]].sum(), frames[1:].sum()
        if not quiet[1] or not busy[1]:
            return NO_TRUTH
        means.append((quiet[0] / quiet[1], busy[0] / busy[1]))
    (rendered, _), (true, speech) = means
    note = f"with the mesh's tremble {rendered / speech:.2f}, true frames {true / speech:.2f}"
    return Metric(float((rendered - true) / speech), note)


def widened(frames: Mask, margin: int) -> Mask:
    """Return the frames (f,) that are within a margin of those given."""
    wide: Mask = np.convolve(frames, np.ones(2 * margin + 1), "same") > 0
    return wide


def blink_rate(lids: Curve) -> float:
    """Return the blinks a minute of a curve (f,) of how far lids are closed."""
    rises = (lids[1:] >= BLINK) & (lids[:-1] < BLINK)
    return float(rises.sum()) * 60 * FRAME_RATE_HZ / len(lids)


def blink_metric(clips: Sequence[Behaviour]) -> Metric:
    """Return the blinks of the rendered clips over those of the true ones."""
    pairs = [
        (blink_rate(clip.rendered.lids), blink_rate(clip.truth.lids))
        for clip in clips
        if clip.rendered.lids is not None and clip.truth.lids is not None
    ]
    if not pairs:
        return NO_EYES
    rendered, true = np.mean(pairs, axis=0).tolist()
    note = f"{rendered:.0f} a minute, true frames {true:.0f}"
    return Metric(rendered / true, note) if true else Metric(None, "nobody blinks in the true frames")


def border_metric(clips: Sequence[Behaviour]) -> Metric:
    """Return the motion of heads from block to block over that within blocks."""
    ratios = []
    for curves in ([each.rendered for each in clips], [each.truth for each in clips]):
        at_borders, inside = [], []
        for clip, read in zip(clips, curves, strict=True):
            steps = np.linalg.norm(np.diff(read.head, axis=0), axis=1)
            starts_block = np.arange(clip.first_frame + 1, clip.first_frame + clip.num_frames) % clip.block_frames == 0
            at_borders.append(steps[starts_block])
            inside.append(steps[~starts_block])
        still = np.concatenate(inside).mean()
        if not still > 0:
            return Metric(None, "heads do not move")
        ratios.append(float(np.concatenate(at_borders).mean() / still))
    return Metric(ratios[0], f"true frames: {ratios[1]:.2f}")


def smoothness_metric(clips: Sequence[Behaviour]) -> Metric:
    """Return the autocorrelation of heads' positions at half a second, a mean over both directions."""
    values = []
    for curves in ([each.rendered for each in clips], [each.truth for each in clips]):
        values.append([correlation(read.head[:-LAG, i], read.head[LAG:, i]) for read in curves for i in range(2)])
    return Metric(float(np.mean(values[0])), f"true frames: {np.mean(values[1]):.2f}")


def rotation_metric(clips: Sequence[Behaviour]) -> Metric:
    """Return the deviation of heads' rotation in time over that of true frames, a mean over the axes."""
    sums = np.sum([[read.rotation.std(0) for read in (clip.rendered, clip.truth)] for clip in clips], axis=0)
    if not (sums[1] > 0).all():
        return Metric(None, "true heads do not turn")
    ratios = (sums[0] / sums[1]).tolist()
    note = ", ".join(f"{axis} {ratio:.2f}" for axis, ratio in zip(AXES, ratios, strict=True))
    posed = [clip for clip in clips if clip.clip.has("pose")]
    if posed:
        found = np.mean([correlations(clip.truth.rotation, clip.true("pose")) for clip in posed], axis=0)
        note += f"; reader's r with the stored truth {', '.join(f'{r:.2f}' for r in found)}"
    return Metric(float(np.mean(ratios)), note)


def correlations(one: Curve, two: Curve) -> list[float]:
    """Return r of each of several curves, (f, e) each."""
    return [correlation(*pair) for pair in zip(one.T, two.T, strict=True)]


def followed_metric(clips: Sequence[Behaviour]) -> Metric:
    """Return r of the face's motion with that which the network was given, a mean over lids and the head's axes."""
    found: dict[str, list[float]] = {}
    for clip in clips:
        if clip.given is None:
            continue
        lids = np.zeros(clip.num_frames) if clip.rendered.lids is None else clip.rendered.lids
        given = clip.given[: 1 + len(AXES), -clip.num_frames :]
        read = [lids, *clip.rendered.rotation.T]
        for name, curve, asked in zip(("lids", *AXES), read, given, strict=True):
            if asked.std() > FOLLOWED and not (name == "lids" and clip.rendered.lids is None):
                found.setdefault(name, []).append(correlation(curve, asked))
    if not found:
        return Metric(None, "no face motion was given")
    means = {name: float(np.mean(each)) for name, each in found.items()}
    return Metric(float(np.mean([*means.values()])), ", ".join(f"{name} {r:.2f}" for name, r in means.items()))


def listening_metric(clips: Sequence[Behaviour]) -> Metric:
    """Return r of nods and brows with the truth while the person listens, a mean over both."""
    means, notes = [], []
    for name in LEAST:
        pairs = [
            (reaction_r(clip, clip.rendered, name), reaction_r(clip, clip.truth, name))
            for clip in clips
            if clip.clip.has(name) and reacts(clip, name) and (name == "nod" or clip.rendered.brow is not None)
        ]
        if pairs:
            rendered, true = np.mean(pairs, axis=0)
            means.append(rendered)
            notes.append(f"{name} {rendered:.2f} of {len(pairs)}, true frames {true:.2f}")
    return Metric(float(np.mean(means)), "; ".join(notes)) if means else NO_TRUTH


def listens(clip: Behaviour) -> Mask:
    """Return the frames (f,) in which the person does not speak."""
    return ~widened(clip.speaking(0), SPEECH_MARGIN)


def reacts(clip: Behaviour, name: str) -> bool:
    """Return True if the person nods, or raises brows, while they listen."""
    frames, heard = listens(clip), clip.speaking(1)
    if heard.sum() < FRAME_RATE_HZ or frames.sum() < 2 * FRAME_RATE_HZ:
        return False
    return bool(np.ptp(clip.true(name)[frames]) > LEAST[name])


def reaction_r(clip: Behaviour, read: FaceCurves, name: str) -> float:
    """Return r of a reaction's envelope with that of its truth, over the frames in which the person listens."""
    frames = listens(clip)
    if name == "nod":
        return correlation(nod_envelope(read.rotation[:, 0])[frames], nod_envelope(clip.true("nod"))[frames])
    assert read.brow is not None
    return correlation(envelope(read.brow)[frames], envelope(clip.true("brow"))[frames])


def nod_envelope(curve: Curve) -> Curve:
    """Return the envelope (f,) of nods, from the pitch of the head."""
    return envelope(nods(curve))


def nods(pitch: Curve) -> Curve:
    """Return the strength of motion in the band of nods, (f,)."""
    fast, slow = (blurred(pitch, deviation) for deviation in NOD_BAND)
    return np.abs(fast - slow)


def envelope(curve: Curve) -> Curve:
    return blurred(curve, ENVELOPE)


def blurred(curve: Curve, deviation: float) -> Curve:
    """Blur a curve (f,). deviation: in frames."""
    values: Curve = smooth(np.asarray(curve, np.float64)[:, None], deviation)[:, 0]
    return values


def response_metrics(clips: Sequence[Behaviour]) -> dict[str, Metric]:
    """Return how much more people nod after the other's phrases than at their ends, over true frames, and when.

    response: 1 as true people do, 0 without a relation. response_latency: seconds from the end of a phrase to the peak.
    Brows are in the notes: they rise in fewer of the answers, and their reader is less exact.
    """
    values, notes, latencies = [], [], []
    for name in LEAST:
        read = [clip for clip in clips if clip.clip.has(name) and (name == "nod" or clip.rendered.brow is not None)]
        (rendered, count), (true, _) = (
            mean_response(read, [getattr(clip, kind) for clip in read], name) for kind in ("rendered", "truth")
        )
        span = slice(*REACTION)
        if not count or not true[span].mean() > 0:
            continue
        values.append(float(rendered[span].mean() / true[span].mean()))
        latencies.append([float(blurred(each, BLUR).argmax()) / FRAME_RATE_HZ for each in (rendered, true)])
        notes.append(f"{name} {values[-1]:.2f} after {count} phrases, peaks at {latencies[-1][0]:.2f} s")
    if not values:
        return dict.fromkeys(("response", "response_latency"), NO_TRUTH)
    return {
        "response": Metric(values[0], "; ".join(notes)),
        "response_latency": Metric(latencies[0][0], f"true frames: {latencies[0][1]:.2f}"),
    }


def mean_response(clips: Sequence[Behaviour], curves: Sequence[FaceCurves], name: str) -> tuple[Curve, int]:
    """Return the rise of a reaction's strength after the ends of the other's phrases, (frames,), and their number."""
    sums, counts, count = np.zeros(REACTION[1]), np.zeros(REACTION[1]), 0
    for clip, read in zip(clips, curves, strict=True):
        assert name == "nod" or read.brow is not None
        strength = nods(read.rotation[:, 0]) if read.brow is None or name == "nod" else blurred(read.brow, BLUR)
        listening, heard = listens(clip), clip.speaking(1)
        for end in (np.flatnonzero(heard[:-1] & ~heard[1:]) + 1).tolist():
            after = slice(end, min(end + REACTION[1], clip.num_frames))
            if not listening[after][REACTION[0] :].any():
                continue
            at_end = strength[max(0, end - PHRASE_END[0]) : end + PHRASE_END[1]].mean()
            used = listening[after]
            sums[: len(used)] += (strength[after] - at_end) * used
            counts[: len(used)] += used
            count += 1
    return sums / np.maximum(counts, 1), count
