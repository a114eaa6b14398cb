"""From the bytes of a picture file to pixels of a wanted size.

Nothing is decoded before the header's size has been looked at, so that a small file cannot fill the memory.

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
# Sides of a video whose size is free: the reference implementation's grid, which codec and network divide evenly.
GRID = 64


@dataclass(frozen=True)
class PictureRule:
    """The sizes of video that a checkpoint makes, and how a picture is brought to them if nothing is asked for.

    Either width and height, the one size there is, or area: the most pixels of a size that follows the picture's
    shape, or is asked for.
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
        """The one size there is; None where sizes are free."""
        return None if self.width is None or self.height is None else (self.width, self.height)

    def video_size(self, picture: Size, asked: Size | int | None = None) -> Size:
        """The video's size for a picture's, as asked or of at most that area. ValueError if it is not to be had."""
        if asked is not None:
            self.check(asked)
        if self.fixed_size is not None:
            return self.fixed_size
        assert self.area is not None
        return asked if isinstance(asked, tuple) else size_within(picture, asked or self.area)

    def check(self, asked: Size | int) -> None:
        """ValueError if no video has this size, (width, height) or an area in pixels."""
        if isinstance(asked, int):
            if self.area is None or not 0 < asked <= self.area:
                most = f"1 to {self.area}" if self.area else "left out, as there is one size only"
                raise ValueError(f"area must be {most}, got {asked}")
            return
        width, height = asked
        if self.area is None:
            if asked != self.fixed_size:
                only = f"{self.width}x{self.height}"
                raise ValueError(f"size must be {only}, the only one of this checkpoint, got {width}x{height}")
        elif width <= 0 or height <= 0 or width % GRID or height % GRID:
            raise ValueError(f"width and height must be positive multiples of {GRID}, got {width}x{height}")
        elif width * height > self.area:
            raise ValueError(f"size must have at most {self.area} pixels, got {width}x{height} = {width * height}")


def check_fit(fit: str) -> None:
    """ValueError unless fit is one of ours."""
    if fit not in get_args(Fit):
        raise ValueError(f"fit must be one of {', '.join(get_args(Fit))}, got {fit!r}")


def size_within(picture: Size, area: int) -> Size:
    """The largest size of about the picture's shape on the grid, hardly larger than it, with at most `area` pixels.

    ValueError if the picture is too narrow for any.
    Source: the reference implementation of arXiv 2512.04677. Its smallest scale takes the root of B^2 - 2NC where
    B^2 - 4NC solves the equation; it is kept, since it decides which sizes are tried.
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
    """Decode a picture and bring it to the video's size: (h, w, 3) uint8 RGB.

    data: a PNG, JPEG or WebP file, both sides 16 to 8192 pixels; of an animation the first frame.
    size, fit: what the session asks for, a size or an area; None for the rule's choice.
    With fit "cover" a picture is taken as viewers show it: turned as its EXIF orientation says, transparent parts over
    white. With fit "reference" it is taken as the reference implementation takes it, which ignores both: that fit
    exists for equal numbers, and a photograph that needs turning is better served by "cover".
    ValueError if it is no such picture, or damaged, or the size is not to be had.
    """
    fit = fit or rule.fit
    check_fit(fit)
    image = open_picture(data, fit)
    return fit_picture(image, rule.video_size(image.size, size), fit)


def open_picture(data: bytes, fit: Fit) -> Image.Image:
    """The RGB picture in a file, of its own size. ValueError as in `read_picture`."""
    with pillow_errors():
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_header(image)
    with pillow_errors():
        return upright(image) if fit == "cover" else image.convert("RGB")


def fit_picture(image: Image.Image, size: Size, fit: Fit) -> Tensor:
    """An RGB picture brought to a size: (h, w, 3) uint8."""
    fitted = ImageOps.fit(image, size, Image.Resampling.BICUBIC) if fit == "cover" else fit_reference(image, size)
    return torch.from_numpy(np.array(fitted))


def read_mask(data: bytes, portrait: bytes, size: Size, fit: Fit, cell: int) -> Tensor:
    """Where an actor is, (rows, columns) float32 in [0, 1]: a picture's mean brightness in each cell of the video.

    data: a file as in `read_picture`, white where the portrait shows the actor. portrait: the file of the portrait.
    size, fit: the video's size, and how the portrait is brought to it. cell: side of a cell in pixels, which divides
    the video's sides. ValueError if the mask is no picture, or of another size than the portrait.
    """
    image, shown = open_picture(data, fit), open_picture(portrait, fit)
    if image.size != shown.size:
        raise ValueError(f"a mask must have the portrait's size {shown.size}, got {image.size}")
    brightness = fit_picture(image, size, fit).float().mean(-1) / 255
    return reduce(brightness, "(rows cell) (columns cell2) -> rows columns", "mean", cell=cell, cell2=cell)


def to_pixels(rgb: Tensor) -> Tensor:
    """Bytes (h, w, 3) as numbers (3, h, w) float32 in [-1, 1]."""
    return rearrange(rgb, "h w c -> c h w") / 255 * 2 - 1


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Whatever Pillow has against a picture, as a ValueError."""
    # Pillow warns of odd metadata and of sizes that we allow or refuse ourselves. The filters belong to the process:
    # pictures are read on a device's one thread, so nobody else is inside.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UnidentifiedImageError as error:
            raise ValueError("not a PNG, JPEG or WebP picture; send the bytes of such a file") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"picture is too large, at most {MAX_SIDE} pixels a side are taken: {error}") from error
        except Exception as error:
            # Decoders meet damaged data with exceptions of many kinds: OSError, SyntaxError, struct.error, ...
            raise ValueError(f"picture is damaged or cut short: {error}") from error


def check_header(image: Image.Image) -> None:
    """ValueError if an opened, not yet decoded picture is not one that we take."""
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"picture is too small: {width}x{height}, expected at least {MIN_SIDE} pixels a side")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"picture is too large: {width}x{height}, expected at most {MAX_SIDE} pixels a side")
    if image.mode.startswith(("I", "F")):
        # Pillow would cut 16-bit grey to its lowest byte's range: all white.
        raise ValueError(f"picture must have 8 bits a channel, got mode {image.mode}; save it as 8-bit RGB")


def upright(image: Image.Image) -> Image.Image:
    """The picture as viewers show it, RGB."""
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    shown = Image.new("RGB", image.size, "white")
    shown.paste(layer, mask=layer.getchannel("A"))
    return shown


def fit_reference(image: Image.Image, size: Size) -> Image.Image:
    """Short side to the video's shorter side, then a centre crop; black where the picture does not reach.

    Source: torchvision's Resize(min(size)) and CenterCrop, as the reference implementation applies them.
    """
    short = min(size)
    width, height = image.size
    resized = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    left, top = (crop_offset(have, want) for have, want in zip(resized, size, strict=True))
    # Outside of the picture Pillow's crop is black.
    return image.crop((left, top, left + size[0], top + size[1]))


def crop_offset(have: int, want: int) -> int:
    """Where a centre crop begins; negative where the picture is padded instead. Halves round as torchvision's do."""
    return round((have - want) / 2) if have >= want else -((want - have) // 2)
