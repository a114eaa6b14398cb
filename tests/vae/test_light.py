"""Tests of avatar.vae.light."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from avatar.vae.conv import Tails
from avatar.vae.light import LightCodec, LightConfig, tiny
from tests.published import filled
from tests.vae.conftest import LIGHT, light_codec


def clip(frames: int, batch: int = 1, height: int = 32, width: int = 48) -> Tensor:
    """Return clips of a soft moving spot on a colour gradient: (batch, 3, frames, height, width) in [-1, 1]."""
    time = torch.arange(frames)[:, None, None] / 25
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    spot = torch.exp(-((x - 0.3 - 0.2 * time) ** 2 + (y - 0.5) ** 2) / 0.05)
    colour = torch.tensor([0.9, 0.5, 0.2]).view(3, 1, 1, 1)
    picture = colour * spot + 0.3 * x * torch.tensor([0.1, 0.4, 0.9]).view(3, 1, 1, 1)
    return (2 * picture - 1).clamp(-1, 1).expand(batch, -1, -1, -1, -1)


def noise(latents: int, batch: int = 1, channels: int = 16) -> Tensor:
    return torch.randn(batch, channels, latents, 2, 3, generator=torch.Generator().manual_seed(latents))


def psnr(actual: Tensor, expected: Tensor) -> float:
    return float(-10 * ((actual.detach() - expected) / 2).square().mean().log10())


def test_time_strides_equal_the_wan_codecs() -> None:
    codec = light_codec()
    # Frames that do not fill a latent are left out.
    for frames, latents in ((1, 1), (4, 1), (5, 2), (8, 2), (73, 19)):
        assert codec.encode(clip(frames)).shape == (1, 16, latents, 4, 6)
    state = codec.new_state()
    assert [codec.decode(noise(count), state).shape[2] for count in (1, 1, 3)] == [1, 4, 12]
    assert codec.decode(noise(7), codec.new_state()).shape == (1, 3, 25, 16, 24)


def test_a_whole_clip_equals_its_pieces() -> None:
    codec, latents = light_codec(), noise(12)
    whole = codec.decode(latents, codec.new_state())
    for sizes in ([1] * 12, [7, 3, 2], [2, 10]):
        state = codec.new_state()
        pieces = [codec.decode(part, state) for part in torch.split(latents, sizes, dim=2)]
        torch.testing.assert_close(torch.cat(pieces, dim=2), whole, rtol=0, atol=1e-5)


def test_encoding_is_causal() -> None:
    codec, frames = light_codec(), clip(13)
    changed = frames.clone()
    changed[:, :, 9:] *= -1
    before, after = codec.encode(frames), codec.encode(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])


def test_clips_of_a_batch_are_independent() -> None:
    codec = light_codec()
    frames = torch.cat([clip(9), -clip(9)])
    together = codec(frames)
    for i in range(2):
        torch.testing.assert_close(together[i : i + 1], codec(frames[i : i + 1]), rtol=0, atol=1e-5)


def test_means_and_scale_cancel_out() -> None:
    codec, frames = light_codec(), clip(9)
    plain = LightCodec(LightConfig(LIGHT.wide, LIGHT.mid, LIGHT.thin, latent_scale=1.0)).requires_grad_(False)
    plain.load_state_dict(codec.state_dict() | {"mean": torch.zeros_like(codec.mean)})
    torch.testing.assert_close(codec.encode(frames) * 2 + codec.mean, plain.encode(frames), rtol=0, atol=1e-5)
    torch.testing.assert_close(codec(frames), plain(frames), rtol=0, atol=1e-5)


def test_gradients_reach_every_weight() -> None:
    codec = light_codec().requires_grad_(True)
    frames = clip(9, batch=2)
    (codec(frames) - frames).square().mean().backward()
    dead = [name for name, weight in codec.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not dead


def test_training_improves_on_the_start() -> None:
    codec, frames = light_codec().requires_grad_(True), clip(9)
    optimizer = torch.optim.Adam(codec.parameters(), 3e-4)
    start = psnr(codec(frames), frames)
    for _ in range(20):
        optimizer.zero_grad()
        (codec(frames) - frames).square().mean().backward()
        optimizer.step()
    assert psnr(codec(frames), frames) > start + 1


def test_computes_in_the_weights_dtype() -> None:
    codec = light_codec().to(torch.bfloat16)
    latents = codec.encode(clip(5))
    assert latents.dtype == torch.bfloat16
    shown = codec.decode(latents.float(), Tails())
    assert shown.dtype == torch.bfloat16
    assert psnr(shown.float(), light_codec()(clip(5))) > 25


def test_the_embedded_default_has_one_and_a_half_million_parameters() -> None:
    assert 1.4e6 < sum(parameter.numel() for parameter in LightCodec(tiny()).parameters()) < 1.6e6


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"network\.mid must be 1 to 16384, got 0"):
        LightConfig(wide=16, mid=0, thin=8, latent_scale=2.0)
    with pytest.raises(ValueError, match=r"network\.latent_scale must be 1e-06 to"):
        LightConfig(wide=16, mid=8, thin=8, latent_scale=0.0)


def larger_codec() -> LightCodec:
    torch.manual_seed(0)
    codec = LightCodec(replace(LIGHT, scale=2, channels=20)).requires_grad_(False)
    codec.load_state_dict(filled(codec))
    return codec


def test_a_codec_of_scale_2_has_patches_of_twice_the_side() -> None:
    codec, frames = larger_codec(), clip(9, height=64, width=96)
    latents = codec.encode(frames)
    assert latents.shape == (1, 20, 3, 4, 6)
    assert codec.decode(latents, codec.new_state()).shape == frames.shape
    assert (codec.space_stride, codec.channels) == (16, 20)
    changed = frames.clone()
    changed[..., 16:32] *= -1
    assert (codec.encode(changed) - latents).abs().amax((0, 1, 2, 3)).argmax() == 1


def test_a_streamed_codec_of_scale_2_equals_the_whole() -> None:
    codec, latents = larger_codec(), noise(6, channels=20)
    whole, state = codec.decode(latents, codec.new_state()), codec.new_state()
    pieces = [codec.decode(part, state) for part in torch.split(latents, [1, 3, 2], dim=2)]
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, rtol=0, atol=1e-5)
