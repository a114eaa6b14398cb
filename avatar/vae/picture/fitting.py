"""Fits of an image to the video's size.

Sizes are (width, height), in pixels.
"""

from PIL import Image, ImageOps

from avatar.vae.face.crop import Box, clipped
from avatar.vae.picture.rule import Fit, Size


def fit_image(image: Image.Image, size: Size, fit: Fit) -> Image.Image:
    """Fit an image of any mode to a size, at its centre.

    "cover" and "face" crop it to the size's shape, "reference" as `fit_reference`.
    """
    return fit_reference(image, size) if fit == "reference" else ImageOps.fit(image, size, Image.Resampling.BICUBIC)


def fit_crop(image: Image.Image, size: Size, crop: Box) -> Image.Image:
    """Fit a crop of an image of any mode to a size. Where it reaches beyond the image, the image's edge is repeated.

    crop: in the shape of the size. It reaches beyond the image's width or its height, but not both.
    """
    width, height = size
    scale = width / (crop[2] - crop[0])
    inside = clipped(crop, image.size)
    left, right = (round((x - crop[0]) * scale) for x in inside[::2])
    top, bottom = (round((y - crop[1]) * scale) for y in inside[1::2])
    part = image.resize((right - left, bottom - top), Image.Resampling.BICUBIC, box=inside)
    if part.size == size:
        return part
    fitted = Image.new(image.mode, size)
    fitted.paste(part, (left, top))
    across, down = part.size
    for edge, space in (
        ((0, 0, 1, down), (0, top, left, bottom)),
        ((across - 1, 0, across, down), (right, top, width, bottom)),
        ((0, 0, across, 1), (left, 0, right, top)),
        ((0, down - 1, across, down), (left, bottom, right, height)),
    ):
        extent = (space[2] - space[0], space[3] - space[1])
        if min(extent) > 0:
            fitted.paste(part.crop(edge).resize(extent), space)
    return fitted


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
