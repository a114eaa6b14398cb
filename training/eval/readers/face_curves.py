"""Curves of a face's motion from its landmarks: inner lips, head, brows.

Lengths are in distances between the eyes' outer corners, one scale for a whole clip: one per frame would add its error
to every value. Frames without a face are interpolated.

Axes: f frames, n mesh points.
"""

from dataclasses import dataclass

import numpy as np

from training.eval.readers.landmarks import LEFT_EYE, RIGHT_EYE, Floats, has_face

# Mesh points. Source: the canonical face model of MediaPipe.
INNER_LIPS = (13, 14)
NOSE_TIP = 1
# Corners of both eyes, bridge and tip of the nose: they move with the head alone.
RIGID = (33, 133, 362, 263, 6, 1)
# Brows, and corners of the eye below, of both sides.
BROWS, EYES = ((70, 63, 105, 66, 107), (300, 293, 334, 296, 336)), ((33, 133), (362, 263))


@dataclass(frozen=True, eq=False)
class FaceCurves:
    """Motion of a face in a clip.

    inner: (f,) opening between the inner lips. head: (f, 2) position of the head, right and down. nose: (f,) how far
    down the tip of the nose is, which a nod moves most. brow: (f,) height of the brows above the eyes.
    """

    inner: Floats
    head: Floats
    nose: Floats
    brow: Floats

    def last(self, count: int) -> "FaceCurves":
        """Return the curves of the last `count` frames."""
        return FaceCurves(**{name: curve[len(curve) - count :] for name, curve in vars(self).items()})


def face_curves(points: Floats) -> FaceCurves | None:
    """Read the curves of a clip from its mesh points (f, n, 2); None if most frames have no face."""
    filled = fill_missing(points)
    if filled is None:
        return None
    points = filled
    across = points[:, LEFT_EYE] - points[:, RIGHT_EYE]
    width = np.linalg.norm(across, axis=1)
    scale = np.median(width)
    down = np.stack([-across[:, 1], across[:, 0]], 1) / width[:, None]
    lifts = [
        ((points[:, eye].mean(1) - points[:, brow].mean(1)) * down).sum(1)
        for brow, eye in zip(BROWS, EYES, strict=True)
    ]
    return FaceCurves(
        inner=(np.linalg.norm(points[:, INNER_LIPS[1]] - points[:, INNER_LIPS[0]], axis=1) / scale).astype(np.float32),
        head=(points[:, RIGID].mean(1) / scale).astype(np.float32),
        nose=(points[:, NOSE_TIP, 1] / scale).astype(np.float32),
        brow=(np.mean(lifts, axis=0) / scale).astype(np.float32),
    )


def fill_missing(points: Floats) -> Floats | None:
    """Interpolate the points (f, n, 2) of frames without a face; None if most frames have none."""
    [seen] = has_face(points).nonzero()
    if len(seen) < 0.5 * len(points):
        return None
    place = np.interp(np.arange(len(points)), seen, np.arange(len(seen)))
    before = np.floor(place).astype(int)
    after, share = np.minimum(before + 1, len(seen) - 1), (place - before)[:, None, None]
    filled: Floats = ((1 - share) * points[seen[before]] + share * points[seen[after]]).astype(np.float32)
    return filled
