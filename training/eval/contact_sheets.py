"""Contact sheets of frames, and plots of metrics, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
MARGIN = 48


def save_sheet(path: Path, rows: Sequence[Tensor]) -> None:
    """Write rows of pictures, each row (n, 3, h, w) in [-1, 1], as one PNG."""
    sheet = rearrange(torch.stack(list(rows)), "row n c h w -> (row h) (n w) c")
    data = ((sheet.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(data.numpy()).save(path)


def save_plot(
    path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], size: tuple[int, int] = (900, 480)
) -> None:
    """Write curves, lists of points (x, y) by name, on common axes as a PNG."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    width, height = size[0] - 2 * MARGIN, size[1] - 2 * MARGIN

    def position(x: float, y: float) -> tuple[float, float]:
        return (
            MARGIN + width * (x - left) / ((right - left) or 1),
            MARGIN + height * (high - y) / ((high - low) or 1),
        )

    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + share * (right - left), low + share * (high - low)
        draw.line([position(left, y), position(right, y)], "#dddddd")
        draw.text((4, position(left, y)[1] - 6), f"{y:.4g}", "black")
        draw.text((position(x, low)[0] - 12, size[1] - MARGIN + 8), f"{x:.4g}", "black")
    for i, (name, curve) in enumerate(curves.items()):
        draw.line([position(*point) for point in curve], COLOURS[i % len(COLOURS)], 2)
        draw.text((MARGIN + 8 + 180 * i, 16), name, COLOURS[i % len(COLOURS)])
    image.save(path)
