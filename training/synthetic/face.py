"""One person's head in front of a camera: the mesh of an expression, and its projection to the picture.

Axes: n mesh vertices, m drawn vertices, f frames.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from training.synthetic.head import Floats, Head, Part
from training.synthetic.person import Person

# Half the camera's angle of view, in degrees.
HALF_VIEW = 8.4
# Scale and shift of the pack's teeth, so that the inside of the mouth is visible at 128 pixels.
TEETH_SCALE = np.array((0.84, 0.95, 0.95), np.float32)
UPPER_TEETH_SHIFT = np.array((0, -0.055, -0.07), np.float32)
LOWER_TEETH_SHIFT = np.array((0, -0.02, -0.075), np.float32)
# A flatter tongue leaves a dark cavity above it.
TONGUE_SCALE = np.array((1, 0.62, 0.95), np.float32)
TONGUE_SHIFT = np.array((0, -0.02, -0.05), np.float32)
CAP_LIFT = 0.015
# Height above the hairline at which the hair has its full volume.
EDGE_HEIGHT = 0.5


@dataclass(frozen=True, eq=False)
class Motion:
    """Motion of a face, frame by frame.

    weights: (f, 52) of the expressions, 0 to 1, in the pack's order. turn: (f, 3) nod, turn and tilt of the head in
    radians. gaze: (f, 2) right and up as the viewer sees it, -1 to 1.
    """

    weights: Floats
    turn: Floats
    gaze: Floats

    def __len__(self) -> int:
        return len(self.weights)

    def frames(self) -> Iterator[tuple[Floats, Floats, Floats]]:
        """Yield weights, turn and gaze of each frame."""
        return zip(self.weights, self.turn, self.gaze, strict=True)


class Face:
    """A person at rest, and a camera in front of them.

    camera: (4, 4) matrix from points (x, y, z, 1) to clip coordinates. eye: position of the camera.
    """

    def __init__(self, head: Head, person: Person) -> None:
        self.head = head
        self.person = person
        mesh = person.mesh[head.unique]
        part = head.part[: len(mesh)]
        self._arrange_mouth(mesh, part)
        self.base = np.concatenate([mesh, self._curtain(mesh, part)]).astype(np.float32)
        eyes = float(mesh[part == Part.EYES][:, 1].mean())
        lips = float(mesh[head.mask[: len(mesh), 0] > 0.5][:, 1].mean())
        self._pivot = np.array((0, lips - 0.55, 0.05), np.float32)
        self.camera, self.eye = camera(eyes, lips)
        self._lips = head.mask[:, 0] > 0.5
        # The hair's volume falls to zero at its edge, else the background shows between hair and temple.
        rooted = np.clip(above_hairline(head.rest, person.look["hairline"]) / EDGE_HEIGHT, 0, 1)
        lift = head.puff * np.float32(person.puff) * rooted + head.has_cap * np.float32(CAP_LIFT)
        self._lift = lift[:, None].astype(np.float32)

    def _arrange_mouth(self, mesh: Floats, part: Floats) -> None:
        jaw = self.head.shapes[self.head.shape_names.index("jawOpen")].reshape(-1, 3)[self.head.unique, 1]
        for row, shift in ((jaw == 0, UPPER_TEETH_SHIFT), (jaw != 0, LOWER_TEETH_SHIFT)):
            teeth = (part == Part.TEETH) & row
            middle = mesh[teeth].mean(0)
            mesh[teeth] = (mesh[teeth] - middle) * TEETH_SCALE + middle + shift
        tongue = mesh[part == Part.TONGUE]
        low = tongue.min(0)
        mesh[part == Part.TONGUE] = (tongue - low) * TONGUE_SCALE + low + TONGUE_SHIFT

    def _curtain(self, mesh: Floats, part: Floats) -> Floats:
        """Fit the sheet of hair to this head's skull. Without one, all its vertices are one point inside the head."""
        head, person = self.head, self.person
        cap, plain_cap = mesh[part == Part.HAIR], head.base[head.unique[part == Part.HAIR]]
        if person.curtain is None:
            sheet = np.tile(np.array((0, 7.4, 0.3), np.float32), (head.curtain.NUM_VERTICES, 1))
        else:
            sheet = head.curtain.vertices(*person.curtain)
        moved: Floats = (sheet - plain_cap.mean(0)) * (np.ptp(cap, axis=0) / np.ptp(plain_cap, axis=0)) + cap.mean(0)
        return moved

    def pose(self, weights: Floats, turn: Floats, gaze: Floats) -> tuple[Floats, Floats]:
        """Return positions and unit normals (m, 3) of one frame.

        weights (52,), turn (3,), gaze (2,): as in `Motion`.
        """
        head = self.head
        weights = weights + head.weights(gaze_shapes(*gaze))
        positions = self.base.copy()
        positions[: len(head.unique)] += (weights.astype(np.float32) @ head.shapes).reshape(-1, 3)[head.unique]
        normals = head.normals(positions)
        positions += normals * self._lift
        rotation = rotation_of(turn)
        positions += ((positions - self._pivot) @ rotation.T + self._pivot - positions) * head.follow
        return positions, normals + (normals @ rotation.T - normals) * head.follow

    def lips_centre(self, positions: Floats, size: int) -> tuple[float, float]:
        """Return (row, column) of the lips' centre in a picture of size x size pixels."""
        x, y, _, w = self.camera @ [*positions[self._lips].mean(0), 1]
        return (0.5 - 0.5 * y / w) * size, (0.5 + 0.5 * x / w) * size


def above_hairline(rest: Floats, hairline: Sequence[float]) -> Floats:
    """Return the height of points of the plain head above the hairline, (m, 3) -> (m,). Must match noise.glsl."""
    side, height, depth = np.abs(rest[:, 0]), rest[:, 1], rest[:, 2]
    front = np.clip((depth - 0.2) / 0.6, 0, 1)
    line = 6.62 + 1.28 * np.clip((depth + 0.02) / 1.22, 0, 1) ** 1.25 - 0.10 * np.clip(side / 0.8, 0, 1) ** 2 * front
    dents = hairline[1] * np.exp(-(((side - 0.42) / 0.2) ** 2)) + hairline[2] * np.sin(3 * rest[:, 0] + hairline[3])
    above: Floats = height - line - hairline[0] - front * dents
    return above


def gaze_shapes(right: float, up: float) -> dict[str, float]:
    """Return the expression weights of a gaze."""
    weights = {
        "eyeLookInLeft": -right,
        "eyeLookOutRight": -right,
        "eyeLookOutLeft": right,
        "eyeLookInRight": right,
        "eyeLookUp": up,
        "eyeLookDown": -up,
    }
    return {name: weight for name, weight in weights.items() if weight > 0}


def rotation_of(turn: Floats) -> Floats:
    """Return the rotation matrix (3, 3) of tilt, then nod, then turn."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(turn), np.sin(turn)
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    rotation: Floats = (about_y @ about_x @ about_z).astype(np.float32)
    return rotation


def camera(eyes: float, lips: float) -> tuple[Floats, Floats]:
    """Return matrix and position of a camera that shows a face, given the heights of eyes and lips, at a fixed size."""
    distance = 9.6 * (0.5 + 0.5 * (eyes - lips) / 0.66)
    middle = eyes * 0.55 + lips * 0.45
    eye, target = np.array((0, middle + 0.15, 0.4 + distance)), np.array((0, middle + 0.07, 0.4))
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, (0, 1, 0))
    right /= np.linalg.norm(right)
    view = np.eye(4)
    view[:3, :3] = right, np.cross(right, forward), -forward
    view[:3, 3] = -view[:3, :3] @ eye
    near = 1 / np.tan(np.radians(HALF_VIEW))
    lens = np.array([[near, 0, 0, 0], [0, near, 0, 0], [0, 0, -1.02, -1.01], [0, 0, -1, 0]])
    return lens @ view, eye
