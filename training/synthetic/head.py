"""The head that all people are derived from: MakeHuman's mesh, its shapes of age, sex and ancestry, and 52 expressions.

A mesh has n vertices (5,776), drawn as m (7,081: texture seams duplicate some, and a sheet of hair is appended).
Coordinates are MakeHuman's decimetres: x to the person's left, y up, z to the front; the eyes are near (+-.3, 7.3, 1).

Axes: n mesh vertices, m drawn vertices, k triangles.
"""

from collections.abc import Mapping
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

PACK = Path(__file__).with_name("head_pack.npz")
# Vertices of a seam share a position. Positions of different parts are kept apart when normals are welded.
NUM_PARTS = 10


class Part(IntEnum):
    """The part of the head that a drawn vertex belongs to. The shaders use the same numbers."""

    SKIN = 0
    EYES = 1
    TEETH = 2
    TONGUE = 3
    LASHES = 4
    HAIR = 5


def read_pack(path: Path = PACK) -> dict[str, NDArray[Any]]:
    """Read the pack's arrays.

    v (n, 3): the mesh. t (52, n, 3) int8, ts (52,), ark: expressions, the size of each, their names.
    idd (12, n, 3), idname: shapes of ancestry, sex and age. det (50, n, 3) int8, dets, detname: opposite pairs of
    details. vi (m,): mesh vertex of a drawn one. uv (m, 2), part (m,), msk (m, 4) bytes: lips, eyelids, inside of the
    mouth, face. hoff (m,) bytes: volume of the hair. idx (k, 3): triangles, ordered by part.
    """
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


class Curtain:
    """A sheet of hair around the back of the skull, a grid of vertices in addition to the mesh."""

    COLUMNS, ROWS = 36, 10
    NUM_VERTICES = COLUMNS * ROWS

    def __init__(self) -> None:
        rows, angles = np.mgrid[0 : 1 : self.ROWS * 1j, -1 : 1 : self.COLUMNS * 1j]
        self.row = rows.ravel().astype(np.float32)
        self.angle = angles.ravel().astype(np.float32)

    def triangles(self, first: int) -> Ints:
        """Return triangles (k, 3) of vertices numbered from `first`."""
        grid = np.arange(self.NUM_VERTICES).reshape(self.ROWS, self.COLUMNS) + first
        a, b, c, d = (corner.ravel() for corner in (grid[:-1, :-1], grid[:-1, 1:], grid[1:, :-1], grid[1:, 1:]))
        return np.concatenate([np.stack([a, c, b], 1), np.stack([b, c, d], 1)]).astype(np.int32)

    def vertices(self, reach: float = 1.0, top: float = 7.7, bottom: float = 6.2, bulge: float = 0.05) -> Floats:
        """Return positions (vertices, 3). reach: 1 ends just in front of the ears."""
        angle = self.angle * (1.72 * reach)
        radius = 1 - 0.2 * np.exp(-7 * self.row) + bulge * np.sin(np.pi * self.row) + 0.03 * np.sin(angle * 9)
        x, z = 0.88 * radius * np.sin(angle), 0.40 - 0.92 * radius * np.cos(angle)
        return np.stack([x, top + (bottom - top) * self.row, z], 1).astype(np.float32)


class Head:
    """Topology, rest shape and expressions, independent of person and rendering.

    shape_names, shapes: the 52 expressions, (52, 3 n). macros: shapes by (ancestry, sex, age). details: pairs (n, 3).
    base: (n, 3). unique: (m',) mesh vertex of each drawn one, the curtain's left out. part: (m,). triangles: (k, 3).
    rest: (m, 3) position on the plain head, for painting textures; for eyes, the direction from the eye's
    centre. uv: (m, 2), u < 0 marks the curtain. mask: (m, 4) as in the pack, 0 to 1. puff: (m,) volume of the
    hair. follow: (m, 1) share of the head's rotation that a vertex takes part in.
    """

    def __init__(self, pack: Mapping[str, NDArray[Any]]) -> None:
        self.shape_names = [str(name) for name in pack["ark"]]
        self.shapes = (pack["t"] * (pack["ts"] / 127)[:, None, None].astype(np.float32)).reshape(len(pack["ark"]), -1)
        names = [cast(tuple[str, str, str], tuple(str(name).split("-"))) for name in pack["idname"]]
        self.macros = dict(zip(names, pack["idd"].astype(np.float32), strict=True))
        details = pack["det"] * (pack["dets"] / 127)[:, None, None].astype(np.float32)
        self.details = list(zip(details[::2], details[1::2], strict=True))
        self.base = pack["v"]
        self.unique = pack["vi"].astype(np.int64)
        self.curtain = Curtain()
        self._set_vertices(pack)
        self._weld()

    def _set_vertices(self, pack: Mapping[str, NDArray[Any]]) -> None:
        """Set the properties of drawn vertices: the mesh's first, then the curtain's."""
        part, count, extra = pack["part"].astype(np.int64), len(pack["part"]), self.curtain.NUM_VERTICES
        rest = self.base[self.unique]
        is_left = rest[:, 0] > 0
        for side in (is_left, ~is_left):
            eye = (part == Part.EYES) & side
            centre = (rest[eye].min(0) + rest[eye].max(0)) / 2
            rest[eye] = (rest[eye] - centre) / (np.ptp(rest[eye], axis=0).max() / 2)
        uv = pack["uv"].astype(np.float32)
        low, high = uv[part == Part.SKIN].min(0), uv[part == Part.SKIN].max(0)
        curtain_uv = np.stack([np.full(extra, -1.0), -1 - self.curtain.row], 1)
        skin = (part == Part.SKIN)[:, None]
        self.part = np.concatenate([part, np.full(extra, Part.HAIR)])
        self.triangles = np.concatenate([pack["idx"].astype(np.int32), self.curtain.triangles(count)])
        self.rest = np.concatenate([rest, self.curtain.vertices()])
        self.uv = np.concatenate([(uv - low) / (high - low), curtain_uv]).astype(np.float32)
        self.mask = np.concatenate([pack["msk"] / 255 * skin, np.zeros((extra, 4))]).astype(np.float32)
        self.puff = np.concatenate([pack["hoff"] / 255 * (part == Part.HAIR), np.zeros(extra)]).astype(np.float32)
        self.has_cap = (self.part == Part.HAIR) & (self.uv[:, 0] >= 0)
        # Shoulders are fixed, the neck bends, and everything except skin rotates with the skull.
        height = np.clip((self.rest[:, 1] - 5.55) / 0.75, 0, 1)
        bend = height * height * (3 - 2 * height)
        rigid = (self.part > Part.SKIN) & (np.arange(count + extra) < count)
        self.follow = np.where(rigid, 1, bend)[:, None].astype(np.float32)

    def _weld(self) -> None:
        """Prepare `normals`: index the vertices that share a position, and the triangles that meet there."""
        count = len(self.unique)
        position = np.concatenate(
            [self.unique * NUM_PARTS + self.part[:count], 10**7 + np.arange(len(self.part) - count)]
        )
        _, self._position = np.unique(position, return_inverse=True)
        corner = self._position[self.triangles].ravel()
        order = np.argsort(corner, kind="stable")
        self._corner_triangle = order // 3
        self._corner_start = np.searchsorted(corner[order], np.arange(self._position.max() + 1))

    def normals(self, positions: Floats) -> Floats:
        """Return smooth unit normals of drawn vertices, welded across texture seams: (m, 3) -> (m, 3)."""
        a, b, c = (positions[self.triangles[:, i]] for i in range(3))
        sums = np.add.reduceat(np.cross(b - a, c - a)[self._corner_triangle], self._corner_start)
        unit: Floats = (sums / (np.linalg.norm(sums, axis=1, keepdims=True) + 1e-9))[self._position]
        return unit

    def groups(self) -> list[slice]:
        """Return the triangles of each shader program: skin; eyes, teeth and tongue; lashes and hair."""
        kinds = self.part[self.triangles[:, 0]]
        bounds = (Part.SKIN, Part.EYES, Part.LASHES, Part.HAIR + 1)
        return [slice(*np.searchsorted(kinds, pair)) for pair in pairwise(bounds)]

    def weights(self, shapes: Mapping[str, float]) -> Floats:
        """Return weights (52,) from names; one without Left or Right means both sides. ValueError for unknown names."""
        weights = np.zeros(len(self.shape_names), np.float32)
        for name, weight in shapes.items():
            for index in shape_indexes(self.shape_names, name):
                weights[index] += weight
        return weights


def shape_indexes(names: list[str], name: str) -> list[int]:
    """Return the indexes of a shape, or of both its sides. ValueError if there is none of that name."""
    found = [i for i, other in enumerate(names) if other in (name, f"{name}Left", f"{name}Right")]
    if not found:
        raise ValueError(f"unknown expression {name!r}; there are {', '.join(names)}")
    return found
