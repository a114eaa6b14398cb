"""Consistency distillation on a small network."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Generator, Tensor, nn

from avatar.denoiser.config import tiny_256
from avatar.denoiser.model import Network
from tests.training.small import BATCHES, maker, small
from training.batches import ClipBatch, load_batch
from training.clips import clean_estimate, frame_sigmas, predict_velocity
from training.consistency import PRESETS, ConsistencyDistillation, ConsistencyRecipe, path_sigmas
from training.data import StoredClip
from training.strategy import WrappedNetwork

CONFIG = replace(small(), num_frames_per_block=1, schedule=(1.0, 0.4, 0.0))
DISTANCES = (4, 4, 4)
RECIPE = ConsistencyRecipe(steps=400, warmup=2, guidance=0.0, batches=replace(BATCHES, audio_dropout=0.0))


@pytest.fixture(scope="module")
def batch(prepared: list[StoredClip]) -> ClipBatch:
    return load_batch(prepared, RECIPE.batches, CONFIG, 0, 0)


def test_the_path_meets_the_levels_that_are_served() -> None:
    for name, recipe in PRESETS.items():
        sigmas = path_sigmas(tiny_256(), recipe())
        assert {1.0, 0.0} <= set(sigmas.tolist()), name
        assert torch.isclose(sigmas, torch.tensor(0.4)).any()
        assert (sigmas.diff() < 0).all()


def clean(run: ConsistencyDistillation, x: Tensor, sigma: float, batch: ClipBatch) -> Tensor:
    """Return the clean estimate of the network that is trained."""
    sigmas = torch.full((2, 3), sigma)
    velocity = predict_velocity(run.network.network, CONFIG, x, sigmas, batch, DISTANCES)
    return clean_estimate(x, velocity, torch.tensor(sigma))


def test_at_the_end_of_the_path_the_target_is_the_teachers_estimate(batch: ClipBatch) -> None:
    run = ConsistencyDistillation(RECIPE, maker(CONFIG))
    sigma, x = float(run.path[-2]), batch.latents
    target = run.target(x, torch.full((2, 3), sigma), torch.zeros(2, 3), batch, DISTANCES)
    torch.testing.assert_close(target, clean(run, x, sigma, batch), atol=1e-5, rtol=1e-5)


def test_guidance_moves_the_target_away_from_silence(batch: ClipBatch) -> None:
    steps = torch.full((2, 3), 1.0), torch.full((2, 3), 0.4)
    plain, guided = (
        ConsistencyDistillation(replace(RECIPE, guidance=each), maker(CONFIG)).target(
            batch.latents, *steps, batch, DISTANCES
        )
        for each in (0.0, 0.5)
    )
    assert not torch.allclose(plain, guided, atol=1e-3)


class Gains(nn.Module):
    """A network that estimates clean latents as gain * x, with a gain for each sigma of the path."""

    def __init__(self) -> None:
        super().__init__()
        self.config = replace(CONFIG, mover=None)
        sigma = path_sigmas(CONFIG, RECIPE)
        # The best estimates where clean latents are standard normal; at sigma 1, nothing.
        self.gains = nn.Parameter((1 - sigma) / ((1 - sigma) ** 2 + sigma**2))


def test_one_pass_comes_near_the_end_of_the_teachers_path(batch: ClipBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of standard normal clean latents ends at x itself, because both its ends have one distribution."""

    def velocity(
        run: ConsistencyDistillation, network: WrappedNetwork, x: Tensor, sigmas: Tensor, *_: object
    ) -> Tensor:
        gains = cast(Gains, network.network).gains
        steps = (run.path[None, None] - sigmas[..., None]).abs().argmin(-1)
        gain, sigma = (frame_sigmas(each, CONFIG) for each in (gains[steps], sigmas))
        return (x - gain * x) / sigma

    clean = torch.randn(batch.latents.shape, generator=Generator().manual_seed(3))
    monkeypatch.setattr(ConsistencyDistillation, "_velocity", velocity)
    monkeypatch.setattr("training.consistency.load_batch", lambda *_: batch.replace(latents=clean))
    run = ConsistencyDistillation(replace(RECIPE, lr=0.05), lambda: cast(Network, Gains()))
    teacher, ema = (cast(Gains, each.network).gains for each in (run.teacher, run.ema))
    before = teacher.clone()
    for _ in range(RECIPE.steps):
        run.advance([])
    assert before[0] == 0
    assert ema[0] > 0.8
    assert torch.equal(teacher, before)
