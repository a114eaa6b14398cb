"""Tests of avatar.vae.whole_clip."""

import torch

from avatar.vae.picture.rule import PictureRule
from avatar.vae.vae import MOTION_FRAMES, Vae, VaeConfig
from avatar.vae.whole_clip import WINDOW_FRAMES, decode_clips, encode_picture
from tests.vae.conftest import light_codec, wan_codec

CODEC = light_codec()
VAE = Vae(CODEC, VaeConfig("light", PictureRule("cover", width=16, height=16), 25, {}))
RGB = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_motion_is_the_end_of_a_long_still_clip_and_the_sink_its_second_latent() -> None:
    codec = wan_codec()  # latents of a still clip differ only while the codec sees its start
    vae = Vae(codec, VAE.config)
    motion, sink = encode_picture(vae, RGB)
    with torch.inference_mode():
        still = codec.encode(vae.still_clip(RGB, WINDOW_FRAMES))[0]
    assert torch.equal(motion, still[:, -19:])
    assert torch.equal(sink, still[:, 1:2])
    assert not torch.equal(sink, still[:, :1])


def test_a_clip_is_decoded_after_the_reencoded_frames_before_it() -> None:
    generator = torch.Generator().manual_seed(1)
    clips = [torch.randn(16, frames, 2, 2, generator=generator) for frames in (6, 21, 3)]
    window = VAE.still_clip(RGB, WINDOW_FRAMES)
    for shown, clip, count in zip(decode_clips(VAE, RGB, clips), clips, (21, 84, 12), strict=True):
        with torch.inference_mode():
            latents = torch.cat([CODEC.encode(window), clip[None]], dim=2)
            expected = CODEC.decode(latents, CODEC.new_state()).clamp(-1, 1)[0]
        assert torch.equal(shown, expected[:, -count:])
        # A clip of 84 frames moves the window by 73.
        moved = min(count, MOTION_FRAMES)
        window = torch.cat([window[:, :, moved:], shown[None, :, -moved:]], dim=2)
