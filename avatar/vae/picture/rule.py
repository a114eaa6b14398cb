"""The video's size for a picture, under a checkpoint's rule.

Sizes are (width, height), in pixels.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from avatar.checkpoints.fields import Range, check_ranges

Fit = Literal["cover", "reference", "face"]
Size = tuple[int, int]

# Sides of videos of free size are multiples of this, as in the reference; codec and network divide it evenly.
GRID = 64
# Large pictures in the shapes that cameras take: the sizes that are served unless others are chosen are theirs.
USUAL_PICTURES = ((7680, 4320), (4000, 3000), (4000, 4000), (3000, 4000), (4320, 7680))
# The least area has room for one of USUAL_PICTURES; the largest is above that of any camera.
RANGES: dict[str, Range] = {"width": (1, 1 << 13), "height": (1, 1 << 13), "area": (2 * GRID**2, 1 << 26)}
# Times as far that a size counts whose video has bars beside the picture.
BAR_WEIGHT = 3.0


@dataclass(frozen=True)
class PictureRule:
    """The video sizes of a checkpoint or of a deployment, and its default fit.

    Either width and height: the only size; or area: the most pixels of a size that follows the picture's shape or is
    requested. sizes: the only ones within the area, of which a picture gets the one nearest to its shape; empty if all
    are free. A deployment limits its sizes, because it has to prepare for each at its start.
    """

    fit: Fit
    width: int | None = None
    height: int | None = None
    area: int | None = None
    sizes: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        check_fit(self.fit)
        if (self.width is None) != (self.height is None) or (self.width is None) == (self.area is None):
            raise ValueError("a picture rule has either width and height or an area")
        check_ranges(vars(self), RANGES, "picture.")
        # JSON has lists for tuples.
        object.__setattr__(self, "sizes", tuple((width, height) for width, height in self.sizes))
        for width, height in self.sizes:
            if width <= 0 or height <= 0 or width * height > (self.area or 0):
                raise ValueError(f"sizes must have 1 to {self.area or 0} pixels, got {width}x{height}")

    @property
    def fixed_size(self) -> Size | None:
        """The only size; None if there are several, or sizes are free."""
        if self.width is not None and self.height is not None:
            return self.width, self.height
        return self.sizes[0] if len(self.sizes) == 1 else None

    @property
    def all_sizes(self) -> tuple[Size, ...]:
        """All sizes; empty if they are free."""
        return self.sizes if self.fixed_size is None else (self.fixed_size,)

    def limited(self, sizes: tuple[Size, ...] = ()) -> "PictureRule":
        """Return the rule with these sizes only; without any with its own, or those of USUAL_PICTURES.

        ValueError if the checkpoint has no videos of one of them.
        """
        if self.width is not None:
            for size in sizes:
                self.check(size)
            return self
        assert self.area is not None
        usual = (size_within(picture, self.area) for picture in USUAL_PICTURES)
        return replace(self, sizes=sizes or self.sizes or tuple(dict.fromkeys(usual)))

    def video_size(self, picture: Size, requested: Size | int | None = None) -> Size:
        """Return the video's size for a picture's size.

        requested: a size, the most pixels, or None for the rule's choice. ValueError as in `check`.
        """
        if requested is not None:
            self.check(requested)
        if self.fixed_size is not None:
            return self.fixed_size
        assert self.area is not None
        if isinstance(requested, tuple):
            return requested
        if self.sizes:
            return nearest_size(picture, within(self.sizes, requested or self.area), self.fit)
        return size_within(picture, requested or self.area)

    def check(self, requested: Size | int) -> None:
        """Raise ValueError unless the checkpoint has videos of this size, (width, height) or an area in pixels."""
        if isinstance(requested, int):
            if self.area is None or not 0 < requested <= self.area:
                most = f"1 to {self.area}" if self.area else "omitted, as there is only one size"
                raise ValueError(f"area must be {most}, got {requested}")
            if self.sizes and not within(self.sizes, requested):
                smallest = min(width * height for width, height in self.sizes)
                raise ValueError(f"area must be at least {smallest}, that of the smallest size, got {requested}")
            return
        width, height = requested
        if self.sizes:
            if requested not in self.sizes:
                expected = f"one of {sizes_text(self.sizes)}, those of this deployment, or left out"
                raise ValueError(f"size must be {expected}, got {width}x{height}")
        elif self.area is None:
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


def sizes_text(sizes: Iterable[Size]) -> str:
    """Return sizes in words: `704x384, 512x512`."""
    return ", ".join(f"{width}x{height}" for width, height in sizes)


def within(sizes: Iterable[Size], area: int) -> list[Size]:
    """Return the sizes of at most `area` pixels."""
    return [(width, height) for width, height in sizes if width * height <= area]


def nearest_size(picture: Size, sizes: Iterable[Size], fit: Fit) -> Size:
    """Return the size whose shape is nearest to a picture's; of equally near ones the largest.

    A size in which the fit `reference` leaves bars beside the picture counts as BAR_WEIGHT times as far.
    """

    def distance(size: Size) -> tuple[float, int]:
        scale = min(size) / min(picture)
        has_bars = any(side * scale < wanted for side, wanted in zip(picture, size, strict=True))
        ratio = (size[0] / size[1]) / (picture[0] / picture[1])
        weight = BAR_WEIGHT if has_bars and fit == "reference" else 1.0
        return weight * abs(math.log(ratio)), -size[0] * size[1]

    return min(sizes, key=distance)


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
