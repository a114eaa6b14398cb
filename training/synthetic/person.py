"""A synthetic person from one seed: shape, colours, hair, shirt, light and a still background.

Colours are linear light, (red, green, blue) in [0, 1]. The names of `Person.look` are those of the shaders' uniforms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.synthetic.head import Floats, Head

ANCESTRIES = ("caucasian", "asian", "african")
SKIN_TONES = ((0.80, 0.56, 0.44), (0.78, 0.54, 0.38), (0.26, 0.145, 0.09))
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
LIGHT_EYES = ((0.16, 0.26, 0.38), (0.20, 0.30, 0.34), (0.14, 0.24, 0.14))
DARK_EYES = ((0.14, 0.065, 0.03), (0.08, 0.04, 0.02), (0.2, 0.12, 0.05))
LIPSTICKS = ((0.55, 0.08, 0.10), (0.60, 0.22, 0.24), (0.38, 0.06, 0.12))
BACKGROUND_SIDE = 96


@dataclass(frozen=True, eq=False)
class Person:
    """The appearance of a person.

    mesh: (n, 3) the head at rest. puff: volume of the hair. curtain: reach, top, bottom and bulge of the sheet of hair
    at the back, None for hair without one. background: (96, 96, 3) uint8. look: values for the shaders.
    """

    mesh: Floats
    puff: float
    curtain: tuple[float, float, float, float] | None
    background: NDArray[np.uint8]
    look: Mapping[str, Any]


@dataclass(frozen=True)
class Nature:
    """Traits that shape, colours and styles depend on. ancestry: three shares that sum to 1. male, old: 0 to 1."""

    ancestry: NDArray[np.float64]
    male: float
    old: float


def person_of(head: Head, seed: int) -> Person:
    """Draw the person of a seed."""
    rng = np.random.default_rng(seed)
    nature = Nature(rng.dirichlet([0.45] * 3), float(rng.beta(0.4, 0.4)), float(rng.beta(0.6, 2.2)))
    mesh = shape(head, nature, rng)
    skin = skin_tone(nature, rng)
    style, puff, fringe, curtain = hair_style(nature, rng)
    stubble = rng.uniform(0.3, 1) if nature.male > 0.6 and rng.random() < 0.4 else rng.uniform(0, 0.15)
    warmth = rng.uniform(-0.12, 0.12)
    look = {
        "skin": skin,
        "lip": lip_colour(nature, skin, rng),
        "hair": hair_colour(nature, rng),
        "iris": pick(rng, LIGHT_EYES if rng.random() < 0.6 * nature.ancestry[0] else DARK_EYES),
        "shirt": cloth(rng, 0.02, 0.6),
        "shirt2": cloth(rng, 0.02, 0.7),
        "lights": lights(rng, warmth),
        "sky": rng.uniform(0.16, 0.28) * np.array((1 - warmth, 1.02, 1.08 + warmth)),
        "ground": rng.uniform(0.08, 0.14) * np.array((1.1, 1, 0.95)),
        "hairline": (*fringe, rng.uniform(-0.12, 0.12), rng.uniform(-2, 2)),
        # height, thickness, arch, strength
        "brow": tuple(rng.uniform((7.52, 0.035, 0.03, 0.6), (7.56, 0.065, 0.08, 1.0))),
        "beard": (stubble if nature.male > 0.6 else 0, 0.5 if style == "receding" else 0.9, 0, 0),
        # depth and width of the neck line, pattern: plain, rows, columns, one stripe
        "collar": (rng.uniform(0.1, 0.75), rng.uniform(0.3, 0.7), rng.integers(4), 0),
        # density of strands, parting, swirl
        "strands": (rng.uniform(20, 45), 0, rng.uniform(-0.25, 0.25), rng.uniform(-0.5, 0.5)),
    }
    return Person(mesh, puff, curtain, background(rng), look)


def pick(rng: Generator, choices: Sequence[tuple[float, ...]]) -> NDArray[np.float64]:
    return np.array(choices[int(rng.integers(len(choices)))])


def shape(head: Head, nature: Nature, rng: Generator) -> Floats:
    """Return the mesh at rest: a blend of twelve typical heads, with random details."""
    mesh = head.base.copy()
    for (ancestry, sex, age), change in head.macros.items():
        share = nature.ancestry[ANCESTRIES.index(ancestry)]
        share *= nature.male if sex == "male" else 1 - nature.male
        share *= nature.old if age == "old" else 1 - nature.old
        mesh += change * np.float32(share)
    for less, more in head.details:
        amount = np.float32(np.clip(rng.normal(0, 0.24), -0.6, 0.6))
        mesh += (more if amount > 0 else less) * abs(amount)
    return mesh


def skin_tone(nature: Nature, rng: Generator) -> NDArray[np.float64]:
    """Mix skin tones as square roots, which is closer to perception."""
    tone = np.sqrt(SKIN_TONES).T @ nature.ancestry + rng.normal(0, 0.02, 3) + rng.normal(0, 0.035)
    return np.clip(tone, 0.25, 0.95) ** 2


def hair_colour(nature: Nature, rng: Generator) -> NDArray[np.float64]:
    colour = pick(rng, LIGHT_HAIR if rng.random() < nature.ancestry[0] else DARK_HAIR)
    colour = colour + nature.old * rng.uniform(0.2, 1) * (GREY - colour)
    return pick(rng, DYED_HAIR) if rng.random() < 0.04 else colour


def hair_style(
    nature: Nature, rng: Generator
) -> tuple[str, float, tuple[float, float], tuple[float, float, float, float] | None]:
    """Draw the name of a style, its volume, height and dents of the hairline, and the curtain if it has one."""
    men, women = ("short", "short", "cropped", "receding"), ("bob", "long", "long", "short", "tied")
    styles = men if nature.male > 0.5 else women
    style = styles[rng.integers(len(styles))]
    puff = {"cropped": 0.03, "receding": 0.08, "tied": 0.05}.get(style) or rng.uniform(0.10, 0.2)
    fringe = {
        "receding": (0.05, rng.uniform(0.15, 0.4)),
        "cropped": (0.02, rng.uniform(0, 0.15)),
    }.get(style, (rng.uniform(-0.06, 0.06), rng.uniform(-0.15, 0.12)))
    curtain = {
        "bob": (rng.uniform(0.95, 1.08), 7.6, rng.uniform(6.1, 6.5), rng.uniform(0.04, 0.10)),
        "long": (rng.uniform(0.85, 1.0), 7.6, rng.uniform(5.0, 5.8), rng.uniform(0, 0.06)),
        "short": (0.5, 7.4, 6.6, -0.04),
    }.get(style)
    return style, puff, fringe, curtain


def lip_colour(nature: Nature, skin: NDArray[np.float64], rng: Generator) -> NDArray[np.float64]:
    natural = skin * (0.88, 0.52, 0.52) + (0.05, 0, 0.01)
    return natural * 0.5 + pick(rng, LIPSTICKS) * 0.5 if nature.male < 0.4 and rng.random() < 0.4 else natural


def cloth(rng: Generator, low: float, high: float) -> NDArray[np.float64]:
    """Draw a colour of half saturation."""
    return rng.uniform(low, high, 3) * 0.5 + rng.uniform(low, high) * 0.5


def lights(rng: Generator, warmth: float) -> NDArray[np.float64]:
    """Draw direction and colour of a key light, a fill light from the other side, and a back light: (6, 3)."""
    side = rng.uniform(-1, 1)
    return np.array(
        [
            (side, rng.uniform(0.3, 0.9), 0.9),
            rng.uniform(0.75, 1.05) * np.array((1 + warmth, 1, 1 - warmth)),
            (-np.sign(side) * 0.9, rng.uniform(0, 0.4), 0.6),
            rng.uniform(0.12, 0.3) * np.array((1 - warmth, 1, 1 + warmth)),
            (rng.uniform(-0.6, 0.6), 0.5, -0.9),
            rng.uniform(0.2, 0.6) * np.ones(3),
        ]
    )


def background(rng: Generator) -> NDArray[np.uint8]:
    """Draw a soft background (96, 96, 3): a gradient, a few panels and blurred lamps."""
    side = BACKGROUND_SIDE * 1j
    y, x = np.mgrid[-1:1:side, -1:1:side]
    ends = [rng.uniform(0.05, 0.8, 3) * 0.6 + rng.uniform(0.05, 0.5) for _ in range(2)]
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.clip((np.cos(angle) * x + np.sin(angle) * y) * 0.5 + 0.5, 0, 1)[..., None]
    picture = ends[0] * (1 - ramp) + ends[1] * ramp

    def inside(distance: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1 / (1 + np.exp(-distance / 0.03))

    for _ in range(rng.integers(0, 5)):
        (left, top), (width, height) = rng.uniform(-1, 1, 2), rng.uniform(0.1, 0.5, 2)
        panel = inside(width - abs(x - left)) * inside(height - abs(y - top))
        picture += panel[..., None] * rng.uniform(-0.2, 0.2, 3)
    for _ in range(rng.integers(0, 4)):
        (left, top), radius = rng.uniform(-1, 1, 2), rng.uniform(0.05, 0.2)
        picture += inside(radius - np.hypot(x - left, y - top))[..., None] * rng.uniform(0, 0.3, 3)
    picture = 0.55 * picture + 0.45 * picture.mean(2, keepdims=True)  # less saturated, as real rooms are
    pixels: NDArray[np.uint8] = (np.clip(picture, 0.02, 0.98) * 255).astype(np.uint8)
    return pixels
