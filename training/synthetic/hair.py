"""Hair and beards of ribbons, which grow from the skin and show several strands each.

A ribbon starts at a root on the scalp, follows the style's flow around the skull, is kept outside of it and out of the
face, and falls. A beard's ribbons are short and move with the skin.

Axes: r ribbons, p points of a ribbon from root to tip, v vertices, k triangles.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.synthetic.head import Floats, Head, Ints, Part
from training.synthetic.styles import BeardShape, HairStyle

SEGMENTS = 7
BEARD_SEGMENTS = 2
DOWN = np.array((0.0, -1.0, 0.0))
# Hair beside the face is kept this far from its middle, by the skull's width.
FACE_WIDTH = 0.84
# Hair on the forehead ends this far above the eyes.
FRINGE_ABOVE = 0.24
# Drop of a hat's edge from the front to the sides, as a share of the skull's height.
HAT_TILT = 0.22


@dataclass(frozen=True, eq=False)
class Ribbons:
    """Ribbons of hair at rest, two vertices at each point.

    root: (v,) drawn vertex that a vertex moves with. offset: (v, 3) from it. tangent: (v, 3) unit, towards the tip.
    texture: (v, 4) along (0 root, 1 tip), across (-1 to 1), a random number of each ribbon, depth (0 outside, 1
    inside). sag: (v, 1) share of the head's trailing rotation. triangles: (k, 3).
    """

    root: Ints
    offset: Floats
    tangent: Floats
    texture: Floats
    sag: Floats
    triangles: Ints

    def __len__(self) -> int:
        return len(self.root)


@dataclass(frozen=True)
class Skull:
    """An ellipsoid around the skull. centre, radii: (3,)."""

    centre: NDArray[np.float64]
    radii: NDArray[np.float64]

    def outward(self, points: Floats) -> Floats:
        """Return unit normals (..., 3) at points."""
        return unit((points - self.centre) / self.radii**2)

    def push(self, points: Floats, clearance: Floats) -> Floats:
        """Move points (r, 3) that lie inside, or closer than a clearance (r,), outwards."""
        relative = (points - self.centre) / (self.radii + clearance[:, None])
        size = np.linalg.norm(relative, axis=1, keepdims=True)
        return np.where(size < 1, self.centre + (points - self.centre) / np.maximum(size, 1e-3), points)


def unit(vectors: Floats) -> Floats:
    scaled: Floats = vectors / (np.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-9)
    return scaled


def skull_of(head: Head, base: Floats) -> Skull:
    """Fit the skull to a person's drawn vertices (m, 3) at rest."""
    cap, eyes = base[head.has_cap], base[head.part == Part.EYES]
    low, high = cap.min(0), cap.max(0)
    middle = float(eyes[:, 1].mean()) + 0.12
    centre = np.array((0.0, middle, (low[2] + high[2]) / 2))
    return Skull(centre, np.array((high[0], high[1] - middle, (high[2] - low[2]) / 2)) * 0.985)


def roots_on(
    triangles: Ints, base: Floats, density: Floats, count: int, rng: Generator
) -> tuple[Ints, NDArray[np.float64]]:
    """Draw roots on triangles, with a density (m,) from vertex to vertex: a vertex of each (r,), and points (r, 3)."""
    corners = base[triangles].astype(float)
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    weight = area * density[triangles].mean(1)
    if weight.sum() < 1e-6:
        return np.zeros(0, np.int64), np.zeros((0, 3))
    chosen = rng.choice(len(triangles), count, p=weight / weight.sum())
    shares = rng.dirichlet((1, 1, 1), count)
    points = (corners[chosen] * shares[:, :, None]).sum(1)
    return triangles[chosen, shares.argmax(1)].astype(np.int64), points


def flow_of(style: HairStyle, points: Floats, side: Floats, skull: Skull) -> Floats:
    """Return the direction (r, 3) in which a style is combed at points. side: (r,) of the parting, -1 or 1."""
    zero = np.zeros(len(points))
    if style.flow == "back":
        flow = np.stack([0.25 * side, zero - 0.15, zero - 1], 1)
    elif style.flow == "forward":
        flow = np.stack([zero + style.sweep, zero - 0.5, zero + 1], 1)
    elif style.flow == "knot":
        flow = knot_of(style, skull) - points
    else:
        front = np.clip((points[:, 2] - skull.centre[2]) / skull.radii[2], -1, 1)
        flow = np.stack([side, zero - 0.45, 0.35 * front - 0.25], 1)
    out = skull.outward(points)
    return unit(flow - (flow * out).sum(1, keepdims=True) * out)


def knot_of(style: HairStyle, skull: Skull) -> Floats:
    """Return the place (3,) on the skull where hair is tied."""
    place: Floats = skull.centre + np.array((0.0, style.knot, -np.sqrt(1 - style.knot**2))) * skull.radii
    return place


def grow(style: HairStyle, roots: Floats, skull: Skull, eyes: float, rng: Generator) -> tuple[Floats, Floats]:
    """Grow hair from roots (r, 3): its points (r, p, 3), and how far along each is, (r, p) 0 to 1.

    eyes: height of the eyes.
    """
    count = len(roots)
    front = np.clip((roots[:, 2] - skull.centre[2]) / skull.radii[2], 0, 1)
    length = style.length * rng.uniform(0.75, 1.15, count) * (1 + (style.front - 1) * front**2)
    side = np.where(roots[:, 0] > style.parting + rng.normal(0, 0.03, count), 1.0, -1.0)
    # Locks: neighbouring roots are combed and curled alike.
    lock = lock_noise(roots, rng, 5)
    clearance = 0.012 + style.volume * rng.beta(1.6, 1.2, count) + 0.03 * np.abs(lock[:, 0])
    out = skull.outward(roots)
    direction = unit(flow_of(style, roots, side, skull) * (1 - style.lift) + out * style.lift + 0.2 * lock[:, 1:4])
    phase = rng.uniform(0, 2 * np.pi, count) if style.frizz > 0.5 else 3 * lock[:, 4]
    points, point = [roots], roots
    step = length[:, None] / SEGMENTS
    for index in range(1, SEGMENTS + 1):
        done = index / SEGMENTS
        out = skull.outward(point)
        falls = style.gravity * np.clip(1 - out[:, 1:2] * 1.2, 0, 1)
        pull = flow_of(style, point, side, skull) * (1 - falls) + DOWN * falls + out * style.lift * (1 - done) ** 2
        direction = unit(style.stiffness * direction + (1 - style.stiffness) * pull + 0.1 * (1 - falls) * lock[:, 1:4])
        if style.flow == "knot":
            # Hair ends at the knot.
            step = np.minimum(step, np.linalg.norm(knot_of(style, skull) - point, axis=1, keepdims=True))
        point = skull.push(point + direction * step, clearance)
        if style.curtain is not None:
            point = beside_face(point, side, skull, eyes)
        angle = phase + 2 * np.pi * style.turns * done * length / 0.5
        wave = style.curl * min(1.0, 2 * done) * np.stack([np.cos(angle), 0.5 * np.sin(angle), np.sin(angle)], 1)
        points.append(point + wave)
    whole = np.stack(points, 1)
    return cut_fringe(whole, skull, eyes + FRINGE_ABOVE)


def lock_noise(roots: Floats, rng: Generator, count: int) -> Floats:
    """Draw smooth noise over roots, of about unit variance: (r, 3) -> (r, count)."""
    waves, phases = rng.normal(0, 5, (3, 4, count)), rng.uniform(0, 2 * np.pi, (4, count))
    noise: Floats = np.cos(np.einsum("rx,xwc->rwc", roots, waves) + phases).sum(1) / np.sqrt(2)
    return noise


def beside_face(points: Floats, side: Floats, skull: Skull, eyes: float) -> Floats:
    """Move points (r, 3) that hang in front of the face sideways."""
    least = FACE_WIDTH * skull.radii[0]
    hangs = (points[:, 1] < eyes + FRINGE_ABOVE) & (points[:, 2] > skull.centre[2] + 0.15)
    moved = points.copy()
    moved[:, 0] = np.where(
        hangs & (np.abs(points[:, 0]) < least), np.sign(points[:, 0] + 0.01 * side) * least, points[:, 0]
    )
    near = hangs & (np.abs(points[:, 0]) > 0.6 * least)
    moved[:, 2] = np.where(near, np.minimum(points[:, 2], skull.centre[2] + 0.62), points[:, 2])
    return moved


def cut_fringe(points: Floats, skull: Skull, lowest: float) -> tuple[Floats, Floats]:
    """End hair (r, p, 3) on the forehead above a height, and return it with how far along each point is, (r, p)."""
    low = points[..., 1] < lowest + 0.05 * np.abs(points[..., 0])
    is_front = (points[:, 0, 2] > skull.centre[2] + 0.35 * skull.radii[2])[:, None]
    jumps = low & is_front & (np.abs(points[:, :1, 0]) < 0.72 * skull.radii[0])
    last = np.where(jumps.any(1), np.maximum(jumps.argmax(1) - 1, 1), points.shape[1] - 1)
    index = np.minimum(np.arange(points.shape[1]), last[:, None])
    along = np.minimum(np.arange(points.shape[1]) / last[:, None], 1.0)
    return np.take_along_axis(points, index[..., None], 1), along


def ribbons_from(
    points: Floats,
    along: Floats,
    root: Ints,
    origin: Floats,
    outward: Floats,
    width: Floats,
    sag: float,
    rng: Generator,
) -> Ribbons:
    """Turn paths into ribbons.

    points: (r, p, 3). along: (r, p). root: (r,). origin: (r, 3) position of the root's vertex. outward: (r, p, 3)
    normals of the surface below. width: (r,) half the width at the root. sag: share of the trailing rotation at tips.
    """
    count, size = points.shape[:2]
    tangent = unit(np.gradient(points, axis=1) + 1e-6 * outward)
    # Ribbons lie flat on the head, a little twisted.
    twist = rng.normal(0, 0.35, (count, 1, 1))
    across = unit(np.cross(tangent, outward))
    across = unit(across + twist * np.cross(tangent, across))
    half = width[:, None, None] * (1 - 0.55 * along[..., None])
    vertices = np.stack([points - half * across, points + half * across], 2)
    texture = np.zeros((count, size, 2, 4))
    texture[..., 0] = along[:, :, None]
    texture[..., 1] = (-1, 1)
    texture[..., 2] = rng.random((count, 1, 1))
    depth = np.linalg.norm(points[:, -1] - points[:, 0], axis=1)
    texture[..., 3] = (1 - np.argsort(np.argsort(depth)) / max(1, count - 1))[:, None, None]
    corner = (np.arange(count)[:, None] * size + np.arange(size - 1)).ravel()[:, None] * 2
    triangles = np.concatenate([corner + np.array(three) for three in ((0, 1, 2), (1, 3, 2))]).astype(np.int32)
    each = 2 * size
    return Ribbons(
        np.repeat(root, each),
        (vertices - origin[:, None, None]).reshape(-1, 3).astype(np.float32),
        np.repeat(tangent, 2, axis=1).reshape(-1, 3).astype(np.float32),
        texture.reshape(-1, 4).astype(np.float32),
        (sag * texture[..., 0].reshape(-1, 1) ** 1.5).astype(np.float32),
        triangles,
    )


def join(parts: list[Ribbons]) -> Ribbons:
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    names = ("root", "offset", "tangent", "texture", "sag")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    triangles = [part.triangles + start for part, start in zip(parts, starts, strict=True)]
    return Ribbons(**arrays, triangles=np.concatenate(triangles).astype(np.int32))


def scalp_hair(
    head: Head, style: HairStyle, hat_edge: float | None, base: Floats, above: Floats, rng: Generator
) -> Ribbons | None:
    """Grow the hair of a style; None if there is none.

    hat_edge: of the hat above it, as in `Hat`. base: (m, 3) a person's drawn vertices at rest. above: (m,) height above
    the hairline.
    """
    if style.count == 0:
        return None
    skull, eyes = skull_of(head, base), float(base[head.part == Part.EYES][:, 1].mean())
    cap = head.triangles[head.has_cap[head.triangles].all(1)]
    density = np.clip((above - 0.02) / 0.12, 0, 1) * (0.35 + 0.65 * np.clip(above / 0.4, 0, 1))
    root, points = roots_on(cap, base, density, style.count, rng)
    if len(root) == 0:
        return None
    whole, along = grow(style, points, skull, eyes, rng)
    if hat_edge is not None:
        # Under a hat only hair below its edge shows.
        edge = skull.centre[1] + skull.radii[1] * edge_below(hat_edge, whole, skull)
        shown = (whole[..., 1] < edge).all(1)
        root, whole, along = root[shown], whole[shown], along[shown]
    if len(root) == 0:
        return None
    out = skull.outward(whole)
    width = style.width * rng.uniform(0.7, 1.3, len(root))
    parts = [ribbons_from(whole, along, root, base[root], out, width, style.sag, rng)]
    if style.bun > 0:
        parts.append(bun(style, skull, root[0], base, rng))
    return join(parts)


def edge_below(edge: float, points: Floats, skull: Skull) -> Floats:
    """Return the height of a hat's edge below which points (..., 3) lie, by the skull's; it falls towards the back."""
    relative = (points - skull.centre) / skull.radii
    facing = relative[..., 2] / (np.hypot(relative[..., 0], relative[..., 2]) + 1e-6)
    return edge - HAT_TILT * (1 - facing)


def bun(style: HairStyle, skull: Skull, root: int, base: Floats, rng: Generator) -> Ribbons:
    """Wind ribbons around a ball at the style's knot."""
    count = 160
    centre = knot_of(style, skull)
    centre = centre + 0.7 * style.bun * skull.outward(centre)
    axis, start = unit(rng.normal(size=(count, 3))), rng.uniform(0, 2 * np.pi, (count, 1))
    first = unit(np.cross(axis, rng.normal(size=(count, 3))))
    angle = start + np.linspace(0, 2.2, SEGMENTS + 1)
    circle = np.cos(angle)[..., None] * first[:, None] + np.sin(angle)[..., None] * np.cross(axis, first)[:, None]
    points = centre + circle * style.bun * rng.uniform(0.85, 1.05, (count, 1, 1))
    along = np.tile(np.linspace(0, 0.6, SEGMENTS + 1), (count, 1))
    roots = np.full(count, root)
    return ribbons_from(points, along, roots, base[roots], circle, np.full(count, 1.4 * style.width), 0.0, rng)


def step(low: float, high: float, value: Floats) -> Floats:
    """Return 0 at low, 1 at high, and a smooth path between. Must match the shaders' smoothstep."""
    x = np.clip((value - low) / (high - low), 0, 1)
    smooth: Floats = x * x * (3 - 2 * x)
    return smooth


def beard_density(rest: Floats, shape: BeardShape) -> Floats:
    """Return the density of a beard at points (m, 3) of the plain head: (m,) 0 to 1."""
    side, height, depth = np.abs(rest[:, 0]), rest[:, 1], rest[:, 2]

    jaw = step(6.95, 6.72, height - 0.25 * step(0.45, 0.75, side)) * step(6.0, 6.2, height + 0.25 * (depth - 1))
    jaw = jaw * step(0.15, 0.5, depth)
    mouth = step(0.34, 0.26, side) * step(6.92, 6.86, height) * step(6.46, 6.5, height)
    chin = step(0.36, 0.24, side) * step(6.5, 6.44, height) * step(6.0, 6.15, height) * step(0.9, 1.1, depth)
    moustache = step(0.29, 0.2, side) * step(6.71, 6.735, height) * step(6.86, 6.80, height) * step(1.2, 1.3, depth)
    density: Floats = np.maximum.reduce([shape.jaw * jaw * (1 - mouth), shape.chin * chin, shape.moustache * moustache])
    return density


def beard(head: Head, shape: BeardShape, base: Floats, normals: Floats, rng: Generator) -> Ribbons | None:
    """Grow a beard on a person's drawn vertices (m, 3) at rest with normals (m, 3)."""
    bare = (head.mask[:, 0] > 0.3) | (head.mask[:, 2] > 0.3) | (head.part != Part.SKIN)
    density = np.where(bare, 0, beard_density(head.rest, shape))
    skin = head.triangles[(head.part[head.triangles] == Part.SKIN).all(1) & (~bare[head.triangles]).all(1)]
    root, points = roots_on(skin, base, density, shape.count, rng)
    if len(root) == 0:
        return None
    out = normals[root].astype(float)
    outwards = np.sign(points[:, :1]) * np.array((0.35, 0.0, 0.0))
    comb = unit(DOWN + outwards + 0.25 * lock_noise(points, rng, 3))
    length = shape.length * rng.uniform(0.6, 1.2, (len(root), 1)) * (0.5 + 0.5 * density[root])[:, None]
    steps = np.linspace(0, 1, BEARD_SEGMENTS + 1)[None, :, None]
    directions = unit(0.45 * out + comb)[:, None] * (1 - steps) + unit(0.12 * out + comb)[:, None] * steps
    whole = points[:, None] + 0.01 * out[:, None] + directions * steps * length[:, None]
    along = np.tile(steps[0, :, 0], (len(root), 1))
    normal = np.repeat(out[:, None], BEARD_SEGMENTS + 1, 1)
    width = 0.018 * rng.uniform(0.7, 1.3, len(root)) * (0.4 + 0.6 * density[root])
    return ribbons_from(whole, along, root, base[root], normal, width, 0.0, rng)
