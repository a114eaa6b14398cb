"""Tests of avatar.vae.pose."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from avatar.vae.picture.fitting import fit_reference
from avatar.vae.picture.reading import to_pixels
from avatar.vae.pose import pose_latents
from tests.vae.conftest import light_codec

SIZE = (32, 16)


def frames(count: int) -> list[NDArray[np.uint8]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (20, 30, 3), np.uint8) for _ in range(count)]


def test_a_clip_is_encoded_with_its_first_frame_repeated() -> None:
    codec, video = light_codec(), frames(24 + 10)
    clips = list(islice(pose_latents(codec, iter(video), SIZE, "reference", 24), 4))
    pixels = [to_pixels(torch.from_numpy(np.array(fit_reference(Image.fromarray(frame), SIZE)))) for frame in video]
    missing = torch.full_like(pixels[0], -1)
    for clip, shown in zip(clips, (pixels[:24], [*pixels[24:], *[missing] * 14], [missing] * 24), strict=False):
        with torch.inference_mode():
            expected = codec.encode(torch.stack([shown[0], *shown], dim=1)[None])
        assert clip.shape == (16, 6, 2, 4)
        assert torch.equal(clip, expected[0, :, 1:])
    assert torch.equal(clips[3], clips[2])


def test_only_a_clips_frames_are_read() -> None:
    read = 0

    def counted() -> Iterator[NDArray[np.uint8]]:
        nonlocal read
        for frame in frames(40):
            read += 1
            yield frame

    clips = pose_latents(light_codec(), counted(), SIZE, "cover", 24)
    next(clips)
    assert read == 24
