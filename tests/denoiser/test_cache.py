"""Tests of avatar.denoiser.cache."""

import pytest
import torch
from torch import Tensor

from avatar.denoiser.attention import apply_rope, block_positions, condition_positions, rope_table
from avatar.denoiser.cache import KeysValues, KVCache
from avatar.denoiser.config import NetworkConfig
from tests.denoiser.conftest import HEIGHT, WIDTH, randn

REFERENCE = HEIGHT * WIDTH // 4
SINK = len(condition_positions(HEIGHT, WIDTH))


@pytest.fixture
def sink(config: NetworkConfig) -> list[KeysValues]:
    return sink_of(config, seed=1)


@pytest.fixture
def cache(config: NetworkConfig, sink: list[KeysValues]) -> KVCache:
    cache = KVCache(config, HEIGHT, WIDTH)
    cache.set_sink(sink)
    return cache


def sink_of(config: NetworkConfig, seed: int) -> list[KeysValues]:
    shape = (1, SINK, config.num_heads, config.head_dim)
    return [(randn(seed + 10 * layer, *shape), randn(seed + 10 * layer + 1, *shape)) for layer in range(3)]


def marked(config: NetworkConfig, index: int) -> Tensor:
    """Return keys or values of a block, all equal to its index + 1."""
    return torch.full((1, REFERENCE * config.num_frames_per_block, config.num_heads, config.head_dim), index + 1.0)


def attended(cache: KVCache, config: NetworkConfig, index: int, reference: int = 30) -> KeysValues:
    """Return the keys and values that layer 0 attends to at a block."""
    cache.start_block(index, reference)
    k = marked(config, index)
    return cache.extend(0, k, k)


def blocks_in(values: Tensor) -> list[float]:
    """Return the values of the blocks in the window, each once."""
    return sorted(set(values[0, SINK:, 0, 0].tolist()))


def test_the_oldest_block_is_evicted_first(cache: KVCache, config: NetworkConfig) -> None:
    seen = [blocks_in(attended(cache, config, index)[1]) for index in range(6)]
    assert seen == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]


def test_unfilled_slots_are_not_attended_to(cache: KVCache, config: NetworkConfig) -> None:
    lengths = [attended(cache, config, index)[0].shape[1] for index in range(5)]
    block = REFERENCE * config.num_frames_per_block
    assert lengths == [SINK + count * block for count in (1, 2, 3, 3, 3)]


def test_a_stream_that_starts_late_has_an_empty_window(cache: KVCache, config: NetworkConfig) -> None:
    seen = [blocks_in(attended(cache, config, index)[1]) for index in range(7, 12)]
    assert seen == [[8], [8, 9], [8, 9, 10], [9, 10, 11], [10, 11, 12]]


def test_sink_survives_a_full_window(cache: KVCache, config: NetworkConfig, sink: list[KeysValues]) -> None:
    for index in range(8):
        keys, values = attended(cache, config, index)
    table = rope_table(condition_positions(HEIGHT, WIDTH), config.head_dim)
    assert torch.equal(keys[:, :SINK], apply_rope(sink[0][0], table))
    assert torch.equal(values[:, :SINK], sink[0][1])


def test_only_the_reference_moves(cache: KVCache, config: NetworkConfig, sink: list[KeysValues]) -> None:
    for index, frame in enumerate((30, 45, 33, 30)):
        keys = attended(cache, config, index, frame)[0][:, :SINK]
        positions = torch.cat(
            [block_positions(frame, 1, HEIGHT, WIDTH), condition_positions(HEIGHT, WIDTH)[REFERENCE:]]
        )
        torch.testing.assert_close(
            keys, apply_rope(sink[0][0], rope_table(positions, config.head_dim)), atol=1e-6, rtol=0
        )


def test_a_new_sink_is_positioned_for_its_block(cache: KVCache, config: NetworkConfig) -> None:
    attended(cache, config, 0, 45)
    other = sink_of(config, seed=5)
    cache.set_sink(other)
    keys = attended(cache, config, 1, 45)[0][:, :REFERENCE]
    table = rope_table(block_positions(45, 1, HEIGHT, WIDTH), config.head_dim)
    torch.testing.assert_close(keys, apply_rope(other[0][0][:, :REFERENCE], table), atol=1e-6, rtol=0)


def test_a_new_sink_keeps_the_window(cache: KVCache, config: NetworkConfig) -> None:
    for index in range(4):
        attended(cache, config, index)
    before = [each.clone() for each in cache.window(0)]
    cache.set_sink(sink_of(config, seed=5))
    assert all(torch.equal(was, now) for was, now in zip(before, cache.window(0), strict=True))


def test_extend_returns_views(cache: KVCache, config: NetworkConfig) -> None:
    keys, values = attended(cache, config, 0)
    following = attended(cache, config, 1)
    assert keys.data_ptr() == following[0].data_ptr()
    assert values.data_ptr() == following[1].data_ptr()


def test_layers_and_caches_are_independent(config: NetworkConfig, sink: list[KeysValues]) -> None:
    one, other = KVCache(config, HEIGHT, WIDTH), KVCache(config, HEIGHT, WIDTH)
    for cache in (one, other):
        cache.set_sink(sink)
    attended(one, config, 0)
    assert not other.window(0)[0].any()
    assert not one.window(1)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_keys_values_and_unrotated_reference_channels(config: NetworkConfig, dtype: torch.dtype) -> None:
    cache = KVCache(config, HEIGHT, WIDTH, dtype=dtype)
    block = REFERENCE * config.num_frames_per_block
    per_layer = 2 * (SINK + config.window_blocks * block) * config.dim
    # Of 24 channels a head, 8 turn with the frame.
    moving = REFERENCE * config.num_heads * 8
    assert cache.num_bytes == config.num_layers * (per_layer + moving) * dtype.itemsize
