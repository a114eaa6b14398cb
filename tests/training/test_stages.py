"""The two stages of training on a small network: what is drawn, what has gradients, and that a stopped run goes on."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from einops import repeat
from PIL import Image
from torch import Generator, Tensor

from avatar.denoiser import model
from avatar.denoiser.cache import KVCache
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network
from avatar.denoiser.schedule import shifted
from avatar.vae.vae import Vae
from tests.training.small import RULE, begin, network_of, small, write_latents
from training.batches import Choice, ClipBatch, Share, batch_of, read_blocks
from training.checkpointing import Parts, Progress, restore, save
from training.clips import clean_of, per_frame, predict
from training.data import StoredClip, read_clips
from training.distill import Distillation, backward_by_block
from training.distill import Recipe as DistillRecipe
from training.loop import Limits, go_on
from training.losses import dmd_gradient, draw_sigmas, moved_loss, noised_each, with_noise
from training.pretrain import Pretraining
from training.pretrain import Recipe as PretrainRecipe
from training.self_forcing import Rollout
from training.strategy import SINGLE, Strategy


@pytest.fixture(scope="module")
def config() -> NetworkConfig:
    return small()


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared shards."""
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture
def clips(latents: Path) -> list[StoredClip]:
    return read_clips(latents, "train")


@pytest.fixture
def batch(config: NetworkConfig, clips: list[StoredClip]) -> ClipBatch:
    return batch_of(clips, replace(RULE, together=True), config, 0, 0)


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


def test_a_rollout_starts_from_as_much_noise_as_a_stream_does(config: NetworkConfig, batch: ClipBatch) -> None:
    little, whole = (
        Rollout(network_of(changed), changed, batch, distance=4).inputs(0, Generator().manual_seed(0))
        for changed in (replace(config, noise_scale=0.25), replace(config, noise_scale=1.0))
    )
    assert all(torch.equal(one, 0.25 * other) for one, other in zip(little, whole, strict=True))
    assert torch.cat(whole).std() > 0.9


def test_a_rollout_at_one_level_equals_the_whole_clip(config: NetworkConfig, batch: ClipBatch) -> None:
    network = network_of(config)
    x = torch.randn(batch.latents.shape, generator=Generator().manual_seed(1))
    sigmas = torch.full((2, 3), config.schedule[2])
    whole = predict(network, config, x, sigmas, batch, distance=4)
    rollout = Rollout(network, config, batch, distance=4)
    cache = rollout.cache()
    blocks = [rollout.velocity(part, block, 2, cache) for block, part in enumerate(x.chunk(3, dim=2))]
    torch.testing.assert_close(torch.cat(blocks, dim=2), whole, atol=1e-4, rtol=1e-4)


def test_one_block_is_the_same_to_scores_of_both_kinds(config: NetworkConfig, batch: ClipBatch) -> None:
    network, sigmas = network_of(config), torch.full((2, 1), 0.6)
    batch = batch.replaced(features=batch.features[..., :12], first_block=torch.zeros(2, dtype=torch.int64))
    one = [predict(network, config, batch.latents[:, :, :3], sigmas, batch, 4, kind) for kind in (True, False)]
    torch.testing.assert_close(*one, atol=1e-5, rtol=1e-5)


def test_a_score_that_is_not_causal_sees_the_whole_clip_wherever_it_stands(
    config: NetworkConfig, batch: ClipBatch
) -> None:
    network, sigmas = network_of(config), torch.full((2, 3), 0.6)
    x = batch.latents.clone()
    seen = predict(network, config, x, sigmas, batch, 4, is_causal=False)
    elsewhere = batch.replaced(first_block=batch.first_block + 40)
    assert torch.equal(predict(network, config, x, sigmas, elsewhere, 4, is_causal=False), seen)
    x[:, :, -1] += 1
    change = predict(network, config, x, sigmas, batch, 4, is_causal=False) - seen
    assert change[:, :, :3].abs().max() > 1e-3


def test_motion_may_be_the_frames_before_the_blocks(config: NetworkConfig, clips: list[StoredClip]) -> None:
    choice = Choice(clips[0], start=1, first_block=5, is_heard=True)
    rule = replace(RULE, follow=True)
    _, reference, motion, *_ = read_blocks(choice, 3, rule, config)
    before = torch.from_numpy(np.array(clips[0].array("latents")[:, :3])).float()
    assert motion.shape[1] == 19
    assert torch.equal(motion[:, -3:], before)
    assert torch.equal(motion[:, :1], reference)
    noised = noised_each(motion[None], Share(), Generator().manual_seed(0))[0]
    levels = (noised - motion).std((0, 2, 3))
    assert levels.min() < 0.5 < levels.max()


def test_blocks_alone_have_the_gradients_of_the_whole_graph(config: NetworkConfig, batch: ClipBatch) -> None:
    network = network_of(config)
    rollout = Rollout(network, config, batch, distance=4)
    entered = rollout.inputs(1, Generator().manual_seed(0))
    gradient = torch.randn(batch.latents.shape, generator=Generator().manual_seed(2))

    whole = moved_loss(torch.cat(rollout.outputs(entered, 1), dim=2), gradient)
    torch.autograd.backward(whole)
    expected = gradients(network)
    network.zero_grad()
    by_block = backward_by_block(SINGLE.spread(network), rollout, entered, 1, gradient)

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
    run = Distillation(DistillRecipe(guidance=0.0), begin(config))
    made = torch.randn(batch.latents.shape, generator=Generator().manual_seed(1))
    assert not run.direction(made, batch, Generator().manual_seed(0)).any()
    guided = Distillation(DistillRecipe(guidance=1.0), begin(config))
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


def as_one_file(parts: Parts, progress: Progress, out: Path, _: Strategy) -> None:
    """How runs were kept before they could be spread."""
    state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**state, **asdict(progress)}, out / "state.pt")


def pretraining(config: NetworkConfig) -> Pretraining:
    def begin() -> Network:
        network = Network(config)
        model.initialise(network, 0)
        return network

    return Pretraining(PretrainRecipe(steps=6, warmup=2, batches=RULE), begin)


def distillation(config: NetworkConfig) -> Distillation:
    return Distillation(DistillRecipe(steps=6, ratio=2, batches=replace(RULE, together=True)), begin(config))


@pytest.mark.parametrize("begun", [pretraining, distillation])
@pytest.mark.parametrize("way", [save, as_one_file])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    config: NetworkConfig,
    clips: list[StoredClip],
    tmp_path: Path,
    begun: Callable[[NetworkConfig], Any],
    way: Callable[[Parts, Progress, Path, Strategy], None],
) -> None:
    through, first = begun(config), begun(config)
    for _ in range(4):
        through.advance(clips)
    for _ in range(2):
        first.advance(clips)
    way(first.parts, first.progress, tmp_path, SINGLE)
    second = begun(config)
    restore(second.parts, second.progress, tmp_path)
    assert second.progress == first.progress
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


def test_a_state_that_was_not_written_to_its_end_is_not_gone_on_from(config: NetworkConfig, tmp_path: Path) -> None:
    run = distillation(config)
    run.progress.step = 7
    save(run.parts, run.progress, tmp_path, SINGLE)
    (tmp_path / "state" / "00000009").mkdir()
    again = distillation(config)
    restore(again.parts, again.progress, tmp_path)
    assert again.progress.step == 7
    run.progress.step = 9
    save(run.parts, run.progress, tmp_path, SINGLE)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["00000009"]


def test_pretraining_lowers_the_loss_on_clips_it_sees(config: NetworkConfig, clips: list[StoredClip]) -> None:
    run = Pretraining(PretrainRecipe(steps=30, warmup=5, batches=RULE), lambda: pretraining(config).spread.network)
    losses = [run.advance(clips[:1])["loss"] for _ in range(30)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_run_keeps_its_state_log_and_plot(config: NetworkConfig, latents: Path, tmp_path: Path) -> None:
    run = pretraining(config)
    run.codec = cast(Vae[Any], SimpleNamespace(codec=Plain()))
    go_on(run, latents, tmp_path, Limits(minutes=5, save_minutes=5))
    names = {path.name.partition(".tfevents")[0] for path in tmp_path.iterdir()}
    assert names == {"state", "log.jsonl", "loss.png", "recipe.json", "sheet.png", "events.out"}
    assert '"held_out_loss"' in (tmp_path / "log.jsonl").read_text()
    # Three held-out clips, and below each what the network makes of it.
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (6 * 8, 9 * 8, 3)
    truth, made = sheet[0:8].astype(int), sheet[8:16].astype(int)
    assert np.abs(truth - made).mean() > 5


class Plain:
    """Shows three channels of latents as they are."""

    def new_state(self) -> None:
        return None

    def decode(self, latents: Tensor, state: None) -> Tensor:  # noqa: ARG002
        frames = repeat(latents[:, :3], "b c t h w -> b c (t four) h w", four=4)
        return frames[:, :, 3:]


def test_a_run_that_is_told_to_stop_keeps_its_work(
    config: NetworkConfig, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pretraining(config)
    advance = run.advance

    def stopped(clips: Sequence[StoredClip]) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return advance(clips)

    monkeypatch.setattr(run, "advance", stopped)
    go_on(run, latents, tmp_path, Limits(minutes=5, save_minutes=5))
    assert run.progress.step == 1
    again = pretraining(config)
    restore(again.parts, again.progress, tmp_path)
    assert again.progress == run.progress
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
