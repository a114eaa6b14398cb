"""One person's head in front of a camera: the mesh of an expression, and its projection to the picture.

Axes: n mesh vertices, m drawn vertices, v vertices of hair or accessories, f frames.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from training.synthetic.accessories import Solid, make_glasses, make_hat, make_scarf
from training.synthetic.accessories import join as join_solids
from training.synthetic.hair import Ribbons, beard, scalp_hair
from training.synthetic.hair import join as join_ribbons
from training.synthetic.head import Floats, Head, Ints, Part
from training.synthetic.person import Person
from training.synthetic.scene import Lens

# Scale and shift of the pack's teeth, so that the inside of the mouth is visible.
TEETH_SCALE = np.array((0.84, 0.95, 0.95), np.float32)
UPPER_TEETH_SHIFT = np.array((0, -0.055, -0.07), np.float32)
LOWER_TEETH_SHIFT = np.array((0, -0.02, -0.075), np.float32)
# A flatter tongue leaves a dark cavity above it.
TONGUE_SCALE = np.array((1, 0.62, 0.95), np.float32)
TONGUE_SHIFT = np.array((0, -0.02, -0.05), np.float32)
CAP_LIFT = 0.015
# Height above the hairline at which the hair has its full volume.
EDGE_HEIGHT = 0.5
# Half the distance of inner lips that touch, in pixels of a picture of 256.
LIPS_TOUCH = 0.4
# The trailing rotation of long hair follows the head's with this time constant, in frames.
TRAIL_FRAMES = 3.0


@dataclass(frozen=True, eq=False)
class Motion:
    """Motion of a face, frame by frame.

    weights: (f, 52) of the expressions, 0 to 1, in the pack's order. turn: (f, 3) nod, turn and tilt of the head in
    radians. gaze: (f, 2) of the eyes in the head, right and up as the viewer sees it, about -1 to 1.
    """

    weights: Floats
    turn: Floats
    gaze: Floats

    def __len__(self) -> int:
        return len(self.weights)

    def frames(self) -> Iterator[tuple[Floats, Floats, Floats, Floats]]:
        """Yield weights, turn, gaze, and the trailing turn of long hair (3,) of each frame."""
        return zip(self.weights, self.turn, self.gaze, trail_of(self.turn), strict=True)


def trail_of(turn: Floats) -> Floats:
    """Return rotations (f, 3) that follow those of the head late."""
    trail, share = turn.copy(), 1 - np.exp(-1 / TRAIL_FRAMES)
    for index in range(1, len(turn)):
        trail[index] = trail[index - 1] + share * (turn[index] - trail[index - 1])
    return trail


@dataclass(frozen=True, eq=False)
class Pose:
    """The meshes of one frame.

    positions, normals: (m, 3) of the head. hair, tangents: (v, 3) of the ribbons. worn, worn_normals: (v, 3) of the
    accessories.
    """

    positions: Floats
    normals: Floats
    hair: Floats
    tangents: Floats
    worn: Floats
    worn_normals: Floats


NOTHING: Floats = np.zeros((0, 3), np.float32)


class Face:
    """A person at rest, and a camera in front of them.

    camera: (4, 4) matrix from points (x, y, z, 1) to clip coordinates. eye: position of the camera. ribbons, solid:
    hair and beard, and accessories; None without.
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
        self.middle = np.array((0, eyes * 0.55 + lips * 0.45, 0.4))
        self.camera, self.eye = camera(eyes, lips, person.lens)
        self._lips = head.mask[:, 0] > 0.5
        self._upper_lip, self._lower_lip = inner_lips(head)
        above = above_hairline(head.rest, person.look["hairline"])
        # The hair's volume falls to zero at its edge, else the background shows between hair and temple.
        rooted = np.clip(above / EDGE_HEIGHT, 0, 1)
        lift = head.puff * np.float32(person.hair.cap) * rooted + head.has_cap * np.float32(CAP_LIFT)
        self._lift = lift[:, None].astype(np.float32)
        self.ribbons = self._grow(above)
        self.solid = self._dress()

    def _grow(self, above: Floats) -> Ribbons | None:
        head, person, rng = self.head, self.person, np.random.default_rng((self.person.seed, 2))
        hat = person.outfit.hat
        grown = [scalp_hair(head, person.hair, hat.edge if hat else None, self.base, above, rng)]
        if person.outfit.beard is not None:
            grown.append(beard(head, person.outfit.beard, self.base, head.normals(self.base), rng))
        parts = [part for part in grown if part is not None]
        return join_ribbons(parts) if parts else None

    def _dress(self) -> Solid | None:
        head, outfit, rng = self.head, self.person.outfit, np.random.default_rng((self.person.seed, 3))
        parts = []
        if outfit.hat is not None:
            parts.append(make_hat(head, self.base, outfit.hat, rng))
        if outfit.scarf is not None:
            parts.append(make_scarf(head, self.base, outfit.scarf, rng))
        if outfit.glasses is not None:
            parts.append(make_glasses(head, self.base, outfit.glasses))
        return join_solids(parts) if parts else None

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
        head, curtain = self.head, self.person.hair.curtain
        cap, plain_cap = mesh[part == Part.HAIR], head.base[head.unique[part == Part.HAIR]]
        if curtain is None:
            sheet = np.tile(np.array((0, 7.4, 0.3), np.float32), (head.curtain.NUM_VERTICES, 1))
        else:
            sheet = head.curtain.vertices(*curtain)
        moved: Floats = (sheet - plain_cap.mean(0)) * (np.ptp(cap, axis=0) / np.ptp(plain_cap, axis=0)) + cap.mean(0)
        return moved

    def pose(self, weights: Floats, turn: Floats, gaze: Floats, trail: Floats | None = None) -> Pose:
        """Return the meshes of one frame.

        weights (52,), turn (3,), gaze (2,), trail (3,): as in `Motion`; without trail, long hair is at rest.
        """
        head = self.head
        weights = weights + head.weights(gaze_shapes(*gaze))
        positions = self.base.copy()
        positions[: len(head.unique)] += (weights.astype(np.float32) @ head.shapes).reshape(-1, 3)[head.unique]
        normals = head.normals(positions)
        rotation = rotation_of(turn)
        hair = tangents = worn = worn_normals = NOTHING
        if self.ribbons is not None:
            follow = np.where(head.part == Part.SKIN, head.follow[:, 0], 1)[self.ribbons.root, None].astype(np.float32)
            hair = positions[self.ribbons.root] + self.ribbons.offset
            late = rotation if trail is None else rotation_of(trail)
            moved = (hair - self._pivot) @ rotation.T
            moved += ((hair - self._pivot) @ late.T - moved) * self.ribbons.sag
            hair = hair + (moved + self._pivot - hair) * follow
            tangents = self.ribbons.tangent @ rotation.T
        if self.solid is not None:
            at_rest, follow = self.solid.position, self.solid.follow
            worn = at_rest + ((at_rest - self._pivot) @ rotation.T + self._pivot - at_rest) * follow
            worn_normals = self.solid.normal + (self.solid.normal @ rotation.T - self.solid.normal) * follow
        positions += normals * self._lift
        positions += ((positions - self._pivot) @ rotation.T + self._pivot - positions) * head.follow
        normals = normals + (normals @ rotation.T - normals) * head.follow
        return Pose(positions, normals, hair, tangents, worn, worn_normals)

    def place(self, points: Floats, size: int) -> Floats:
        """Return (..., 2) rows and columns of points (..., 3) in a picture of size x size pixels."""
        x, y, _, w = np.moveaxis(points @ self.camera[:, :3].T + self.camera[:, 3], -1, 0)
        return np.stack([(0.5 - 0.5 * y / w) * size, (0.5 + 0.5 * x / w) * size], -1)

    def lips_centre(self, positions: Floats, size: int) -> tuple[float, float]:
        """Return (row, column) of the lips' centre in a picture of size x size pixels."""
        row, column = self.place(positions[self._lips].mean(0), size)
        return float(row), float(column)

    def lips_gap(self, positions: Floats, size: int) -> float:
        """Return the height of the opening between the inner lips, in pixels of a picture of size x size, 0 if shut."""
        lowest = self.place(positions[self._upper_lip], size)[:, 0].max()
        highest = self.place(positions[self._lower_lip], size)[:, 0].min()
        return max(0.0, float(highest - lowest) - LIPS_TOUCH * size / 256)


def inner_lips(head: Head) -> tuple[Ints, Ints]:
    """Return the vertices of the upper and of the lower lip in the middle of the mouth."""
    jaw = head.shapes[head.shape_names.index("jawOpen")].reshape(-1, 3)[head.unique, 1]
    count = len(jaw)
    middle = (head.mask[:count, 0] > 0.5) & (np.abs(head.rest[:count, 0]) < 0.003)
    return np.flatnonzero(middle & (jaw > -0.1)), np.flatnonzero(middle & (jaw < -0.1))


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


def camera(eyes: float, lips: float, lens: Lens) -> tuple[Floats, Floats]:
    """Return matrix and position of a camera that shows a face of a lens's size, given the heights of eyes and lips."""
    usual = np.tan(np.radians(Lens.half_view))
    narrow = np.tan(np.radians(lens.half_view))
    distance = 9.6 * (0.5 + 0.5 * (eyes - lips) / 0.66) / lens.size * usual / narrow
    # A wide angle enlarges what is near: the plane that keeps its size moves to the front of the face.
    depth = 0.4 + (0.7 if narrow < usual else 0.5) * (1 - usual / narrow)
    middle = eyes * 0.55 + lips * 0.45
    target = np.array((0, middle + 0.07, depth))
    eye = target + np.array((0, lens.height - 0.07, distance))
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, (0, 1, 0))
    right /= np.linalg.norm(right)
    view = np.eye(4)
    view[:3, :3] = right, np.cross(right, forward), -forward
    view[:3, 3] = -view[:3, :3] @ eye
    near = 1 / narrow
    x, y = lens.shift
    lens_matrix = np.array([[near, 0, -2 * x, 0], [0, near, -2 * y, 0], [0, 0, -1.02, -1.01], [0, 0, -1, 0]])
    return lens_matrix @ view, eye
