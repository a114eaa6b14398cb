"""Colours of a decoded image: transparency, 16 bits, colour profiles and CMYK to 8-bit sRGB."""

import io

from PIL import Image, ImageCms

GREY_16 = ("I", "I;16", "I;16B", "I;16L")
# 65535 / 255
STEPS = 257


def plain_mode(image: Image.Image) -> Image.Image:
    """Return an image as L, LA, RGB, RGBA or CMYK: 16 bits scaled to 8, palettes and colour keys applied.

    Scaling makes 255 of 65535. A colour key is a single colour that counts as transparent.
    """
    if image.mode in GREY_16:
        return grey_8(image)
    if image.mode in ("RGBA", "LA", "CMYK"):
        return image
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def grey_8(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to L, or to LA if a colour key makes one of its values transparent."""
    import numpy as np  # takes longer to import than most pictures to decode

    values = np.asarray(image).astype(np.uint16, copy=False)
    rounded = (np.arange(1 << 16) + STEPS // 2) // STEPS
    grey = Image.fromarray(rounded.astype(np.uint8)[values])
    if (key := image.info.get("transparency")) is None:
        return grey
    alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def over_white(image: Image.Image) -> Image.Image:
    """Return an RGBA or LA image over white, as RGB or L; others unchanged."""
    if image.mode not in ("RGBA", "LA"):
        return image
    shown = Image.new("RGB" if image.mode == "RGBA" else "L", image.size, "white")
    shown.paste(image.convert(shown.mode), mask=image.getchannel("A"))
    return shown


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an RGB, L or CMYK image from the colours of its ICC profile to sRGB: mode RGB.

    Without a profile, or with one that is damaged or of another colour space than the image, RGB and L count as sRGB.
    """
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(
                image,
                source,
                ImageCms.createProfile("sRGB"),
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                outputMode="RGB",
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
        except (ImageCms.PyCMSError, OSError):
            pass  # viewers show such a picture too, in the colours that it has without the profile
        else:
            assert converted is not None
            return converted
    return image.convert("RGB")
