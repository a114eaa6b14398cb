"""Tests of avatar.denoiser.attention, in addition to the goldens of RoPE and positions (tests/parity)."""

import pytest
import torch
from torch import Tensor

from avatar.denoiser.attention import (
    Attention,
    RMSNorm,
    apply_rope,
    attend,
    block_positions,
    multiply_add,
    reference_frame,
    rope_table,
)
from tests.denoiser.conftest import randn


def at(frame: int, row: int = 0, column: int = 0) -> Tensor:
    return torch.tensor([[frame, row, column]])


@pytest.mark.parametrize("offset", [100, 45_000, 30_000_000])
def test_scores_depend_on_relative_positions_only(offset: int) -> None:
    q, k = randn(1, 1, 1, 1, 64), randn(2, 1, 1, 1, 64)

    def score(start: int) -> Tensor:
        return (apply_rope(q, rope_table(at(start), 64)) * apply_rope(k, rope_table(at(start + 4), 64))).sum()

    torch.testing.assert_close(score(offset), score(0), atol=0.02, rtol=0)
    assert abs(score(offset) - (q * k).sum()) > 0.1


def test_each_sample_may_have_its_own_positions() -> None:
    both = block_positions(torch.tensor([6, 30]), 2, 4, 6)
    assert torch.equal(both, torch.stack([block_positions(6, 2, 4, 6), block_positions(30, 2, 4, 6)]))


def test_the_reference_rolls_ahead_of_later_blocks() -> None:
    assert [reference_frame(first, 4) for first in (0, 3, 24, 27, 30)] == [30, 30, 30, 31, 34]


def test_rms_norm_rounds_once() -> None:
    norm, x = RMSNorm(64, 1e-6).bfloat16(), randn(1, 5, 64).bfloat16()
    torch.nn.init.constant_(norm.weight, 1.3)
    unit = torch.nn.functional.rms_norm(x.float(), (64,), eps=1e-6)
    assert torch.equal(norm(x), (unit * norm.weight.float()).bfloat16())


@pytest.mark.parametrize("is_training", [False, True])
def test_multiply_add_rounds_once(is_training: bool) -> None:
    x, z = randn(1, 3, 5, 8).bfloat16(), randn(2, 5, 8).bfloat16()
    y = randn(3, 8)
    with torch.set_grad_enabled(is_training):
        made = multiply_add(x, y, z, torch.bfloat16)
    assert torch.equal(made, torch.addcmul(z.float(), x.float(), y).bfloat16())


def test_rope_is_a_complex_product() -> None:
    x, positions = randn(1, 2, 24, 3, 32), block_positions(7, 1, 8, 12)
    table = rope_table(positions, 32)
    factors = torch.complex(table[0, :, ::2], table[1, :, 1::2])
    assert torch.equal(factors, torch.complex(table[0, :, 1::2], -table[1, :, ::2]))
    pairs = torch.view_as_complex(x.reshape(2, 24, 3, 16, 2)) * factors.unsqueeze(-2)
    torch.testing.assert_close(apply_rope(x, table), torch.view_as_real(pairs).flatten(-2), atol=1e-6, rtol=0)


def test_positions_belong_to_their_caller() -> None:
    first = block_positions(0, 2, 8, 12)
    first += 1
    assert torch.equal(block_positions(0, 2, 8, 12), first - 1)


def test_each_share_of_the_queries_attends_to_its_spans() -> None:
    attention = Attention(8, 2, eps=1e-6)
    q, k, v = (randn(seed, 1, 4, 2, 4) for seed in (1, 2, 3))
    visible = [[slice(0, 1), slice(3, 4)], [slice(0, 4)]]
    apart = [attention(q[:, :2], k[:, ::3], v[:, ::3]), attention(q[:, 2:], k, v)]
    torch.testing.assert_close(attention(q, k, v, visible), torch.cat(apart, dim=1))


def test_attention_with_gradients_equals_attention_without() -> None:
    q, k, v = (randn(seed, 1, 4, 2, 4) for seed in (1, 2, 3))
    fused, spelt_out = attend(q, k, v), attend(q.requires_grad_(), k, v)
    assert spelt_out.requires_grad
    torch.testing.assert_close(spelt_out, fused)
