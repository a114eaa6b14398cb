"""Hair styles, beards and accessories: their descriptions, and how likely each is for whom.

Colours are linear light, (red, green, blue) in [0, 1]. Lengths are in the mesh's decimetres.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Colour = NDArray[np.float64]

DARK_HAIR = ((0.015, 0.012, 0.011), (0.03, 0.018, 0.013), (0.07, 0.035, 0.02))
LIGHT_HAIR = (
    (0.02, 0.016, 0.014),
    (0.04, 0.022, 0.014),
    (0.10, 0.055, 0.03),
    (0.17, 0.075, 0.03),
    (0.22, 0.07, 0.025),
    (0.42, 0.28, 0.12),
    (0.55, 0.42, 0.24),
)
DYED_HAIR = ((0.45, 0.05, 0.12), (0.05, 0.2, 0.35), (0.25, 0.08, 0.4))
GREY = np.array((0.45, 0.45, 0.46))
FRAMES = (
    (0.012, 0.012, 0.014, 0.6),
    (0.012, 0.012, 0.014, 0.6),
    (0.10, 0.05, 0.02, 0.6),
    (0.45, 0.44, 0.43, 0.9),
    (0.42, 0.30, 0.12, 0.9),
    (0.25, 0.02, 0.03, 0.6),
    (0.03, 0.08, 0.2, 0.6),
)


@dataclass(frozen=True)
class Nature:
    """Traits that shape, colours and styles depend on. ancestry: three shares that sum to 1. male, old: 0 to 1."""

    ancestry: NDArray[np.float64]
    male: float
    old: float


@dataclass(frozen=True)
class HairStyle:
    """The growth and combing of hair.

    name: of the style. length: of hair; front: factor of the length at the forehead. flow: combed from a `part`ing,
    `back`, `forward`, or to a `knot`. lift: 0 lies flat, 1 stands up. volume: height of hair above the skull. gravity:
    how much hair falls, 0 to 1. stiffness: 0 follows the flow at once, 1 never. curl: radius of curls, turns: of them
    in half a decimetre. frizz: 1 curls each ribbon by itself. width: half a ribbon's. count: of ribbons. sag: share of
    the trailing rotation at the tips. parting: its position. sweep: sideways share of a fringe. knot: height of the
    knot above the skull's middle. bun: radius of a bun, 0 without. fringe: height of the hairline and depth of the
    dents at its sides. cap: volume of the layer below the ribbons. curtain: reach, top, bottom and bulge of a sheet at
    the back, None without.
    """

    name: str
    length: float
    front: float = 1.0
    flow: str = "part"
    lift: float = 0.15
    volume: float = 0.1
    gravity: float = 0.5
    stiffness: float = 0.35
    curl: float = 0.0
    turns: float = 1.0
    frizz: float = 0.0
    width: float = 0.045
    count: int = 1100
    sag: float = 0.0
    parting: float = 0.0
    sweep: float = 0.0
    knot: float = -0.2
    bun: float = 0.0
    fringe: tuple[float, float] = (0.0, 0.0)
    cap: float = 0.04
    curtain: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Range:
    """Numbers of equal probability."""

    low: float
    high: float


R = Range
LONG = {"flow": "part", "lift": 0.12, "gravity": 0.95, "sag": 0.8, "width": 0.06, "count": 800, "stiffness": 0.2}
STYLES: Mapping[str, Mapping[str, Any]] = {
    "short": {
        "length": R(0.28, 0.45), "front": R(1.1, 1.5), "lift": R(0.2, 0.45), "volume": R(0.06, 0.16),
        "stiffness": 0.5,
    },
    "swept": {
        "length": R(0.4, 0.65), "front": R(1.0, 1.3), "flow": "back", "lift": R(0.25, 0.6), "volume": R(0.08, 0.2),
    },
    "fringe": {
        "length": R(0.35, 0.55), "front": R(0.9, 1.2), "flow": "forward", "lift": R(0.1, 0.3),
        "volume": R(0.06, 0.14), "sweep": R(-1, 1),
    },
    "cropped": {
        "length": R(0.05, 0.13), "front": R(1.0, 1.6), "flow": "forward", "lift": R(0.5, 0.8), "volume": 0.02,
        "gravity": 0.1, "width": 0.03, "count": 1500,
    },
    "receding": {
        "length": R(0.12, 0.3), "flow": "back", "lift": R(0.1, 0.3), "volume": R(0.02, 0.07), "gravity": 0.3,
        "fringe": (0.05, R(0.15, 0.4)),
    },
    "bald": {"length": 0.0, "count": 0, "cap": 0.0},
    "curls": {
        "length": R(0.3, 0.5), "front": R(1.0, 1.3), "lift": 0.6, "volume": R(0.08, 0.2), "gravity": 0.2,
        "curl": R(0.04, 0.07), "turns": 1.6,
    },
    "afro": {
        "length": R(0.2, 0.55), "lift": 0.95, "volume": R(0.12, 0.4), "gravity": 0.05, "stiffness": 0.7, "curl": 0.06,
        "turns": 2.2, "frizz": 1.0, "width": 0.025, "count": 1700,
    },
    "bob": {
        **LONG, "length": R(1.1, 1.5), "front": 0.95, "volume": R(0.05, 0.16),
        "curtain": (1.0, 7.6, R(6.2, 6.6), R(0.04, 0.1)),
    },
    "bangs": {
        **LONG, "length": R(1.2, 2.2), "front": 0.9, "volume": R(0.05, 0.14),
        "curtain": (1.0, 7.6, R(5.5, 6.5), R(0, 0.06)),
    },
    "long": {
        **LONG, "length": R(1.9, 2.7), "front": 0.95, "volume": R(0.05, 0.15),
        "curtain": (1.0, 7.6, R(5.0, 5.9), R(0, 0.06)),
    },
    "waves": {
        **LONG, "length": R(1.7, 2.4), "volume": R(0.08, 0.2), "curl": R(0.03, 0.07), "turns": R(0.5, 0.9),
        "curtain": (1.0, 7.6, R(5.0, 5.9), R(0, 0.06)),
    },
    "ringlets": {
        **LONG, "length": R(1.2, 2.0), "lift": 0.3, "volume": R(0.15, 0.4), "gravity": 0.8, "curl": R(0.05, 0.09),
        "turns": R(1.2, 2.0), "curtain": (1.0, 7.6, R(5.6, 6.4), R(0.05, 0.15)),
    },
    "tied": {
        "length": R(0.9, 1.2), "front": 1.1, "flow": "knot", "lift": 0.05, "volume": R(0.02, 0.05), "gravity": 0.0,
        "stiffness": 0.2, "knot": R(-0.3, 0.6),
    },
    "bun": {
        "length": R(0.9, 1.2), "front": 1.1, "flow": "knot", "lift": 0.05, "volume": R(0.02, 0.06), "gravity": 0.0,
        "stiffness": 0.2, "knot": R(0.5, 0.9), "bun": R(0.22, 0.34),
    },
}  # fmt: skip
MEN = ("short", "short", "swept", "cropped", "cropped", "receding", "bald", "curls", "fringe")
WOMEN = ("bob", "long", "long", "waves", "ringlets", "tied", "bun", "short", "bangs")
TIGHT_CURLS = ("afro", "afro", "cropped", "ringlets")


@dataclass(frozen=True)
class BeardShape:
    """Strengths of a beard at jaw, chin and moustache, 0 to 1; its length, and number of ribbons."""

    jaw: float
    chin: float
    moustache: float
    length: float
    count: int = 900


@dataclass(frozen=True)
class Glasses:
    """shape: exponent of a rim's superellipse, 2 is round. width, height: half of a rim's. thickness: of the frame.

    colour: of the frame, and gloss. tint: colour of the lenses, and opacity. has_lower_rim: False for half-rims.
    """

    shape: float
    width: float
    height: float
    thickness: float
    colour: Sequence[float]
    tint: Sequence[float]
    has_lower_rim: bool = True


@dataclass(frozen=True)
class Hat:
    """kind: beanie, cap, brim or headscarf. edge: its height above the skull's middle, by the skull's height.

    colour, band: of the hat and of its edge, and gloss.
    """

    kind: str
    edge: float
    colour: Sequence[float]
    band: Sequence[float]


@dataclass(frozen=True)
class Scarf:
    """thickness: of a scarf around the neck. colour: and gloss."""

    thickness: float
    colour: Sequence[float]


@dataclass(frozen=True)
class Outfit:
    """The beard and accessories of a person; None where there is none."""

    beard: BeardShape | None = None
    glasses: Glasses | None = None
    hat: Hat | None = None
    scarf: Scarf | None = None


def pick(rng: Generator, choices: Sequence[tuple[float, ...]]) -> Colour:
    return np.array(choices[int(rng.integers(len(choices)))])


def cloth(rng: Generator, low: float, high: float) -> Colour:
    """Draw a colour of half saturation."""
    return rng.uniform(low, high, 3) * 0.5 + rng.uniform(low, high) * 0.5


def hair_colour(nature: Nature, rng: Generator) -> Colour:
    colour = pick(rng, LIGHT_HAIR if rng.random() < nature.ancestry[0] else DARK_HAIR)
    grey = max(0.0, 1.4 * nature.old - 0.3) * rng.uniform(0.2, 1)
    colour = colour + min(grey, 0.95) * (GREY - colour)
    return pick(rng, DYED_HAIR) if rng.random() < 0.04 else colour


def drawn(rng: Generator, value: Any) -> Any:
    """Draw a number from each range (low, high) of a nested value; leave the rest as it is."""
    if isinstance(value, Range):
        return float(rng.uniform(value.low, value.high))
    return tuple(drawn(rng, each) for each in value) if isinstance(value, tuple) else value


def hair_style(nature: Nature, rng: Generator) -> HairStyle:
    """Draw a style for a person."""
    names = [*(MEN if nature.male > 0.5 else WOMEN), *(TIGHT_CURLS if nature.ancestry[2] > 0.5 else ())]
    name = names[int(rng.integers(len(names)))]
    values = {key: drawn(rng, value) for key, value in STYLES[name].items()}
    fringe = values.pop("fringe", (float(rng.uniform(-0.06, 0.06)), float(rng.uniform(-0.15, 0.12))))
    parting = float(rng.choice((-1, 1)) * rng.uniform(0.05, 0.4))
    # No hair is quite straight.
    curl = values.pop("curl", 0.0) + float(rng.uniform(0, 0.012))
    return HairStyle(name, **values, fringe=fringe, parting=parting, curl=curl)


def beard_shape(nature: Nature, rng: Generator) -> BeardShape | None:
    """Draw a beard for a man, or None."""
    if nature.male < 0.6 or rng.random() > 0.4:
        return None
    full, goatee, moustache = (1.0, 1.0, 0.95), (0.0, 1.0, 0.95), (0.0, 0.0, 1.0)
    jaw, chin, lip = (full, full, goatee, moustache)[int(rng.integers(4))]
    return BeardShape(
        jaw, chin, lip, float(rng.uniform(0.05, 0.12) + jaw * rng.beta(1, 4) * 0.35), 700 + int(900 * jaw)
    )


def glasses_of(nature: Nature, rng: Generator) -> Glasses | None:
    if rng.random() > 0.22 + 0.25 * nature.old:
        return None
    tint = (0.75, 0.8, 0.85, rng.uniform(0.02, 0.07))
    if rng.random() < 0.06:
        # Tinted, not opaque: blinks stay visible.
        tint = (*rng.uniform(0.02, 0.2, 3), rng.uniform(0.25, 0.5))
    has_lower_rim = bool(rng.random() < 0.85)
    thickness = rng.uniform(0.008, 0.03) if has_lower_rim else rng.uniform(0.015, 0.028)
    size = rng.uniform(0.85, 1.15)
    return Glasses(
        float(rng.choice((2.0, 2.4, 3.0, 4.0, 5.0))),
        rng.uniform(0.2, 0.25) * size,
        rng.uniform(0.13, 0.21) * size,
        float(thickness),
        tuple(pick(rng, FRAMES)),
        tint,
        has_lower_rim,
    )


def hat_of(nature: Nature, rng: Generator) -> Hat | None:
    if rng.random() > 0.13:
        return None
    kinds = ("beanie", "cap", "brim") if nature.male > 0.5 else ("beanie", "headscarf", "headscarf", "brim")
    kind = str(rng.choice(kinds))
    edges = {"beanie": (0.36, 0.5), "cap": (0.42, 0.52), "brim": (0.42, 0.52), "headscarf": (0.6, 0.6)}
    return Hat(kind, float(rng.uniform(*edges[kind])), (*cloth(rng, 0.01, 0.5), 0.1), (*cloth(rng, 0.01, 0.5), 0.1))


def outfit_of(nature: Nature, rng: Generator) -> Outfit:
    """Draw what a person wears."""
    hat = hat_of(nature, rng)
    scarf = None
    if rng.random() < 0.09 and not (hat and hat.kind == "headscarf"):
        scarf = Scarf(float(rng.uniform(0.14, 0.24)), (*cloth(rng, 0.02, 0.6), 0.1))
    return Outfit(beard_shape(nature, rng), glasses_of(nature, rng), hat, scarf)
