"""Pictures with faces: the shipped portraits on a background of waves."""

from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[3]
PORTRAITS = [ROOT / "assets/portrait.png", *sorted((ROOT / "assets/portraits").glob("*.png"))]
# Side of the face in a portrait over that of the portrait, and its centre's distance from the top likewise.
SIDE, CENTRE = 0.56, 0.55


def portrait(number: int) -> Image.Image:
    return Image.open(PORTRAITS[number]).convert("RGB")


def background(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = np.stack([np.sin(x / 17 + y / 31), np.sin(y / 13), np.sin(x / 11 - y / 23)], 2)
    return Image.fromarray((127.5 + 90 * waves).astype(np.uint8))


def scene(size: tuple[int, int], *faces: tuple[float, float, float], start: int = 0) -> Image.Image:
    """Return a picture with a portrait for each face: (x, y) of its centre and its side, in pixels."""
    image = background(*size)
    for number, (x, y, side) in enumerate(faces, start):
        length = round(side / SIDE)
        corner = (round(x - length / 2), round(y - length * CENTRE))
        image.paste(portrait(number).resize((length, length), Image.Resampling.LANCZOS), corner)
    return image
