"""Picture files to pixels of the video's size.

    bytes --check the header--> Pillow image --decode, fit--> (h, w, 3) uint8

Nothing is decoded before the header's size is checked, so that a small file cannot fill the memory.

Axes: h w height and width, in pixels. Sizes are (width, height).
"""

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from einops import rearrange, reduce
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Fit = Literal["cover", "reference"]
Size = tuple[int, int]

FORMATS = ("PNG", "JPEG", "WEBP")
MIN_SIDE = 16
MAX_SIDE = 8192
# Sides of videos of free size are multiples of this, as in the reference; codec and network divide it evenly.
GRID = 64


@dataclass(frozen=True)
class PictureRule:
    """The video sizes of a checkpoint, and its default fit.

    Either width and height: the only size; or area: the most pixels of a size that follows the picture's shape or is
    requested.
    """

    fit: Fit
    width: int | None = None
    height: int | None = None
    area: int | None = None

    def __post_init__(self) -> None:
        check_fit(self.fit)
        if (self.width is None) != (self.height is None) or (self.width is None) == (self.area is None):
            raise ValueError("a picture rule has either width and height or an area")
        if any(value is not None and value <= 0 for value in (self.width, self.height, self.area)):
            raise ValueError(f"a picture rule's numbers must be positive: {self}")

    @property
    def fixed_size(self) -> Size | None:
        """The only size; None if sizes are free."""
        return None if self.width is None or self.height is None else (self.width, self.height)

    def video_size(self, picture: Size, requested: Size | int | None = None) -> Size:
        """Return the video's size for a picture's size.

        requested: a size, the most pixels, or None for the rule's choice. ValueError as in `check`.
        """
        if requested is not None:
            self.check(requested)
        if self.fixed_size is not None:
            return self.fixed_size
        assert self.area is not None
        return requested if isinstance(requested, tuple) else size_within(picture, requested or self.area)

    def check(self, requested: Size | int) -> None:
        """Raise ValueError unless the checkpoint has videos of this size, (width, height) or an area in pixels."""
        if isinstance(requested, int):
            if self.area is None or not 0 < requested <= self.area:
                most = f"1 to {self.area}" if self.area else "omitted, as there is only one size"
                raise ValueError(f"area must be {most}, got {requested}")
            return
        width, height = requested
        if self.area is None:
            if requested != self.fixed_size:
                only = f"{self.width}x{self.height}"
                raise ValueError(f"size must be {only}, the only one of this checkpoint, got {width}x{height}")
        elif width <= 0 or height <= 0 or width % GRID or height % GRID:
            raise ValueError(f"width and height must be positive multiples of {GRID}, got {width}x{height}")
        elif width * height > self.area:
            raise ValueError(f"size must have at most {self.area} pixels, got {width}x{height} = {width * height}")


def check_fit(fit: str) -> None:
    """Raise ValueError unless fit is one of `Fit`."""
    if fit not in get_args(Fit):
        raise ValueError(f"fit must be one of {', '.join(get_args(Fit))}, got {fit!r}")


def size_within(picture: Size, area: int) -> Size:
    """Return the largest size on the grid with about the picture's aspect ratio and at most `area` pixels.

    A picture is hardly enlarged. ValueError if it is too narrow for any size.
    Source: the reference implementation of arXiv 2512.04677. Its smallest scale takes the root of B^2 - 2NC where
    B^2 - 4NC solves the equation; this is kept, since it decides which sizes are tried.
    """
    width, height = picture
    pixels = width * height
    largest, smallest = 1.0, 0.1
    if pixels > area:
        b, c = -(GRID - 1) * (height + width), (GRID - 1) ** 2 - area
        smallest = (b + math.sqrt(b * b - 2 * pixels * c)) / (2 * pixels)
        largest = math.sqrt(area / pixels)
    for i in range(100):
        scale = largest - (largest - smallest) * i / 100
        size = (math.ceil(int(width * scale) / GRID) * GRID, math.ceil(int(height * scale) / GRID) * GRID)
        if size[0] * size[1] <= area:
            break
    else:
        size = (
            math.floor((area * width / height) ** 0.5 / GRID) * GRID,
            math.floor((area * height / width) ** 0.5 / GRID) * GRID,
        )
        if size[0] >= width or size[1] >= height:
            size = (width // GRID * GRID, height // GRID * GRID)
    if 0 in size:
        raise ValueError(f"a picture of {width}x{height} is too narrow for a video of at most {area} pixels")
    return size


def read_picture(data: bytes, rule: PictureRule, size: Size | int | None = None, fit: Fit | None = None) -> Tensor:
    """Decode a picture and fit it to the video's size: (h, w, 3) uint8 RGB.

    data: a PNG, JPEG or WebP file, both sides 16 to 8192 pixels; an animation gives its first frame.
    size, fit: the session's size or area, and its fit; None for the rule's choice.
    Fit "cover" shows the picture as viewers do (EXIF orientation applied, transparent parts over white), cropped to the
    video's shape. Fit "reference" equals the reference implementation, which ignores orientation and transparency and
    pads with black; it exists for equal numbers.
    ValueError if the file is no such picture or damaged, or the size or fit is not available.
    """
    fit = fit or rule.fit
    check_fit(fit)
    image = open_picture(data, fit)
    return fit_picture(image, rule.video_size(image.size, size), fit)


def open_picture(data: bytes, fit: Fit) -> Image.Image:
    """Decode a file to an RGB image of its own size. ValueError as in `read_picture`."""
    with pillow_errors():
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_header(image)
    with pillow_errors():
        return upright(image) if fit == "cover" else image.convert("RGB")


def fit_picture(image: Image.Image, size: Size, fit: Fit) -> Tensor:
    """Fit an RGB image to a size: (h, w, 3) uint8."""
    fitted = ImageOps.fit(image, size, Image.Resampling.BICUBIC) if fit == "cover" else fit_reference(image, size)
    return torch.from_numpy(np.array(fitted))


def read_mask(data: bytes, portrait: bytes, size: Size, fit: Fit, cell: int) -> Tensor:
    """Read an actor's mask: (rows, columns) float32 in [0, 1], the mask's mean brightness in each cell of the video.

    data: a file as in `read_picture`, white where the portrait shows the actor. portrait: the file of the portrait.
    size, fit: the video's size, and the portrait's fit. cell: side of a cell in pixels; it divides the video's sides.
    ValueError if the mask is no picture, or of another size than the portrait.
    """
    image, shown = open_picture(data, fit), open_picture(portrait, fit)
    if image.size != shown.size:
        raise ValueError(f"a mask must have the portrait's size {shown.size}, got {image.size}")
    brightness = fit_picture(image, size, fit).float().mean(-1) / 255
    return reduce(brightness, "(rows cell) (columns cell2) -> rows columns", "mean", cell=cell, cell2=cell)


def to_pixels(rgb: Tensor) -> Tensor:
    """Convert uint8 (h, w, 3) to float32 (3, h, w) in [-1, 1]."""
    return rearrange(rgb, "h w c -> c h w") / 255 * 2 - 1


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Turn Pillow's errors into ValueError, and silence its warnings."""
    # Pillow warns about odd metadata and about sizes that `check_header` decides on. Warning filters are global to the
    # process; pictures are read on a device's only thread, so no other reader interferes.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UnidentifiedImageError as error:
            raise ValueError("not a PNG, JPEG or WebP picture; send the bytes of such a file") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"picture is too large, at most {MAX_SIDE} pixels a side are accepted: {error}") from error
        except Exception as error:
            # Decoders raise many exceptions on damaged data: OSError, SyntaxError, struct.error and others.
            raise ValueError(f"picture is damaged or cut short: {error}") from error


def check_header(image: Image.Image) -> None:
    """Raise ValueError if an opened, not yet decoded image has an unsupported size or mode."""
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"picture is too small: {width}x{height}, expected at least {MIN_SIDE} pixels a side")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"picture is too large: {width}x{height}, expected at most {MAX_SIDE} pixels a side")
    if image.mode.startswith(("I", "F")):
        # Pillow would clip 16-bit grey to 8 bits: all white.
        raise ValueError(f"picture must have 8 bits a channel, got mode {image.mode}; save it as 8-bit RGB")


def upright(image: Image.Image) -> Image.Image:
    """Return an RGB image as viewers show it: EXIF orientation applied, transparent parts over white."""
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    shown = Image.new("RGB", image.size, "white")
    shown.paste(layer, mask=layer.getchannel("A"))
    return shown


def fit_reference(image: Image.Image, size: Size) -> Image.Image:
    """Scale the image's short side to the video's shorter side, then crop the centre, padding with black.

    Source: torchvision's Resize(min(size)) and CenterCrop, as the reference implementation applies them.
    """
    short = min(size)
    width, height = image.size
    resized = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    left, top = (crop_offset(have, want) for have, want in zip(resized, size, strict=True))
    # Pillow's crop is black outside the image.
    return image.crop((left, top, left + size[0], top + size[1]))


def crop_offset(have: int, want: int) -> int:
    """Return a centre crop's offset, negative if the image is padded instead; halves round as in torchvision."""
    return round((have - want) / 2) if have >= want else -((want - have) // 2)
