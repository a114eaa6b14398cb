"""Things that people wear: glasses, hats, headscarves and scarves, as meshes that fit a person's head.

Axes: v vertices, k triangles.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.synthetic.hair import HAT_TILT, Skull, skull_of, unit
from training.synthetic.head import Floats, Head, Ints, Part
from training.synthetic.styles import Glasses, Hat, Scarf

# Materials that the solid program draws: opaque matter, knitted or woven cloth, a lens.
MATTER, CLOTH, LENS = 0.0, 1.0, 2.0
TUBE_SIDES = 6
# Depth of the ears' front edges, behind which the arms of glasses lie flat on the skull.
EAR_DEPTH = 0.8


@dataclass(frozen=True, eq=False)
class Solid:
    """A mesh that moves with the head.

    position, normal: (v, 3) at rest. colour: (v, 4) linear light and gloss, 0 to 1. kind: (v,) MATTER, CLOTH or LENS.
    follow: (v, 1) share of the head's rotation. triangles: (k, 3), lenses last.
    """

    position: Floats
    normal: Floats
    colour: Floats
    kind: Floats
    follow: Floats
    triangles: Ints


def grid(points: Floats, colour: NDArray[np.float64], kind: float, follow: Floats | float, closed: bool) -> Solid:
    """Make a surface of a grid of points (rows, columns, 3). closed: the last column meets the first."""
    rows, columns = points.shape[:2]
    across = np.roll(points, -1, 1) - np.roll(points, 1, 1) if closed else np.gradient(points, axis=1)
    normal = unit(np.cross(np.gradient(points, axis=0), across))
    index = np.arange(rows * columns).reshape(rows, columns)
    right = np.roll(index, -1, 1) if closed else index[:, 1:]
    left = index if closed else index[:, :-1]
    a, b, c, d = left[:-1].ravel(), right[:-1].ravel(), left[1:].ravel(), right[1:].ravel()
    triangles = np.concatenate([np.stack([a, c, b], 1), np.stack([b, c, d], 1)]).astype(np.int32)
    count = rows * columns
    colours = np.broadcast_to(colour, (rows, columns, 4)).reshape(count, 4)
    shares = np.broadcast_to(np.asarray(follow, float), (rows, columns)).reshape(count, 1)
    return Solid(points.reshape(count, 3), normal.reshape(count, 3), colours, np.full(count, kind), shares, triangles)


def join(parts: list[Solid]) -> Solid:
    starts = np.cumsum([0, *(len(part.kind) for part in parts[:-1])])
    names = ("position", "normal", "colour", "kind", "follow")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]).astype(np.float32) for name in names}
    triangles = [part.triangles + start for part, start in zip(parts, starts, strict=True)]
    return Solid(**arrays, triangles=np.concatenate(triangles).astype(np.int32))


def tube(path: Floats, radius: float, colour: NDArray[np.float64], is_loop: bool = False) -> Solid:
    """Make a tube around a path (points, 3)."""
    along = np.roll(path, -1, 0) - np.roll(path, 1, 0) if is_loop else np.gradient(path, axis=0)
    along = unit(along)
    first = unit(np.cross(along, (0.3, 0.2, 1.0)))
    second = np.cross(along, first)
    angle = np.linspace(0, 2 * np.pi, TUBE_SIDES, endpoint=False)[:, None]
    ring = path[:, None] + radius * (np.cos(angle) * first[:, None] + np.sin(angle) * second[:, None])
    if is_loop:
        ring = np.concatenate([ring, ring[:1]])
    solid = grid(ring, colour, MATTER, 1.0, closed=True)
    middles = np.concatenate([path, path[:1]]) if is_loop else path
    normal = unit(ring - middles[:, None]).reshape(-1, 3)
    return Solid(solid.position, normal, solid.colour, solid.kind, solid.follow, solid.triangles)


def temple_width(head: Head, base: Floats, height: float, depth: float) -> float:
    """Return half the width of the head at a height and a depth."""
    skin = base[(head.part == Part.SKIN) | head.has_cap]
    near = (np.abs(skin[:, 1] - height) < 0.14) & (np.abs(skin[:, 2] - depth) < 0.14)
    return float(np.abs(skin[near, 0]).max()) if near.any() else 0.6


def make_glasses(head: Head, base: Floats, glasses: Glasses) -> Solid:
    """Fit glasses to a person's drawn vertices (m, 3) at rest."""
    frame, tint = np.array(glasses.colour), np.array(glasses.tint)
    eyes = base[head.part == Part.EYES]
    height, spread = float(eyes[:, 1].mean()) - 0.015, float(np.abs(eyes[:, 0]).mean())
    face = base[(head.part == Part.SKIN) | (head.part == Part.LASHES)]
    width = min(glasses.width, spread - 0.06)
    angle = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    round_x = np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** (2 / glasses.shape)
    round_y = np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** (2 / glasses.shape)
    x, y = spread + width * round_x, height + glasses.height * round_y
    # The front bends back to the sides, and touches neither brows, lashes nor cheeks.
    ring = np.abs(np.abs(face[:, 0]) - spread) < width + 0.03
    ring &= np.abs(face[:, 1] - height) < glasses.height + 0.03
    bend = 0.16

    def depth(side: Floats) -> Floats:
        return front - bend * (np.abs(side) / 0.6) ** 2

    front = float((face[ring, 2] + bend * (np.abs(face[ring, 0]) / 0.6) ** 2).max()) + 0.035
    parts, lenses = [], []
    for sign in (-1, 1):
        rim = np.stack([sign * x, y, depth(x)], 1)
        if glasses.has_lower_rim:
            parts.append(tube(rim, glasses.thickness, frame, is_loop=True))
        else:
            parts.append(tube(rim[: len(rim) // 2 + 1], glasses.thickness, frame))
        hinge = np.array((sign * (spread + width), height + 0.35 * glasses.height, depth(np.array(spread + width))))
        ear = 0.42
        steps = np.linspace(0, 1, 9)
        z = hinge[2] + (ear - hinge[2]) * steps
        high = hinge[1] + (height + 0.08 - hinge[1]) * steps
        wide = [
            max(abs(hinge[0]) * (1 - s) + 0.5 * s, temple_width(head, base, v, max(w, EAR_DEPTH)) + 0.012)
            for s, v, w in zip(steps, high, z, strict=True)
        ]
        parts.append(tube(np.stack([sign * np.maximum.accumulate(wide), high, z], 1), glasses.thickness * 0.9, frame))
        middle = np.array((sign * spread, height, float(depth(np.array(spread))) + 0.002))
        fan = np.stack([np.tile(middle, (len(rim), 1)), rim])
        lenses.append(grid(fan, tint, LENS, 1.0, closed=True))
        lenses[-1] = Solid(
            lenses[-1].position,
            np.tile((0.12 * sign, 0.05, 1.0), (2 * len(rim), 1)),
            *(getattr(lenses[-1], name) for name in ("colour", "kind", "follow", "triangles")),
        )
    inner = spread - width
    steps = np.linspace(-1, 1, 9)
    bridge = np.stack([inner * steps, height + 0.25 * glasses.height + 0.03 * (1 - steps**2), depth(inner * steps)], 1)
    parts.append(tube(bridge, glasses.thickness, frame))
    return join([*parts, *lenses])


def dome(skull: Skull, edge: float, thickness: float, rows: int = 12, columns: int = 40, flat: float = 1.0) -> Floats:
    """Return a dome over the skull (rows, columns, 3), from its edge up.

    edge: height at the front, by the skull's; the back is lower. flat: 1 is the skull's height, less is flatter.
    """
    around = np.linspace(0, 2 * np.pi, columns, endpoint=False)
    # 0 at the front.
    lowest = edge - HAT_TILT * (1 - np.cos(around))
    start = np.arcsin(np.clip(lowest, -0.95, 0.95))
    rise = start + (np.pi / 2 - start) * np.linspace(0, 1, rows)[:, None]
    x, z, y = np.cos(rise) * np.sin(around), np.cos(rise) * np.cos(around), np.sin(rise)
    radii = skull.radii + thickness
    surface: Floats = skull.centre + np.stack([x, np.where(y > 0, y * flat, y), z], 2) * radii
    return surface


def make_hat(head: Head, base: Floats, hat: Hat, rng: Generator) -> Solid:
    """Fit a hat to a person's drawn vertices (m, 3) at rest."""
    skull = skull_of(head, base)
    colour, band = np.array(hat.colour), np.array(hat.band)
    if hat.kind == "headscarf":
        return headscarf(head, base, skull, colour, rng)
    # Large enough for all of the head above its edge.
    above = base[(head.has_cap | (head.part == Part.SKIN)) & (base[:, 1] > skull.centre[1] + hat.edge * skull.radii[1])]
    reach = float(np.linalg.norm((above - skull.centre) / skull.radii, axis=1).max(initial=1.0))
    skull = Skull(skull.centre, skull.radii * reach)
    crown = dome(skull, hat.edge, 0.1, flat=1.12 if hat.kind == "beanie" else 1.0)
    parts = [grid(crown, colour, CLOTH, 1.0, closed=True)]
    if hat.kind == "beanie":
        # A turned-up edge.
        edge = dome(skull, hat.edge, 0.135)[:4]
        parts.append(grid(edge, band, CLOTH, 1.0, closed=True))
        parts.append(grid(np.stack([dome(skull, hat.edge, 0.02)[0], edge[0]]), band, CLOTH, 1.0, closed=True))
    if hat.kind in ("cap", "brim"):
        ring = dome(skull, hat.edge, 0.1, columns=60)[0]
        front = unit((ring - skull.centre) * (1, 0, 1))
        width = rng.uniform(0.4, 0.6) if hat.kind == "brim" else 0.75
        share = np.ones(len(ring)) if hat.kind == "brim" else np.clip(front[:, 2] * 1.9 - 0.75, 0, 1)
        out = width * share[:, None] * front + np.array((0.0, -0.14, 0.0)) * (share * np.abs(front[:, 0]) ** 2)[:, None]
        out += np.array((0.0, -0.10 if hat.kind == "cap" else 0.06, 0.0)) * share[:, None]
        steps = np.linspace(0, 1, 5)[:, None, None]
        parts.append(grid(ring + steps * out, colour, CLOTH, 1.0, closed=True))
        strip = dome(skull, hat.edge, 0.112)[:3]
        parts.append(grid(strip, band if hat.kind == "brim" else colour, CLOTH, 1.0, closed=True))
    return join(parts)


def headscarf(head: Head, base: Floats, skull: Skull, colour: NDArray[np.float64], rng: Generator) -> Solid:
    """Wrap a cloth around skull, ears and neck that leaves the face free."""
    lips, eyes = base[head.mask[:, 0] > 0.5], base[head.part == Part.EYES]
    chin, top = float(lips[:, 1].mean()) - 0.58, float(eyes[:, 1].mean()) + 0.52
    middle, tall = (top + chin) / 2, (top - chin) / 2
    angle = np.linspace(0, 2 * np.pi, 56, endpoint=False)
    # The opening around the face lies on the skin; rings go back from it over skull, ears and neck.
    x = 0.84 * skull.radii[0] * np.sin(angle) * (1 + 0.1 * np.cos(angle))
    y = middle + tall * np.cos(angle)
    upper = np.clip((y - middle) / tall, -1, 1)
    skin = base[head.part == Part.SKIN]
    near = np.hypot(skin[None, :, 0] - x[:, None], skin[None, :, 1] - y[:, None]) < 0.13
    deepest = skull.centre[2] + skull.radii[2] * (0.4 + 0.25 * upper)
    z = np.where(near.any(1), np.max(np.where(near, skin[None, :, 2], -9.0), axis=1), deepest)
    z = np.mean([np.roll(np.maximum(z, deepest), step) for step in range(-2, 3)], axis=0) + 0.06
    opening = np.stack([x, y, z], 1)
    rings = [opening]
    for step in np.linspace(0.12, 1, 9):
        wide = 1 + 0.5 * np.sin(np.pi * min(1, step * 1.1) / 2)
        ring = np.stack(
            [
                x * wide,
                middle + (y - middle) * (1 + 0.2 * np.sin(np.pi * step)),
                z - 1.75 * step * (0.65 + 0.35 * upper),
            ],
            1,
        )
        rings.append(skull.push(ring, np.full(len(ring), 0.14)))
    folds = 0.02 * np.sin(angle * 9 + np.linspace(0, 3, len(rings))[:, None] * 2 + rng.uniform(0, 6))
    wrap = np.stack(rings)
    wrap = wrap + folds[..., None] * unit(wrap - np.array((0, middle, skull.centre[2])))
    # The drape from the chin down to the shoulders.
    around = np.linspace(0, 2 * np.pi, 56, endpoint=False)
    levels = np.linspace(0, 1, 7)[:, None]
    radius = 0.74 + 0.63 * levels**1.6 + 0.025 * np.sin(around * 8 + levels * 3)
    drape = np.stack(
        [
            radius * np.sin(around) * skull.radii[0] / 0.8,
            chin + 0.32 - 1.5 * levels + 0 * around,
            0.32 + radius * np.cos(around) * (0.85 + 0 * levels),
        ],
        2,
    )
    follow = np.clip((np.broadcast_to(drape[..., 1], drape.shape[:2]) - chin + 0.95) / 1.0, 0, 1)
    return join([grid(wrap, colour, CLOTH, 1.0, closed=True), grid(drape, colour, CLOTH, follow, closed=True)])


def make_scarf(head: Head, base: Floats, scarf: Scarf, rng: Generator) -> Solid:
    """Lay a scarf around a person's neck."""
    lips = base[head.mask[:, 0] > 0.5]
    height = float(lips[:, 1].mean()) - 0.98
    neck = base[(head.part == Part.SKIN) & (np.abs(base[:, 1] - height - 0.15) < 0.12) & (np.abs(base[:, 0]) < 0.9)]
    middle = np.array((0.0, height, float(neck[:, 2].mean())))
    wide, deep = float(np.abs(neck[:, 0]).max()), float(np.ptp(neck[:, 2])) / 2
    around = np.linspace(0, 2 * np.pi, 48, endpoint=False)[:, None]
    section = np.linspace(0, 2 * np.pi, 10)
    rough = scarf.thickness * (
        1 + 0.12 * np.sin(around * 7 + 2 * section) + 0.1 * np.sin(around * 3 + rng.uniform(0, 6))
    )
    out = 1 + (rough * np.cos(section) + 0.75 * scarf.thickness)
    tilt = 0.1 * np.cos(around)
    ring = np.stack(
        [
            (wide + out - 1) * np.sin(around),
            rough * 1.5 * np.sin(section) - tilt,
            (deep + out - 1) * np.cos(around),
        ],
        2,
    )
    return grid(np.swapaxes(middle + ring, 0, 1), np.array(scarf.colour), CLOTH, 0.25, closed=True)
