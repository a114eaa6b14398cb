"""The network over whole clips, with other versions of a clip as history."""

from dataclasses import replace

import pytest
import torch
from torch import Generator

from avatar.denoiser.config import NetworkConfig
from tests.training.small import BATCHES, network_of, small
from training.batches import ClipBatch, ClipSpan, Share, load_batch, read_span
from training.clips import predict_velocities, predict_velocity, with_moved
from training.data import StoredClip
from training.pretrain import PRESETS, PretrainRecipe, clip_losses
from training.self_forcing import BlockwiseGeneration

DISTANCES = (4, 7, 5)


@pytest.fixture(scope="module", params=[1, 3])
def config(request: pytest.FixtureRequest) -> NetworkConfig:
    return replace(small(), num_frames_per_block=request.param)


@pytest.fixture(scope="module")
def batch(config: NetworkConfig, prepared: list[StoredClip]) -> ClipBatch:
    return load_batch(prepared, replace(BATCHES, same_position=True), config, 0, 0)


def test_a_version_has_the_history_of_levels_that_share_the_last_ones_cache(
    config: NetworkConfig, batch: ClipBatch
) -> None:
    network, last = network_of(config), config.num_levels - 1
    copy, x = torch.randn(2, *batch.latents.shape, generator=Generator().manual_seed(1))
    versions = [(each, torch.full((2, 3), config.schedule[level])) for each, level in ((copy, last), (x, 0))]
    of_copy, of_x = predict_velocities(network, config, versions, batch, DISTANCES)
    torch.testing.assert_close(of_copy, predict_velocity(network, config, *versions[0], batch, DISTANCES))

    generation = BlockwiseGeneration(network, config, batch, [DISTANCES] * config.num_levels)
    cache, blocks = generation.new_cache(), []
    for block, parts in enumerate(zip(x.chunk(3, dim=2), copy.chunk(3, dim=2), strict=True)):
        blocks.append(generation.velocity(parts[0], block, 0, cache))
        # The last level writes over the first one's keys and values.
        generation.velocity(parts[1], block, last, cache)
    torch.testing.assert_close(torch.cat(blocks, dim=2), of_x, atol=1e-4, rtol=1e-4)
    own = predict_velocity(network, config, *versions[1], batch, DISTANCES)
    assert not torch.allclose(own, of_x, atol=1e-3)


def test_a_copied_history_has_a_loss_too(config: NetworkConfig, batch: ClipBatch) -> None:
    network = network_of(config)

    def losses(share: float) -> torch.Tensor:
        return clip_losses(network, batch, PretrainRecipe(copied_history=share), Generator().manual_seed(0), Share())

    # At a share of 1e-9 the same numbers are drawn, and the copy is left out.
    assert not torch.allclose(losses(1.0), losses(1e-9), rtol=1e-2)
    torch.autograd.backward(losses(1.0).mean())
    both = network.patch_embedding.weight.grad
    assert both is not None
    assert both.isfinite().all()


@pytest.mark.parametrize(("preset", "least"), [("tiny_256", 0.4), ("base", 0.5)])
def test_the_window_is_full_in_enough_of_the_blocks_trained(preset: str, least: float) -> None:
    network, recipe = PRESETS[preset]
    low, high = recipe().batches.num_blocks
    before = network().window_blocks - 1
    shares = [(count - before) / count for count in range(low, high + 1)]
    assert sum(shares) / len(shares) > least


def test_channels_of_detail_weigh_less(
    config: NetworkConfig, monkeypatch: pytest.MonkeyPatch, prepared: list[StoredClip]
) -> None:
    monkeypatch.setattr("training.batches.NUM_COARSE_CHANNELS", 3)
    span = ClipSpan(prepared[0], 0, 0)
    plain, weighted = (read_span(span, 3, replace(BATCHES, detail_weight=each), config).weight for each in (1, 0.2))
    torch.testing.assert_close(weighted[3:] / weighted[:1], torch.full_like(weighted[:1], 0.2))
    torch.testing.assert_close(weighted.mean(0, keepdim=True), plain)


def test_references_that_were_moved_before_change_nothing(config: NetworkConfig, batch: ClipBatch) -> None:
    network, sigmas = network_of(config), torch.full((2, 3), 0.6)
    moved = with_moved(network, batch)
    assert moved.moved is not None
    assert moved.swapped("features").moved is None
    plain, again = (
        predict_velocity(network, config, batch.latents, sigmas, each, DISTANCES) for each in (batch, moved)
    )
    torch.testing.assert_close(again, plain)
    streams = [BlockwiseGeneration(network, config, each, [DISTANCES] * config.num_levels) for each in (batch, moved)]
    plain, again = (torch.cat(each.inputs(1, Generator().manual_seed(1)), dim=2) for each in streams)
    torch.testing.assert_close(again, plain)
    # An empty `moved` is not moved again: it is what the networks begin from.
    other = predict_velocity(network, config, batch.latents, sigmas, moved.replace(moved=0 * moved.moved), DISTANCES)
    assert not torch.allclose(other, predict_velocity(network, config, batch.latents, sigmas, batch, DISTANCES))
