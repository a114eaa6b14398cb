"""Causal convolutions with carried tails."""

import torch

from avatar.vae.conv import Residual, StepConv, Tails


def steps(count: int, width: int = 4) -> torch.Tensor:
    return torch.randn(2, count, 3, 5, width, generator=torch.Generator().manual_seed(count))


def test_tails_give_each_step_the_one_before() -> None:
    tails, whole = Tails(), steps(6)
    seen = torch.cat([tails.extend(0, part) for part in (whole[:, :1], whole[:, 1:5], whole[:, 5:])], dim=1)
    assert torch.equal(seen[:, 1:], whole[:, :-1])


def test_the_first_step_is_its_own_past() -> None:
    whole = steps(3)
    assert torch.equal(Tails().extend(0, whole)[:, 0], whole[:, 0])


def test_tails_keep_one_step_and_not_the_whole_call() -> None:
    tails, whole = Tails(), steps(6)
    tails.extend(0, whole)
    (kept,) = tails._last.values()
    assert kept.untyped_storage().nbytes() == whole[:, :1].numel() * whole.element_size()


def test_a_step_convolution_sees_one_step_at_a_time() -> None:
    conv, whole = StepConv(4, 6, 3), steps(3)
    changed = whole.clone()
    changed[:, 1] += 1
    before, after = conv(whole), conv(changed)
    assert before.shape == (2, 3, 3, 5, 6)
    assert [torch.equal(before[:, t], after[:, t]) for t in range(3)] == [True, False, True]


def test_only_layers_with_memory_see_the_past_and_none_the_future() -> None:
    whole = steps(4)
    changed = whole.clone()
    changed[:, 1] += 1
    for memory, touched in ((None, [False, True, False, False]), (0, [False, True, True, False])):
        layer = Residual(4, memory)
        before, after = layer(whole, Tails()), layer(changed, Tails())
        assert [not torch.equal(before[:, t], after[:, t]) for t in range(4)] == touched
