"""The two stages of training on a small network: what is drawn, what has gradients, and that a stopped run goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from avatar.denoiser import model
from avatar.denoiser.cache import KVCache
from avatar.denoiser.config import NetworkConfig, tiny
from avatar.denoiser.model import Network
from avatar.denoiser.schedule import shifted
from training.batches import BatchRule, ClipBatch, batch_of
from training.clips import clean_of, per_frame, predict, with_noise
from training.data import Clip, StoredClip, read_clips, write_shard
from training.distill import Distillation, backward_by_block, standing_together
from training.distill import Recipe as DistillRecipe
from training.losses import dmd_gradient, draw_sigmas, moved_loss
from training.pretrain import Pretraining
from training.pretrain import Recipe as PretrainRecipe
from training.rollout import Rollout
from training.run import Limits, go_on, restore, save

RULE = BatchRule(batch=2, num_blocks=(3, 3))


@pytest.fixture(scope="module")
def config() -> NetworkConfig:
    return replace(
        tiny(),
        in_dim=4,
        out_dim=4,
        cond_dim=4,
        dim=24,
        num_heads=2,
        num_layers=2,
        ffn_dim=32,
        freq_dim=16,
        audio_dim=6,
        num_encoder_layers=2,
        audio_inject_layers=(0,),
        window_blocks=2,
    )


def prepared_clip(number: int) -> Clip:
    rng = np.random.default_rng(number)
    arrays: dict[str, Any] = {
        "latents": rng.normal(size=(4, 12, 8, 8)).astype(np.float16),
        "motion": np.repeat(rng.normal(size=(4, 1, 8, 8)), 19, 1).astype(np.float16),
        "features": rng.normal(size=(2, 6, 48)).astype(np.float16),
        "lips": rng.uniform(20, 40, (48, 2)).astype(np.float32),
    }
    return Clip(f"{number:08d}", arrays, {"person": number, "lead_frames": 0})


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared shards."""
    folder = tmp_path_factory.mktemp("latents")
    write_shard(folder / "train" / "000000.tar", [prepared_clip(number) for number in range(4)])
    write_shard(folder / "held_out" / "000000.tar", [prepared_clip(number) for number in (90, 91)])
    return folder


@pytest.fixture
def clips(latents: Path) -> list[StoredClip]:
    return read_clips(latents, "train")


def network_of(config: NetworkConfig) -> Network:
    """A network in which nothing is zero."""
    network = Network(config)
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.fixture
def batch(config: NetworkConfig, clips: list[StoredClip]) -> ClipBatch:
    return standing_together(batch_of(clips, RULE, config, 0, 0))


def test_levels_belong_to_blocks_and_half_of_the_clips_have_one(config: NetworkConfig) -> None:
    sigmas = draw_sigmas(400, 3, config, 3.0, Generator().manual_seed(0))
    assert sigmas.shape == (400, 3)
    assert sigmas.min() >= 0.02
    assert sigmas.max() <= 1
    one = (sigmas == sigmas[:, :1]).all(1).float().mean()
    # A few of the others draw the same level of the schedule thrice.
    assert 0.42 < one < 0.62
    scheduled = torch.isin(sigmas, torch.tensor(config.schedule)).all(1).float().mean()
    assert 0.42 < scheduled < 0.58
    frames = per_frame(sigmas, config)[:, 0, :, 0, 0]
    assert torch.equal(frames[:, ::3], frames[:, 2::3])


def test_the_shift_round_trips() -> None:
    uniform = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shifted(shifted(uniform, 5.0), 1 / 5.0), uniform)


def test_clean_latents_and_velocity_round_trip() -> None:
    clean, noise = torch.randn(2, 1, 4, 3, 8, 8, generator=Generator().manual_seed(0))
    sigma = torch.tensor(0.7)
    torch.testing.assert_close(clean_of(with_noise(clean, noise, sigma), noise - clean, sigma), clean)


def test_a_batch_is_decided_by_its_step(config: NetworkConfig, clips: list[StoredClip]) -> None:
    first, again, other = (batch_of(clips, RULE, config, 0, step) for step in (5, 5, 6))
    assert torch.equal(first.latents, again.latents)
    assert not torch.equal(first.latents, other.latents)
    assert first.weight.mean((1, 2, 3, 4)).allclose(torch.ones(2), atol=0.05)


def test_a_rollout_at_one_level_equals_the_whole_clip(config: NetworkConfig, batch: ClipBatch) -> None:
    network = network_of(config)
    x = torch.randn(batch.latents.shape, generator=Generator().manual_seed(1))
    sigmas = torch.full((2, 3), config.schedule[2])
    whole = predict(network, config, x, sigmas, batch, distance=4)
    rollout = Rollout(network, config, batch, distance=4)
    cache = rollout.cache()
    blocks = [rollout.velocity(part, block, 2, cache) for block, part in enumerate(x.chunk(3, dim=2))]
    torch.testing.assert_close(torch.cat(blocks, dim=2), whole, atol=1e-4, rtol=1e-4)


def test_blocks_alone_have_the_gradients_of_the_whole_graph(config: NetworkConfig, batch: ClipBatch) -> None:
    network = network_of(config)
    rollout = Rollout(network, config, batch, distance=4)
    entered = rollout.inputs(1, Generator().manual_seed(0))
    gradient = torch.randn(batch.latents.shape, generator=Generator().manual_seed(2))

    whole = moved_loss(torch.cat(rollout.outputs(entered, 1), dim=2), gradient)
    torch.autograd.backward(whole)
    expected = gradients(network)
    network.zero_grad()
    by_block = backward_by_block(rollout, entered, 1, gradient)

    torch.testing.assert_close(by_block, whole.detach())
    assert max(each.abs().max() for each in expected.values()) > 0
    for name, each in gradients(network).items():
        torch.testing.assert_close(each, expected[name], atol=1e-6, rtol=1e-4)


def gradients(network: Network) -> dict[str, Tensor]:
    return {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}


@contextmanager
def watched(network: Network) -> Iterator[list[bool]]:
    """Whether gradients were enabled in each of the network's calls."""
    calls: list[bool] = []
    hook = network.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    yield calls
    hook.remove()


@pytest.mark.parametrize("exit_level", [0, 2])
def test_one_pass_a_block_has_gradients_and_the_cache_none(
    config: NetworkConfig, batch: ClipBatch, exit_level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, written = network_of(config), []
    extend = KVCache.extend

    def spied(self: KVCache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        written.extend([k.requires_grad, v.requires_grad])
        return extend(self, layer, k, v)

    monkeypatch.setattr(KVCache, "extend", spied)
    with watched(network) as calls:
        rollout = Rollout(network, config, batch, distance=4)
        made = rollout.outputs(rollout.inputs(exit_level, Generator().manual_seed(0)), exit_level)
    assert calls == [False] * (3 * exit_level) + [True] * 3
    assert all(each.requires_grad for each in made)
    assert written
    assert not any(written)


def test_the_generator_rests_where_critic_and_teacher_agree(config: NetworkConfig, batch: ClipBatch) -> None:
    run = Distillation(DistillRecipe(guidance=0.0), network_of(config))
    made = torch.randn(batch.latents.shape, generator=Generator().manual_seed(1))
    assert not run.direction(made, batch, Generator().manual_seed(0)).any()
    guided = Distillation(DistillRecipe(guidance=1.0), network_of(config))
    assert guided.direction(made, batch, Generator().manual_seed(0)).any()


def gaussian(mean: float) -> Callable[[Tensor, float], Tensor]:
    """The best estimate of clean points of a Gaussian round a mean, deviation 0.3, seen at sigma."""

    def estimate(x: Tensor, sigma: float) -> Tensor:
        variance = 0.3**2
        gain = (1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2)
        return mean + gain * (x - (1 - sigma) * mean)

    return estimate


def test_points_move_to_the_teachers_distribution() -> None:
    generator = Generator().manual_seed(0)
    # Two coordinates as channels of a clip of one pixel; the generator shifts a Gaussian by its only parameter.
    points = 0.3 * torch.randn(64, 2, 1, 1, 1, generator=generator)
    place = torch.full((2, 1, 1, 1), -1.0, requires_grad=True)
    optimiser = torch.optim.SGD([place], lr=0.2)
    for _ in range(100):
        made = points + place
        sigma = float(torch.rand((), generator=generator) * 0.9 + 0.05)
        noised = with_noise(made.detach(), torch.randn(made.shape, generator=generator), torch.tensor(sigma))
        fake = gaussian(float(place.detach().mean()))(noised, sigma)
        moved_loss(made, dmd_gradient(made.detach(), fake, gaussian(1.0)(noised, sigma))).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
    torch.testing.assert_close(place.detach(), torch.ones_like(place), atol=0.15, rtol=0)


def pretraining(config: NetworkConfig) -> Pretraining:
    network = Network(config)
    model.initialise(network, 0)
    return Pretraining(PretrainRecipe(steps=6, warmup=2, batches=RULE), network)


def distillation(config: NetworkConfig) -> Distillation:
    return Distillation(DistillRecipe(steps=6, ratio=2, batches=RULE), network_of(config))


@pytest.mark.parametrize("begun", [pretraining, distillation])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    config: NetworkConfig, clips: list[StoredClip], tmp_path: Path, begun: Callable[[NetworkConfig], Any]
) -> None:
    through, first = begun(config), begun(config)
    for _ in range(4):
        through.advance(clips)
    for _ in range(2):
        first.advance(clips)
    save(first, tmp_path / "state.pt")
    second = begun(config)
    restore(second, tmp_path / "state.pt")
    for _ in range(2):
        second.advance(clips)
    for name, part in through.parts.items():
        for ours, theirs in zip(flat(part.state_dict()), flat(second.parts[name].state_dict()), strict=True):
            assert torch.equal(ours, theirs), name


def flat(state: Any) -> list[Tensor]:
    """All tensors of a nested state."""
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return [tensor for value in values for tensor in flat(value)]


def test_pretraining_lowers_the_loss_on_clips_it_sees(config: NetworkConfig, clips: list[StoredClip]) -> None:
    run = Pretraining(PretrainRecipe(steps=30, warmup=5, batches=RULE), pretraining(config).network)
    losses = [run.advance(clips[:1])["loss"] for _ in range(30)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_run_keeps_its_state_log_and_plot(config: NetworkConfig, latents: Path, tmp_path: Path) -> None:
    go_on(pretraining(config), latents, tmp_path, Limits(minutes=5, save_minutes=5))
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", "log.jsonl", "loss.png", "recipe.json"}
    assert '"held_out_loss"' in (tmp_path / "log.jsonl").read_text()
