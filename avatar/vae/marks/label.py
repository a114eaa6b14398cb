"""The mark for people: a label, drawn into the pixels.

Axes: f frames, h w height and width of frames.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LABEL = "AI"
# Sizes, as parts of the frames' shorter side: of the font, of the box's border, and of the gap to the frame's edges.
FONT_PART, BORDER_PART, GAP_PART = 1 / 8, 1 / 48, 1 / 32
# The smallest font that can be read, in pixels.
MIN_FONT = 12


def draw_label(frames: NDArray[np.uint8]) -> None:
    """Draw the label into the upper left corner of frames (f, h, w, 3) uint8 RGB, in place.

    The box is opaque, so that its contrast does not depend on the picture and its bytes are the same in every frame.
    """
    height, width = frames.shape[1:3]
    box = _label(min(height, width))
    gap = _even(min(height, width) * GAP_PART)
    frames[:, gap : gap + box.shape[0], gap : gap + box.shape[1]] = box


@lru_cache(maxsize=16)
def _label(side: int) -> NDArray[np.uint8]:
    """Return the label (h, w, 3), white on black, for frames whose shorter side has so many pixels."""
    font, border = ImageFont.load_default(max(MIN_FONT, side * FONT_PART)), max(2, round(side * BORDER_PART))
    left, top, right, bottom = font.getbbox(LABEL)
    # Even sides, on even pixels: 4:2:0 then has no colours of the picture in the box.
    size = _even(right - left + 2 * border), _even(bottom - top + 2 * border)
    image = Image.new("RGB", size)
    centre = ((size[0] - left - right) / 2, (size[1] - top - bottom) / 2)
    ImageDraw.Draw(image).text(centre, LABEL, "white", font)
    return np.asarray(image)


def _even(length: float) -> int:
    return 2 * math.ceil(length / 2)
