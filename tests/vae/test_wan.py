"""Tests of avatar.vae.wan."""

from typing import Any

import pytest
import torch
from torch import Tensor

from avatar.vae.wan import WAN_MEAN, WAN_STD, WanCodec, WanConfig
from tests.published import filled, vae_as_published
from tests.vae.conftest import WAN, wan_codec


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_codec_equals_the_public_methods_of_diffusers() -> None:
    from diffusers import AutoencoderKLWan  # takes seconds

    codec, frames, latents = wan_codec(), noise(1, 3, 13, 16, 24).clamp(-1, 1), noise(1, 16, 6, 2, 3)
    mean, std = (torch.tensor(table).view(1, 16, 1, 1, 1) for table in (WAN_MEAN, WAN_STD))
    theirs: Any = AutoencoderKLWan(base_dim=WAN.base_dim)  # type: ignore[no-untyped-call]
    theirs.load_state_dict(codec.network.state_dict())
    with torch.inference_mode():
        encoded = (theirs.encode(frames).latent_dist.mode() - mean) / std
        decoded = theirs.decode(latents * std + mean).sample
        torch.testing.assert_close(codec.encode(frames), encoded, rtol=0, atol=1e-6)
        torch.testing.assert_close(codec.decode(latents, codec.new_state()).clamp(-1, 1), decoded, rtol=0, atol=1e-5)


def test_published_names_equal_diffusers_conversion() -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with torch.device("meta"):
        tensors = filled(WanCodec(WanConfig(base_dim=4), device="meta").network)
    converted = convert_wan_vae_to_diffusers(vae_as_published(tensors))  # type: ignore[no-untyped-call]
    assert converted.keys() == tensors.keys()
    assert all(converted[name] is tensor for name, tensor in tensors.items())


def test_a_whole_clip_equals_its_pieces_to_the_bit() -> None:
    codec, latents = wan_codec(), noise(1, 16, 12, 2, 3)
    with torch.inference_mode():
        whole = codec.decode(latents, codec.new_state())
        for sizes in ([1] * 12, [7, 3, 2], [2, 10]):
            state = codec.new_state()
            pieces = [codec.decode(part, state) for part in torch.split(latents, sizes, dim=2)]
            assert torch.equal(torch.cat(pieces, dim=2), whole)


def test_computes_in_the_weights_dtype() -> None:
    codec, half = wan_codec(), WanCodec(WAN, dtype=torch.bfloat16)
    half.network.load_state_dict(codec.network.state_dict())
    frames = noise(1, 3, 5, 16, 24).clamp(-1, 1)
    with torch.inference_mode():
        latents = codec.encode(frames)
        torch.testing.assert_close(half.encode(frames), latents, rtol=0, atol=0.05)
        shown = half.decode(latents, half.new_state())
        assert shown.dtype == torch.bfloat16
        torch.testing.assert_close(shown.float(), codec.decode(latents, codec.new_state()), rtol=0, atol=0.2)


def test_configs_of_other_codecs_are_refused() -> None:
    with pytest.raises(ValueError, match="must have 48 numbers"):
        WanConfig(z_dim=48)
    with pytest.raises(ValueError, match="two of them true"):
        WanConfig(temperal_downsample=(True, True, True))


def test_the_default_is_the_published_network() -> None:
    with torch.device("meta"):
        network = WanCodec(WanConfig(), device="meta").network
    assert sum(parameter.numel() for parameter in network.parameters()) == 126_892_531


@pytest.mark.slow
def test_the_decoder_compiles_without_a_break_or_a_second_time() -> None:
    codec, latents = wan_codec(), noise(1, 16, 4, 2, 3)
    with torch.inference_mode():
        expected = codec.decode(latents, codec.new_state())
        options: Any = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
        codec.network.decoder.compile(**options)
        torch.testing.assert_close(codec.decode(latents, codec.new_state()), expected)
        with torch.compiler.set_stance("fail_on_recompile"):
            codec.decode(latents, codec.new_state())
