"""The video's size for a picture, under a checkpoint's rule.

Sizes are (width, height), in pixels.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Fit = Literal["cover", "reference", "face"]
Size = tuple[int, int]

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
