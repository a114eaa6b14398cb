"""Fits of an image to the video's size.

Sizes are (width, height), in pixels.
"""

from PIL import Image, ImageOps

from avatar.vae.picture.rule import Fit, Size


def fit_image(image: Image.Image, size: Size, fit: Fit) -> Image.Image:
    """Fit an image of any mode to a size: "cover" crops it to the size's shape, "reference" as `fit_reference`."""
    return ImageOps.fit(image, size, Image.Resampling.BICUBIC) if fit == "cover" else fit_reference(image, size)


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
