"""Effects of cameras and files, so that pictures lean towards photographs: colour, blur, noise, JPEG.

A clip's effects are drawn once; noise changes from frame to frame.

Axes: h w height and width of pictures.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Pixels = NDArray[np.uint8]

# Shares of clips with each effect.
GRADED, SOFT, NOISY, COMPRESSED, DARK_CORNERS = 0.6, 0.35, 0.2, 0.2, 0.25


@dataclass(frozen=True, eq=False)
class Photo:
    """Effects on all pictures of a clip.

    curves: (256, 3) bytes to bytes, of each channel. blur: deviation in pixels; negative sharpens. corners: darkness at
    the corners, 0 to 1. noise: (n, n, 3) field of noise, in bytes, None without. quality: of JPEG, None without.
    """

    curves: Pixels
    blur: float
    corners: float
    noise: NDArray[np.float32] | None
    quality: int | None
    seed: int

    def develop(self, pixels: Pixels, frame: int) -> Pixels:
        """Apply the effects to a picture (h, w, 3). frame: decides on the noise."""
        height, width = pixels.shape[:2]
        # Channel by channel.
        graded = np.stack([self.curves[pixels[..., channel], channel] for channel in range(3)], 2)
        image = Image.fromarray(graded)
        if self.blur > 0:
            image = image.filter(ImageFilter.GaussianBlur(self.blur))
        elif self.blur < 0:
            image = image.filter(ImageFilter.UnsharpMask(1.0, round(-100 * self.blur), 0))
        if self.corners or self.noise is not None:
            values = np.asarray(image, np.float32)
            if self.corners:
                y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
                values = values * (1 - self.corners * (x * x + y * y) / 2)[..., None]
            if self.noise is not None:
                # Another part of the field for each frame, mirrored at random.
                rng = np.random.default_rng((self.seed, frame))
                top, left = rng.integers(0, np.array(self.noise.shape[:2]) - (height, width) + 1)
                part = self.noise[top : top + height, left : left + width]
                values = values + part[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
            image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
        if self.quality is not None:
            file = io.BytesIO()
            image.save(file, "jpeg", quality=self.quality)
            image = Image.open(file)
        return np.array(image)


def photo_of(rng: Generator, size: int, seed: int, has_noise: bool = True) -> Photo:
    """Draw a clip's effects on pictures of size x size pixels.

    seed: of the noise from frame to frame. has_noise: False leaves out noise and JPEG, which no codec can reproduce,
    from pictures that codecs are compared with.
    """
    values, scale = np.linspace(0, 1, 256)[:, None], size / 256
    curves = np.tile(values, 3)
    if rng.random() < GRADED:
        contrast, gamma = rng.uniform(0.85, 1.25), np.exp(rng.normal(0, 0.12))
        cast = rng.normal(0, 0.035, 3) - 0.5 * rng.normal(0, 0.035)
        curves = 0.5 + (values**gamma - 0.5) * contrast + rng.normal(0, 0.03)
        curves = rng.uniform(0, 0.04) + curves * (1 + cast)
    blur = 0.0
    if rng.random() < SOFT:
        blur = float(rng.uniform(0.3, 0.9) * scale if rng.random() < 0.7 else rng.uniform(-0.8, -0.3))
    noise = None
    if rng.random() < NOISY:
        side = round(1.25 * size)
        fine = rng.standard_normal((side, side, 3)).astype(np.float32)
        # Colour noise is coarser and weaker than that of brightness.
        grey = fine.mean(2, keepdims=True) * np.float32(np.sqrt(3))
        noise = np.float32(rng.uniform(0.5, 1.8)) * (0.8 * grey + 0.45 * fine)
    quality = int(rng.integers(55, 93)) if rng.random() < COMPRESSED else None
    corners = float(rng.uniform(0.1, 0.45)) if rng.random() < DARK_CORNERS else 0.0
    pixels: Pixels = np.rint(255 * np.clip(curves, 0, 1)).astype(np.uint8)
    return Photo(pixels, blur, corners, noise if has_noise else None, quality if has_noise else None, seed)
