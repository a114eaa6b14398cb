"""The surroundings of a person: lights, a camera's lens, and a background with depth.

Colours are linear light, (red, green, blue) in [0, 1], except the background's bytes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.synthetic.motion.curves import smooth

Picture = NDArray[np.float64]

BACKGROUND_SIDE = 192


@dataclass(frozen=True)
class Lens:
    """A camera's lens and place.

    half_view: half the angle of view in degrees. size: of the face in the picture, 1 is the usual. shift: (right, up)
    of the face in the picture, by its side. height: of the camera above the eyes in dm.
    """

    half_view: float = 8.4
    size: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    height: float = 0.15


def lens_of(rng: Generator) -> Lens:
    """Draw a lens, from a telephoto to a notebook's wide-angle."""
    half_view = float(np.exp(rng.uniform(np.log(5.5), np.log(17.0))))
    size = float(rng.uniform(0.9, 1.06))
    shift = (float(rng.normal(0, 0.02)), float(rng.normal(0, 0.012)))
    return Lens(
        half_view, size, (max(-0.05, min(0.05, shift[0])), max(-0.03, min(0.03, shift[1]))), rng.uniform(-0.5, 0.8)
    )


def lights(rng: Generator) -> dict[str, NDArray[np.float64]]:
    """Draw a key light, a fill light from the other side and a back light.

    lights: (6, 3) unit direction and colour of each. sky, ground: colours of light from above and below. softness: of
    shadows, 0 to 1.
    """
    warmth = rng.normal(0, 0.09)
    side = rng.choice((-1, 1)) * rng.uniform(0.05, 1.3)
    contrast = rng.beta(1.6, 1.6)
    key = (0.7 + 0.55 * contrast) * np.array((1 + warmth, 1, 1 - warmth))
    other = rng.normal(0, 0.1)
    fill = (0.5 - 0.42 * contrast) * rng.uniform(0.6, 1.1) * np.array((1 - other, 1, 1 + other))
    back = rng.uniform(0.0, 0.9) * rng.random() * np.array((1 + other, 1, 1 - other))
    ambient = 0.26 - 0.14 * contrast
    directions = [
        (side, rng.uniform(0.15, 1.1), 0.9),
        (-np.sign(side) * 0.9, rng.uniform(-0.2, 0.4), 0.6),
        (rng.choice((-1, 1)) * rng.uniform(0.2, 0.9), rng.uniform(0.2, 0.7), -0.9),
    ]
    units = [np.array(direction) / np.linalg.norm(direction) for direction in directions]
    return {
        "lights": np.array([units[0], key, units[1], fill, units[2], back]),
        "sky": ambient * rng.uniform(0.85, 1.2) * np.array((1 - other, 1.02, 1.06 + other)),
        "ground": ambient * rng.uniform(0.4, 0.7) * np.array((1.1, 1, 0.95)),
        "softness": np.array(rng.uniform(0.25, 1.0)),
    }


def soft_step(distance: Picture, width: float = 0.02) -> Picture:
    return 1 / (1 + np.exp(-np.clip(distance / width, -40, 40)))


def blur(picture: Picture, deviation: float) -> Picture:
    """Blur (side, side, c) with a Gaussian, edge values repeated. deviation: in pixels."""
    if deviation < 0.3:
        return picture
    reach, side = round(4 * deviation), len(picture)
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / deviation) ** 2)
    shares = np.zeros((side, side))
    for offset, share in zip(offsets, kernel / kernel.sum(), strict=True):
        np.add.at(shares, (np.arange(side), np.clip(np.arange(side) + offset, 0, side - 1)), share)
    blurred: Picture = np.einsum("ri,ijc,sj->rsc", shares, picture, shares, optimize=True)
    return blurred


def texture(rng: Generator, side: int, scale: float) -> Picture:
    """Draw noise (side, side) of unit variance whose bumps have a scale in pixels."""
    noise = blur(rng.normal(size=(side, side, 1)), scale)[..., 0]
    result: Picture = noise / (noise.std() + 1e-9)
    return result


class Painter:
    """A picture that is painted from back to front; each layer is blurred by its distance from the head."""

    def __init__(self, rng: Generator) -> None:
        self.rng = rng
        self.side = BACKGROUND_SIDE
        self.y, self.x = np.mgrid[1 : -1 : self.side * 1j, -1 : 1 : self.side * 1j]
        self.picture: Picture = np.zeros((self.side, self.side, 3))

    def colour(self, low: float = 0.05, high: float = 0.7, saturation: float = 0.4) -> NDArray[np.float64]:
        rng = self.rng
        return saturation * rng.uniform(low, high, 3) + (1 - saturation) * rng.uniform(low, high)

    def fill(self, first: NDArray[np.float64], second: NDArray[np.float64], angle: float) -> None:
        """Fill with a gradient."""
        ramp = np.clip((np.cos(angle) * self.x + np.sin(angle) * self.y) * 0.5 + 0.5, 0, 1)[..., None]
        self.picture = first * (1 - ramp) + second * ramp

    def box(
        self, centre: NDArray[np.float64], half: NDArray[np.float64], colour: NDArray[np.float64], opacity: float = 1.0
    ) -> None:
        cover = soft_step(half[0] - abs(self.x - centre[0])) * soft_step(half[1] - abs(self.y - centre[1]))
        self.cover(cover * opacity, colour)

    def cover(self, share: Picture, colour: NDArray[np.float64] | Picture) -> None:
        self.picture = self.picture * (1 - share[..., None]) + colour * share[..., None]

    def defocus(self, deviation: float) -> None:
        self.picture = blur(self.picture, deviation)


def studio(painter: Painter, focus: float) -> None:
    """A plain backdrop with a light spot."""
    rng = painter.rng
    colour = painter.colour(0.03, 0.85, 0.35)
    painter.fill(colour, colour * rng.uniform(0.5, 0.95), rng.uniform(0, 2 * np.pi))
    distance = np.hypot(painter.x - rng.uniform(-0.5, 0.5), painter.y - rng.uniform(-0.3, 0.6))
    painter.picture *= (1 + rng.uniform(0, 0.4) * np.exp(-(distance**2) / 0.6))[..., None]
    painter.picture *= 1 + rng.uniform(0, 0.05) * texture(rng, painter.side, 6.0)[..., None]
    painter.defocus(focus)


def room(painter: Painter, focus: float) -> None:
    """A wall with a corner, pictures, a window or shelves, and a lamp or a plant in front of it."""
    rng = painter.rng
    wall = painter.colour(0.2, 0.8, 0.25)
    painter.fill(wall, wall * rng.uniform(0.65, 0.95), rng.uniform(0, 2 * np.pi))
    if rng.random() < 0.5:
        corner = rng.uniform(-1, 1)
        painter.cover(
            soft_step((painter.x - corner) * rng.choice((-1, 1)), 0.01), painter.picture * rng.uniform(0.7, 0.9)
        )
    if rng.random() < 0.4:
        shelves(painter)
    else:
        for _ in range(rng.integers(0, 4)):
            centre, half = rng.uniform(-1, 1, 2), rng.uniform(0.08, 0.3, 2)
            painter.box(centre, half + 0.03, painter.colour(0.02, 0.5))
            painter.box(centre, half, painter.colour(0.1, 0.9))
            painter.box(
                centre + half * rng.uniform(-0.4, 0.4, 2), half * rng.uniform(0.2, 0.6), painter.colour(0.05, 0.9)
            )
    if rng.random() < 0.45:
        window(painter)
    painter.defocus(focus * 0.7)
    for _ in range(rng.integers(0, 3)):
        furniture(painter)
    painter.defocus(focus * 0.6)


def shelves(painter: Painter) -> None:
    """Shelves of books."""
    rng = painter.rng
    board = painter.colour(0.05, 0.5, 0.3)
    left, right = sorted(rng.uniform(-1.2, 1.2, 2))
    if right - left < 0.7:
        left, right = -1.1, 1.1
    top, gap = rng.uniform(0.5, 1.0), rng.uniform(0.35, 0.55)
    for level in range(5):
        low = top - (level + 1) * gap
        painter.box(
            np.array(((left + right) / 2, low + gap / 2)), np.array(((right - left) / 2, gap / 2)), board * 0.45
        )
        x = left + 0.03
        while x < right - 0.05:
            wide, tall = rng.uniform(0.025, 0.08), gap * rng.uniform(0.55, 0.85)
            if rng.random() < 0.85:
                painter.box(
                    np.array((x + wide / 2, low + tall / 2)),
                    np.array((wide / 2, tall / 2)),
                    painter.colour(0.03, 0.7, 0.6),
                )
            x += wide + 0.008
        painter.box(np.array(((left + right) / 2, low)), np.array(((right - left) / 2, 0.025)), board)


def window(painter: Painter) -> None:
    rng = painter.rng
    centre, half = rng.uniform((-1, -0.1), (1, 0.8)), rng.uniform(0.25, 0.6, 2)
    painter.box(centre, half + 0.05, painter.colour(0.4, 0.9, 0.1))
    bright = rng.uniform(0.7, 1.0)
    painter.box(centre, half, bright * np.array((0.9, 0.97, 1.0)))
    painter.box(centre - (0, 0.5 * half[1]), half * (1, 0.5), painter.colour(0.2, 0.6, 0.5), 0.7)
    painter.box(centre, np.array((0.02, half[1])), painter.colour(0.4, 0.9, 0.1))


def furniture(painter: Painter) -> None:
    """A lamp, a plant or the back of a chair."""
    rng = painter.rng
    x, y = rng.choice((-1, 1)) * rng.uniform(0.5, 1.0), rng.uniform(-0.7, 0.3)
    kind = rng.integers(3)
    if kind == 0:
        glow = np.exp(-(np.hypot(painter.x - x, painter.y - y) ** 2) / rng.uniform(0.05, 0.25))
        painter.picture = painter.picture + glow[..., None] * rng.uniform(0.2, 0.6) * np.array((1.0, 0.8, 0.5))
        painter.box(np.array((x, y)), rng.uniform((0.08, 0.06), (0.16, 0.14)), np.array((1.0, 0.93, 0.75)))
        painter.box(np.array((x, y - 0.6)), np.array((0.012, 0.5)), painter.colour(0.02, 0.3))
    elif kind == 1:
        green = np.array((0.08, 0.25, 0.07)) * rng.uniform(0.5, 2.0)
        for _ in range(14):
            angle, length = rng.uniform(0, np.pi), rng.uniform(0.15, 0.45)
            tip = np.array((np.cos(angle), 0.9 * np.sin(angle))) * length
            relative_x, relative_y = painter.x - x - tip[0] / 2, painter.y - y - tip[1] / 2
            along = (relative_x * tip[0] + relative_y * tip[1]) / length
            away = (relative_x * tip[1] - relative_y * tip[0]) / length
            leaf = soft_step(1 - (along / (0.5 * length)) ** 2 - (away / 0.05) ** 2, 0.15)
            painter.cover(leaf, green * rng.uniform(0.5, 1.3))
    else:
        colour = painter.colour(0.03, 0.6, 0.5)
        round_box = soft_step(
            1 - ((painter.x - x) / rng.uniform(0.2, 0.5)) ** 4 - ((painter.y - y + 0.8) / 0.9) ** 4, 0.1
        )
        painter.cover(round_box, colour)


def outdoors(painter: Painter, focus: float) -> None:
    """A sky, distant trees or houses, and grass."""
    rng = painter.rng
    sky = np.array((0.45, 0.62, 0.85)) * rng.uniform(0.5, 1.1) + rng.uniform(0, 0.25)
    painter.fill(sky * 1.15, sky * 0.8, -np.pi / 2)
    clouds = np.clip(texture(rng, painter.side, 14) * 0.5, 0, 1) * (painter.y > 0) * rng.uniform(0, 1)
    painter.cover(clouds, np.array((0.95, 0.95, 0.97)))
    horizon = rng.uniform(-0.6, 0.4)
    for layer in range(3):
        rough = smooth(rng.normal(size=(painter.side, 1)), 5.0)[:, 0]
        skyline = horizon + 0.25 * (2 - layer) * rng.uniform(0.3, 1) + 0.12 * rough / (rough.std() + 1e-9)
        green = np.array((0.14, 0.24, 0.1)) * rng.uniform(0.4, 1.6) + 0.1 * (2 - layer) * sky
        leaves = 1 + 0.3 * texture(rng, painter.side, 2.0)
        painter.cover(soft_step(skyline[None] - painter.y, 0.02), green * leaves[..., None])
        if layer == 0 and rng.random() < 0.5:
            for _ in range(rng.integers(2, 6)):
                painter.box(
                    rng.uniform((-1, horizon), (1, horizon + 0.3)),
                    rng.uniform(0.1, 0.5, 2),
                    painter.colour(0.2, 0.7, 0.3),
                )
    ground = np.array((0.2, 0.28, 0.1)) * rng.uniform(0.5, 1.5)
    painter.cover(soft_step(horizon - 0.3 - painter.y, 0.03), ground)
    painter.defocus(focus)


def lamps(painter: Painter, focus: float) -> None:
    """An evening street out of focus: discs of light."""
    rng = painter.rng
    dark = painter.colour(0.01, 0.2, 0.5)
    painter.fill(dark, painter.colour(0.01, 0.3, 0.5), rng.uniform(0, 2 * np.pi))
    for _ in range(rng.integers(6, 24)):
        (x, y), radius = rng.uniform(-1, 1, 2), rng.uniform(0.04, 0.16)
        disc = soft_step(radius - np.hypot(painter.x - x, painter.y - y), 0.012)
        painter.picture = painter.picture + disc[..., None] * rng.uniform(0.1, 0.6) * painter.colour(0.3, 1.0, 0.7)
    painter.defocus(0.3 * focus)


def background(rng: Generator) -> NDArray[np.uint8]:
    """Draw a background (192, 192, 3), row 0 at the top: a studio, a room, outdoors or an evening's lamps."""
    painter = Painter(rng)
    focus = float(rng.choice((0.6, 1.5, 3.0, 5.0, 8.0)))
    kinds = (studio, room, room, outdoors, lamps)
    kinds[int(rng.choice(5, p=(0.25, 0.25, 0.2, 0.2, 0.1)))](painter, focus)
    # Less saturated, as real places are.
    picture = 0.8 * painter.picture + 0.2 * painter.picture.mean(2, keepdims=True)
    vignette = 1 - rng.uniform(0, 0.25) * (painter.x**2 + painter.y**2)[..., None] / 2
    pixels: NDArray[np.uint8] = (np.clip(picture * vignette, 0.01, 0.99) * 255).astype(np.uint8)
    return pixels
