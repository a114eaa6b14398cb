"""Tests of avatar.denoiser.audio_injection."""

import torch

from avatar.denoiser.audio_injection import AudioTokens
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network
from tests.denoiser.conftest import randn


def columns(config: NetworkConfig, num: int) -> torch.Tensor:
    return randn(1, 1, 1, config.num_encoder_layers, config.audio_dim, num)


def test_blocks_of_audio_are_encoded_independently(network: Network, config: NetworkConfig) -> None:
    features = columns(config, 3 * config.frames_per_block)
    together = network.encode_audio(features)
    apart = [network.encode_audio(each) for each in torch.split(features, config.frames_per_block, dim=-1)]
    torch.testing.assert_close(together.local, torch.cat([each.local for each in apart], dim=2))
    torch.testing.assert_close(together.overall, torch.cat([each.overall for each in apart], dim=2))


def test_with_context_the_tokens_of_blocks_are_those_of_the_whole_stream(
    network: Network, config: NetworkConfig
) -> None:
    encoder, features = network.casual_audio_encoder, columns(config, 24)
    whole = encoder.blocks(features, 24)
    for frames in (4, 8, 12):
        blocks = encoder.blocks(features, frames, context_frames=8)
        torch.testing.assert_close(blocks.local, whole.local)
        torch.testing.assert_close(blocks.overall, whole.overall)
    alone = encoder.blocks(features, 4)
    assert not torch.allclose(alone.local[:, :, 1:], whole.local[:, :, 1:], atol=1e-2)
    later = encoder.blocks(features[..., 12:], 4, 8, preceding=features[..., 4:12])
    torch.testing.assert_close(later.local, whole.local[:, :, 3:])


def test_audio_tokens_are_causal(network: Network, config: NetworkConfig) -> None:
    features = columns(config, config.frames_per_block)
    changed = features.clone()
    changed[..., 4:] += 1
    before, after = network.encode_audio(features), network.encode_audio(changed)
    assert torch.equal(before.local[:, :, 0], after.local[:, :, 0])
    assert not torch.equal(before.local[:, :, 1], after.local[:, :, 1])


def test_masks_weight_the_actors_audio(network: Network, config: NetworkConfig) -> None:
    t, s = config.num_frames_per_block, 24
    features = randn(2, 1, 2, config.num_encoder_layers, config.audio_dim, config.frames_per_block)
    x, mask = randn(3, 1, t, s, config.dim), torch.rand(1, 2, t, s, 1)
    one, two = (network.encode_audio(features[:, actor : actor + 1]) for actor in (0, 1))
    apart = sum(network.audio_injector(0, x, audio) * mask[:, actor] for actor, audio in enumerate((one, two)))
    both = network.encode_audio(features, mask)
    assert isinstance(both, AudioTokens)
    torch.testing.assert_close(network.audio_injector(0, x, both), apart)
