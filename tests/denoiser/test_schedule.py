"""Tests of avatar.denoiser.schedule."""

import torch

from avatar.denoiser.schedule import flow_match_schedule, timesteps


def test_the_public_levels_are_shifted_twice_at_their_lower_end() -> None:
    sigmas = flow_match_schedule(4, shift=3.0)
    assert sigmas == (1.0, 0.857692301273346, 0.602150559425354, 0.008928571827709675, 0.0)
    assert torch.equal(
        timesteps(sigmas), torch.tensor([1000.0, 857.6923217773438, 602.1505737304688, 8.928571701049805])
    )


def test_without_a_shift_levels_are_evenly_spaced() -> None:
    *sigmas, clean = flow_match_schedule(5, shift=1.0)
    assert clean == 0.0
    torch.testing.assert_close(torch.tensor(sigmas), torch.linspace(1, 0.001, 5))
