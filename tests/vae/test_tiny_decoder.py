"""Tests of avatar.vae.tiny_decoder. tests/parity holds its numbers to the published decoder's."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from avatar.vae.codec import Codec
from avatar.vae.tiny_decoder import TinyDecoder, TinyDecoderCodec, TinyDecoderConfig
from avatar.vae.wan import WAN_MEAN, WAN_STD, WanCodec, WanConfig
from tests.vae.conftest import WAN, tiny_codec

# The published layout's tensors of the decoder, and their numbers.
NUM_TENSORS, NUM_PARAMETERS = 64, 9_844_611


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 16, count, 2, 3, generator=torch.Generator().manual_seed(seed))


def test_the_network_has_the_published_sizes() -> None:
    with torch.device("meta"):
        tensors = TinyDecoder().state_dict()
    assert len(tensors) == NUM_TENSORS
    assert sum(tensor.numel() for tensor in tensors.values()) == NUM_PARAMETERS
    assert tensors["decoder.13.conv.weight"].shape == (256, 128, 1, 1)
    assert tensors["decoder.22.bias"].shape == (3,)


def test_streamed_equals_whole_bit_for_bit() -> None:
    codec = tiny_codec()
    latents, whole_state = noise(7), codec.new_state()
    whole = codec.decode(latents, whole_state)
    assert whole.shape == (1, 3, 25, 16, 24)
    for sizes in ([1] * 7, [3, 1, 3], [5, 2]):
        state = codec.new_state()
        assert torch.equal(
            torch.cat([codec.decode(part, state) for part in torch.split(latents, sizes, dim=2)], 2), whole
        )
        assert all(torch.equal(state._last[layer], kept) for layer, kept in whole_state._last.items())


def test_the_state_is_the_last_input_of_each_memory_block() -> None:
    state = tiny_codec().new_state()
    tiny_codec().decode(noise(2), state)
    assert {layer: tuple(kept.shape) for layer, kept in state._last.items()} == {
        **dict.fromkeys((3, 4, 5), (1, 1, 2, 3, 16)),
        **dict.fromkeys((9, 10, 11), (1, 1, 4, 6, 8)),
        **dict.fromkeys((15, 16, 17), (1, 1, 8, 12, 8)),
    }


def test_raw_latents_are_normalised_ones_with_wans_mean_and_deviation() -> None:
    raw = tiny_codec()
    normalised = TinyDecoderCodec(raw._wan, raw.decoder, TinyDecoderConfig("normalised"))
    mean, std = (torch.tensor(table).reshape(1, 16, 1, 1, 1) for table in (WAN_MEAN, WAN_STD))
    shown = raw.decode(noise(2), raw.new_state())
    expected = normalised.decode(noise(2) * std + mean, normalised.new_state())
    torch.testing.assert_close(shown, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(shown, normalised.decode(noise(2), normalised.new_state()), atol=0.01)


def test_pictures_are_encoded_by_wan() -> None:
    codec = tiny_codec()
    frames = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    whole = WanCodec(WAN)
    whole.network.load_state_dict({**whole.network.state_dict(), **codec._wan.network.state_dict()})
    assert torch.equal(codec.encode(frames), whole.encode(frames))


def test_latents_of_another_vae_are_refused() -> None:
    wan = WanCodec(WanConfig(base_dim=4, z_dim=8, latents_mean=(0,) * 8, latents_std=(1,) * 8), encodes_only=True)
    with pytest.raises(
        ValueError, match="takes latents of 16 channels at 1/8 of the picture's size, the VAE has 8 at 1/8"
    ):
        TinyDecoderCodec(wan, TinyDecoder((8, 8, 8, 8)), TinyDecoderConfig("raw"))


def test_a_block_takes_a_twentieth_of_wans_arithmetic() -> None:
    """A block at 704x384, after the stream's first latent frames, in floating point operations."""
    with torch.device("meta"):
        wan = WanCodec(WanConfig(), device="meta")
        tiny = TinyDecoderCodec(wan, TinyDecoder(), TinyDecoderConfig("normalised"))
    flops = []
    for codec in (wan, tiny):
        flops.append(flops_of_block(codec))
    assert flops[1] * 24 < flops[0]


def flops_of_block(codec: Codec[Any]) -> int:
    latents, state = torch.zeros(1, 16, 3, 48, 88, device="meta"), codec.new_state()
    with torch.inference_mode():
        codec.decode(latents, state)
        with FlopCounterMode(display=False) as counter:
            codec.decode(latents, state)
    return int(counter.get_total_flops())
