"""A synthetic person from one seed: shape, colours, hair, clothes and accessories, and a place with light and a lens.

Colours are linear light, (red, green, blue) in [0, 1]. The names of `Person.look` are those of the shaders' uniforms.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.synthetic.head import Floats, Head
from training.synthetic.scene import Lens, background, lens_of, lights
from training.synthetic.styles import HairStyle, Nature, Outfit, cloth, hair_colour, hair_style, outfit_of, pick

ANCESTRIES = ("caucasian", "asian", "african")
SKIN_TONES = ((0.80, 0.56, 0.44), (0.78, 0.54, 0.38), (0.26, 0.145, 0.09))
LIGHT_EYES = ((0.16, 0.26, 0.38), (0.20, 0.30, 0.34), (0.14, 0.24, 0.14))
DARK_EYES = ((0.14, 0.065, 0.03), (0.08, 0.04, 0.02), (0.2, 0.12, 0.05))
LIPSTICKS = ((0.55, 0.08, 0.10), (0.60, 0.22, 0.24), (0.38, 0.06, 0.12))
# A hairline of which nothing is below, for heads without hair.
NO_HAIR = (5.0, 0.0)


@dataclass(frozen=True, eq=False)
class Person:
    """The appearance of a person.

    mesh: (n, 3) the head at rest. hair, outfit: what grows and what is worn. seed: of hair and outfit. lens: of the
    camera. background: (192, 192, 3) uint8. look: values for the shaders.
    """

    mesh: Floats
    hair: HairStyle
    outfit: Outfit
    seed: int
    lens: Lens
    background: NDArray[np.uint8]
    look: Mapping[str, Any]


def person_of(head: Head, seed: int) -> Person:
    """Draw the person of a seed."""
    rng = np.random.default_rng(seed)
    nature = Nature(rng.dirichlet([0.45] * 3), float(rng.beta(0.4, 0.4)), float(rng.beta(0.6, 2.0)))
    mesh = shape(head, nature, rng)
    skin = skin_tone(nature, rng)
    hair, outfit = hair_style(nature, rng), outfit_of(nature, rng)
    if outfit.hat is not None and outfit.hat.kind == "headscarf":
        hair = replace(hair, name="bald", count=0, curtain=None)
    if outfit.hat is not None:
        hair = replace(hair, bun=0.0, volume=min(hair.volume, 0.08), cap=0.0)
    if hair.name == "bald":
        hair = replace(hair, fringe=NO_HAIR, cap=0.0)
    # A beard stands on stubble, and many faces without one have some.
    stubble = rng.uniform(0.2, 0.9) if nature.male > 0.6 and rng.random() < 0.3 else 0.0
    shade = {"receding": 0.5, "bald": 0.0 if rng.random() < 0.5 else 0.25}.get(hair.name, 0.9)
    full = outfit.beard.jaw * 0.75 if outfit.beard else 0.0
    made_up = nature.male < 0.35 and rng.random() < 0.45
    look = {
        "skin": skin,
        "lip": lip_colour(skin, made_up, rng),
        "hair": hair_colour(nature, rng),
        "iris": pick(rng, LIGHT_EYES if rng.random() < 0.6 * nature.ancestry[0] else DARK_EYES),
        "shirt": cloth(rng, 0.02, 0.6),
        "shirt2": cloth(rng, 0.02, 0.7),
        **lights(rng),
        "hairline": (*hair.fringe, rng.uniform(-0.12, 0.12), rng.uniform(-2, 2)),
        # height, thickness, arch, strength
        "brow": tuple(rng.uniform((7.52, 0.035, 0.03, 0.6), (7.56, 0.065, 0.08, 1.0))),
        "beard": (max(stubble, full), shade, 0, 0),
        # depth and width of the neck line, pattern: plain, rows, columns, one stripe
        "collar": (rng.uniform(0.1, 0.75), rng.uniform(0.3, 0.7), rng.integers(4), 0),
        # density of strands, parting, swirl
        "strands": (rng.uniform(20, 45), 0, rng.uniform(-0.25, 0.25), rng.uniform(-0.5, 0.5)),
        # strengths of freckles, wrinkles, make-up, uneven colour
        "marks": (
            rng.uniform(0.3, 1.0) if rng.random() < 0.1 + 0.3 * nature.ancestry[0] * skin[0] else 0.0,
            float(np.clip(1.3 * nature.old - 0.1 + rng.normal(0, 0.1), 0.0, 1.0)),
            rng.uniform(0.3, 1.0) if made_up else 0.0,
            rng.uniform(0.5, 1.6),
        ),
        "moles": moles(rng),
        "oil": rng.uniform(0.6, 1.5),
    }
    return Person(mesh, hair, outfit, seed, lens_of(rng), background(rng), look)


def moles(rng: Generator) -> NDArray[np.float64]:
    """Draw four moles on the plain head's face, (4, 4): x, y, radius, strength."""
    places = rng.uniform((-0.6, 6.2, 0.008, 0.3), (0.6, 7.9, 0.022, 0.9), (4, 4))
    places[:, 3] *= rng.random(4) < 0.3
    return places


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


def lip_colour(skin: NDArray[np.float64], is_made_up: bool, rng: Generator) -> NDArray[np.float64]:
    natural = skin * (0.88, 0.52, 0.52) + (0.05, 0, 0.01)
    return natural * 0.5 + pick(rng, LIPSTICKS) * 0.5 if is_made_up else natural
