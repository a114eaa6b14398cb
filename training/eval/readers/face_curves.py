"""Curves of a face's motion from its landmarks and frames: inner lips, head, lids, brows.

Lengths are in distances between the eyes' outer corners, one scale for a whole clip: one per frame would add its error
to every value. Frames without a face are interpolated.

Axes: f frames, n mesh points, h w height and width of frames.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.eval.readers.eyes import EyeReader
from training.eval.readers.landmarks import LEFT_EYE, RIGHT_EYE, Floats, has_face

# Mesh points. Source: the canonical face model of MediaPipe.
INNER_LIPS = (13, 14)
NOSE_TIP = 1
# Corners of both eyes, bridge and tip of the nose: they move with the head alone.
RIGID = (33, 133, 362, 263, 6, 1)
# Distances that the tip of the nose moves for each radian of a head that turns about its neck. On true frames of 30
# held-out people, r with the stored pitch is .98, with yaw .97 and of the eyes' line with roll .81.
NOSE_PER_RADIAN = 2.0


@dataclass(frozen=True, eq=False)
class FaceCurves:
    """Motion of a face in a clip.

    inner: (f,) opening between the inner lips. head: (f, 2) position of the head, right and down. rotation: (f, 3)
    pitch (positive looks down), yaw (positive to the right) and roll of the head in radians, each with an offset.
    lids, brow: (f,) 0 to 1, how far lids are closed and brows raised; None without a reader.
    """

    inner: Floats
    head: Floats
    rotation: Floats
    lids: Floats | None = None
    brow: Floats | None = None

    def last(self, count: int) -> "FaceCurves":
        """Return the curves of the last `count` frames."""
        lids, brow = (each if each is None else each[-count:] for each in (self.lids, self.brow))
        return FaceCurves(self.inner[-count:], self.head[-count:], self.rotation[-count:], lids, brow)


def face_curves(points: Floats, frames: NDArray[np.uint8], eyes: EyeReader | None = None) -> FaceCurves | None:
    """Read the curves of a clip from its mesh points (f, n, 2) and frames (f, h, w, 3).

    None if most frames have no face. eyes: None leaves out lids and brows.
    """
    filled = fill_missing(points)
    if filled is None:
        return None
    scale = np.median(np.linalg.norm(filled[:, LEFT_EYE] - filled[:, RIGHT_EYE], axis=1))
    upper, lower = filled[:, INNER_LIPS].swapaxes(0, 1)
    lids, brow = (None, None) if eyes is None else eyes.read(frames, filled)
    return FaceCurves(
        inner=np.linalg.norm(lower - upper, axis=1) / scale,
        head=filled[:, RIGID].mean(1) / scale,
        rotation=rotation_of(filled, scale),
        lids=lids,
        brow=brow,
    )


def rotation_of(points: Floats, scale: float) -> Floats:
    """Return pitch, yaw and roll of a head, (f, 3), from its mesh points (f, n, 2). scale: distance of the eyes."""
    right, down = (points[:, NOSE_TIP] / scale / NOSE_PER_RADIAN).T
    across, below = (points[:, LEFT_EYE] - points[:, RIGHT_EYE]).T
    return np.stack([down, right, np.arctan2(-below, across)], 1)


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
