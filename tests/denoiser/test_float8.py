"""Tests of avatar.denoiser.float8, which a CPU emulates."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from avatar.denoiser.cache import KVCache
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.float8 import FLOAT8, Float8Linear, quantise, quantise_linears
from avatar.denoiser.model import Network
from avatar.types import Conditions, Session
from tests.denoiser.conftest import HEIGHT, WIDTH, every_length, randn
from tests.denoiser.test_denoiser import relative_rms
from tests.denoiser.test_speed import streamed
from tests.parity.dit import Replay, config_of, with_weights
from tests.parity.goldens import Golden, Report

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_quantised_numbers_keep_four_significant_bits(size: float) -> None:
    x = size * randn(1, 5, 64)
    numbers, scale = quantise(x, (0, 1))
    assert numbers.dtype == FLOAT8
    assert relative_rms(numbers.float() * scale, x) < 0.03
    assert (numbers.float() * scale).abs().max() == pytest.approx(x.abs().max().item(), rel=1e-6)


def test_zeros_stay_zeros() -> None:
    numbers, scale = quantise(torch.zeros(2, 3), (0, 1))
    assert not (numbers.float() * scale).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float8_map_is_the_product_of_what_is_quantised(dtype: torch.dtype) -> None:
    linear, x = nn.Linear(48, 80, dtype=dtype), randn(1, 2, 5, 48).to(dtype)
    made = Float8Linear(linear)(x)
    (a, scale_a), (b, scale_b) = quantise(x, (0, 1, 2)), quantise(linear.weight.detach(), (0, 1))
    expected = (a.float() * scale_a) @ (b.float() * scale_b).t() + linear.bias.float()
    assert made.dtype == dtype
    assert relative_rms(made.float(), expected) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert 0.01 < relative_rms(made.float(), linear(x).float()) < 0.06


@every_length
def test_a_float8_window_stays_near_the_whole_one(
    network: Network, config: NetworkConfig, session: Session, conditions: Conditions
) -> None:
    whole, float8 = (
        streamed(Denoiser(network, config, 0, kv_dtype=kv_dtype), session, conditions, 8) for kv_dtype in (None, FLOAT8)
    )
    assert 1e-4 < relative_rms(float8, whole) < 0.03


def test_a_float8_window_takes_half_of_the_memory_and_keeps_the_sink(config: NetworkConfig) -> None:
    whole, float8 = (
        KVCache(config, HEIGHT, WIDTH, dtype=torch.bfloat16, window_dtype=dtype) for dtype in (None, FLOAT8)
    )
    window = config.num_layers * sum(each.nbytes for each in whole.window(0))
    scales = 2 * config.num_layers * config.window_blocks * config.num_heads * 2
    saved = window // 2 - scales
    assert float8.num_bytes == whole.num_bytes - saved
    with torch.device("meta"):
        network = Network(config).bfloat16()
    reserved = [Denoiser(network, config, 0, kv_dtype=each).memory(HEIGHT, WIDTH)[0] for each in (None, FLOAT8)]
    assert reserved[0] - reserved[1] == saved


def test_blocks_of_a_float8_window_are_scaled_apart(config: NetworkConfig) -> None:
    cache = KVCache(config, HEIGHT, WIDTH, window_dtype=FLOAT8)
    tokens = HEIGHT * WIDTH // 4 * config.num_frames_per_block
    made: list[Tensor] = []
    for index in range(4):
        k = 10.0 ** (-3 * index) * randn(index, 1, tokens, config.num_heads, config.head_dim)
        cache.start_block(index, 30)
        keys, values = cache.extend(0, k, 2 * k)
        made.append(k)
    window = torch.cat([made[3], made[1], made[2]], dim=1)
    for actual, expected in ((keys, window), (values, 2 * window)):
        parts = (torch.split(each[:, -3 * tokens :], tokens, 1) for each in (actual, expected))
        for part, block in zip(*parts, strict=True):
            assert relative_rms(part, block) < 0.03


# Relative RMS of velocities to the golden, as docs/operations/sizing.md states it; bfloat16 alone has 0.007.
@pytest.mark.parametrize(
    ("has_linears", "kv_dtype", "velocity"), [(True, None, 0.045), (False, FLOAT8, 0.01), (True, FLOAT8, 0.045)]
)
def test_float8_stays_near_the_golden(has_linears: bool, kv_dtype: torch.dtype | None, velocity: float) -> None:
    golden, report = Golden(GOLDENS, "dit_main"), Report("dit_main")
    network = with_weights(Network(config_of(golden)), golden.tensors, "weights.").bfloat16()
    if has_linears:
        quantise_linears(network)
    replay = Replay(golden, report, network)
    replay.window_dtype = kv_dtype
    replay.tolerance = {kind: {"rel_rms": 0.08} for kind in replay.tolerance} | {"velocity": {"rel_rms": velocity}}
    replay.run()
    assert report.worst_rel_rms > 0.025, "that was not float8"
    assert not report.failures, "\n".join(report.failures[:20])


def test_float8_quantises_attention_feed_forward_and_injection_norms(config: NetworkConfig) -> None:
    with torch.device("meta"):
        network = Network(config)
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    quantise_linears(network)
    taken = {name for name, module in network.named_modules() if isinstance(module, Float8Linear)}
    assert linear - taken == {
        *("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1"),
        *("head.head", "casual_audio_encoder.encoder.final_linear"),
    }
    assert len(taken) == config.num_layers * 10 + len(config.audio_inject_layers) * 5
