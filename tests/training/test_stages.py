"""Both stages of training on a small network: batches, noise levels, gradients, losses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.nn.utils import clip_grad_norm_

from avatar.denoiser.cache import KVCache
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network
from avatar.denoiser.sampler import shifted
from tests.training.small import BATCHES, maker, network_of, small, small_base
from training.batches import ClipBatch, ClipSpan, Share, draw_spans, face_motion_of, load_batch, read_span
from training.clips import clean_estimate, encode_inputs, frame_sigmas, predict_velocity
from training.data import StoredClip
from training.distill import Distillation, DistillRecipe, accumulate_blockwise
from training.initialise import ZERO_INIT
from training.losses import (
    add_noise,
    add_noise_per_frame,
    dmd_gradient,
    dmd_loss,
    draw_level_distances,
    draw_sigmas,
    exit_levels,
)
from training.pretrain import Pretraining, PretrainRecipe, clip_losses, explained_share
from training.self_forcing import BlockwiseGeneration
from training.strategy import SINGLE, Strategy

# Of the sink, from the blocks of a clip: each block has its own.
DISTANCES = (4, 7, 5)
LEVEL_DISTANCES = [DISTANCES] * 4
# Latent frames of a block.
every_length = pytest.mark.parametrize("config", [1, 3], indirect=True)


@pytest.fixture(scope="module")
def config(request: pytest.FixtureRequest) -> NetworkConfig:
    return replace(small(), num_frames_per_block=getattr(request, "param", 3))


@pytest.fixture(scope="module")
def batch(config: NetworkConfig, prepared: list[StoredClip]) -> ClipBatch:
    return load_batch(prepared, replace(BATCHES, same_position=True), config, 0, 0)


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
    frames = frame_sigmas(sigmas, config)[:, 0, :, 0, 0]
    assert torch.equal(frames[:, ::3], frames[:, 2::3])


def test_levels_of_the_schedule_are_trained_as_they_are_served() -> None:
    config = small_base()
    lowest = config.schedule[-2]
    assert lowest < 0.02
    sigmas = draw_sigmas(400, 3, config, 3.0, Generator().manual_seed(0))
    assert (sigmas == torch.tensor(lowest)).float().mean() > 0.08
    assert sigmas[sigmas != torch.tensor(lowest)].min() >= 0.02
    assert exit_levels(config) == [0, 1, 2], "the clean estimate at a level of no noise is its input"
    assert exit_levels(small()) == [0, 1, 2, 3]


def test_the_lips_weigh_more_in_the_gradient_of_distillation() -> None:
    generated, gradient = torch.randn(2, 1, 4, 3, 8, 8, generator=Generator().manual_seed(0)).unbind()
    weight = torch.rand(1, 1, 3, 8, 8, generator=Generator().manual_seed(1))
    generated.requires_grad_()
    torch.autograd.backward(dmd_loss(generated, gradient, weight))
    assert generated.grad is not None
    torch.testing.assert_close(generated.grad * generated.numel(), gradient * weight, atol=1e-5, rtol=1e-4)


def test_schedule_shift_and_clean_estimate_round_trip() -> None:
    uniform = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shifted(shifted(uniform, 5.0), 1 / 5.0), uniform)
    clean, noise = torch.randn(2, 1, 4, 3, 8, 8, generator=Generator().manual_seed(0))
    sigma = torch.tensor(0.7)
    torch.testing.assert_close(clean_estimate(add_noise(clean, noise, sigma), noise - clean, sigma), clean)


def test_a_batch_depends_on_its_step_alone(config: NetworkConfig, prepared: list[StoredClip]) -> None:
    first, again, other = (load_batch(prepared, BATCHES, config, 0, step) for step in (5, 5, 6))
    assert torch.equal(first.latents, again.latents)
    assert not torch.equal(first.latents, other.latents)
    assert first.weight.mean((1, 2, 3, 4)).allclose(torch.ones(2), atol=0.05)


@every_length
def test_generation_starts_from_the_noise_of_training(config: NetworkConfig, batch: ClipBatch) -> None:
    quarter, full = (
        BlockwiseGeneration(network_of(each), each, batch, LEVEL_DISTANCES).inputs(0, Generator().manual_seed(0))
        for each in (replace(config, trained_noise_scale=0.25), replace(config, noise_scale=0.5))
    )
    assert all(torch.equal(one, 0.25 * other) for one, other in zip(quarter, full, strict=True))
    assert torch.cat(full).std() > 0.9


@every_length
def test_the_noise_of_training_is_as_correlated_as_that_of_serving(config: NetworkConfig, batch: ClipBatch) -> None:
    config = replace(config, noise_correlation=0.9)
    generation = BlockwiseGeneration(network_of(config), config, batch, LEVEL_DISTANCES)
    frames = torch.cat(generation.inputs(0, Generator().manual_seed(0)), dim=2)
    assert abs((frames[:, :, 1:] * frames[:, :, :-1]).mean().item() - 0.9) < 0.1
    one, other = (
        clip_losses(network_of(each), batch, PretrainRecipe(), Generator().manual_seed(0), Share())
        for each in (config, replace(config, noise_correlation=0.0))
    )
    assert not torch.equal(one, other)


@every_length
def test_blockwise_generation_at_one_level_equals_the_whole_clip(config: NetworkConfig, batch: ClipBatch) -> None:
    network = network_of(config)
    x = torch.randn(batch.latents.shape, generator=Generator().manual_seed(1))
    sigmas = torch.full((2, 3), config.schedule[2])
    whole = predict_velocity(network, config, x, sigmas, batch, DISTANCES)
    generation = BlockwiseGeneration(network, config, batch, LEVEL_DISTANCES)
    cache = generation.new_cache()
    blocks = [generation.velocity(part, block, 2, cache) for block, part in enumerate(x.chunk(3, dim=2))]
    torch.testing.assert_close(torch.cat(blocks, dim=2), whole, atol=1e-4, rtol=1e-4)


@every_length
def test_causal_and_bidirectional_scores_agree_on_one_block(config: NetworkConfig, batch: ClipBatch) -> None:
    network, sigmas = network_of(config), torch.full((2, 1), 0.6)
    first = {
        name: getattr(batch, name)[..., : config.frames_per_block] for name in ("features", "heard", "face_motion")
    }
    batch = batch.replace(**first, first_block=torch.zeros(2, dtype=torch.int64))
    x = batch.latents[:, :, : config.num_frames_per_block]
    causal, bidirectional = (predict_velocity(network, config, x, sigmas, batch, [4], kind) for kind in (True, False))
    torch.testing.assert_close(causal, bidirectional, atol=1e-5, rtol=1e-5)


def test_a_bidirectional_score_hears_the_clip_as_a_whole(config: NetworkConfig, batch: ClipBatch) -> None:
    """Eight columns before a block are all that its tokens depend on."""
    alone, network = (network_of(replace(config, audio_context_frames=each)) for each in (0, 8))
    whole, blocks = (encode_inputs(alone, batch, is_whole=each)[0].local for each in (True, False))
    expected = encode_inputs(network, batch)[0].local
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(blocks, expected, atol=1e-3)


@every_length
def test_each_level_has_sink_distances_of_its_own(config: NetworkConfig, batch: ClipBatch) -> None:
    network = network_of(config)
    near, far = (
        torch.cat(BlockwiseGeneration(network, config, batch, distances).inputs(2, Generator().manual_seed(0)), dim=2)
        for distances in (LEVEL_DISTANCES, [DISTANCES, (40, 40, 40), DISTANCES, DISTANCES])
    )
    assert not torch.equal(near, far)
    drawn = draw_level_distances(small_base(), 7, Generator().manual_seed(0))
    assert len({tuple(each) for each in drawn}) == small_base().num_levels


@every_length
def test_a_bidirectional_score_sees_the_whole_clip_at_any_position(config: NetworkConfig, batch: ClipBatch) -> None:
    network, sigmas = network_of(config), torch.full((2, 3), 0.6)
    x = batch.latents.clone()
    expected = predict_velocity(network, config, x, sigmas, batch, DISTANCES, is_causal=False)
    elsewhere = batch.replace(first_block=batch.first_block + 40)
    assert torch.equal(predict_velocity(network, config, x, sigmas, elsewhere, DISTANCES, is_causal=False), expected)
    x[:, :, -1] += 1
    change = predict_velocity(network, config, x, sigmas, batch, DISTANCES, is_causal=False) - expected
    assert change[:, :, : config.num_frames_per_block].abs().max() > 1e-3


@every_length
def test_motion_can_be_the_frames_before_the_blocks(config: NetworkConfig, prepared: list[StoredClip]) -> None:
    span = ClipSpan(prepared[0], start=1, first_block=5)
    clip = read_span(span, 3, replace(BATCHES, motion_from_clip=True), config)
    per_block = config.num_frames_per_block
    before = torch.from_numpy(np.array(prepared[0].array("latents")[:, :per_block])).float()
    assert clip.motion.shape[1] == 19
    assert torch.equal(clip.motion[:, -per_block:], before)
    assert torch.equal(clip.motion[:, :1], clip.reference)
    noisy = add_noise_per_frame(clip.motion[None], Share(), Generator().manual_seed(0))[0]
    levels = (noisy - clip.motion).std((0, 2, 3))
    assert levels.min() < 0.5 < levels.max()


def test_poses_of_face_motion_are_relative_to_the_reference(config: NetworkConfig, prepared: list[StoredClip]) -> None:
    span = ClipSpan(prepared[0], start=1, first_block=0)
    clip = read_span(span, 3, BATCHES, config)
    assert clip.face_motion.shape == (6, 36)
    whole = face_motion_of(prepared[0])
    assert torch.equal(clip.face_motion, whole[:, 12:])
    pose, reference_pose = (np.array(prepared[0].array(name)) for name in ("pose", "reference_pose"))
    assert torch.equal(whole[1:4], torch.from_numpy(pose - reference_pose).T)
    assert torch.equal(whole[0], torch.from_numpy(np.array(prepared[0].array("blink"))))


def test_a_fifth_of_the_clips_has_no_listener_and_a_fifth_moves_freely(
    config: NetworkConfig, prepared: list[StoredClip]
) -> None:
    spans = [span for step in range(150) for span in draw_spans(prepared, BATCHES, config, 0, step)[1]]
    for name in ("has_heard", "has_face_motion"):
        assert 0.1 < np.mean([not getattr(span, name) for span in spans]) < 0.3
    assert not any(span.has_heard for span in spans if not span.has_audio), "guidance drops both"
    clip = read_span(replace(spans[0], has_heard=False, has_face_motion=False), 3, BATCHES, config)
    assert (float(clip.has_heard), float(clip.has_face_motion)) == (0, 0)
    assert not clip.heard.any()


def test_what_is_dropped_adds_nothing_and_what_is_swapped_does(config: NetworkConfig, batch: ClipBatch) -> None:
    config = replace(config, mover=None)
    network, sigmas = network_of(config), torch.full((2, 3), 0.6)
    given = batch.replace(has_heard=torch.ones(2), has_face_motion=torch.ones(2))
    x = batch.latents

    def predicted(batch: ClipBatch) -> Tensor:
        return predict_velocity(network, config, x, sigmas, batch, DISTANCES)

    without = network_of(replace(config, heard_inject_layers=(), face_motion=False))
    shared = {name: each for name, each in network.state_dict().items() if name in without.state_dict()}
    without.load_state_dict(shared)
    plain = predict_velocity(without, without.config, x, sigmas, batch, DISTANCES)
    torch.testing.assert_close(
        predicted(batch.replace(has_heard=torch.zeros(2), has_face_motion=torch.zeros(2))), plain
    )
    for name in ("features", "heard", "face_motion"):
        assert not torch.allclose(predicted(given.swapped(name)), predicted(given), atol=1e-3)
    unconditional = given.unconditional()
    assert not unconditional.has_heard.any()
    assert torch.equal(unconditional.face_motion, given.face_motion)


def test_inputs_that_a_network_ignores_have_no_gain(
    config: NetworkConfig, prepared: list[StoredClip], caplog: pytest.LogCaptureFixture
) -> None:
    def gains(make_network: Callable[[], Network]) -> dict[str, float]:
        run = Pretraining(PretrainRecipe(steps=500, batches=BATCHES), make_network)
        run.progress.step = 500
        return run.validate(prepared)

    def deaf() -> Network:
        network = network_of(config)
        for name, weight in network.named_parameters():
            if ZERO_INIT.search(name) and "injector" in name and not name.startswith("audio"):
                torch.nn.init.zeros_(weight)
            if name.endswith("injector.0.o.bias") or name.startswith("brows"):
                torch.nn.init.zeros_(weight)
        return network

    assert set(gains(maker(config))) == {"held_out_loss", "features_gain", "heard_gain", "face_motion_gain"}
    caplog.clear()
    found = gains(deaf)
    assert found["heard_gain"] == 0
    assert found["features_gain"] != 0
    assert "an input is ignored: heard_gain is 0.0000" in caplog.text


def test_two_passes_explain_the_motion_that_the_network_predicts(
    config: NetworkConfig, prepared: list[StoredClip], batch: ClipBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pretraining, "_held_out_loss", lambda *_: 1.0)
    monkeypatch.setattr("training.pretrain.NUM_GAIN_CLIPS", 2)
    two = replace(config, schedule=(1.0, 0.4, 0.0))
    found = Pretraining(PretrainRecipe(batches=BATCHES), maker(two)).validate(prepared)
    assert {name for name in found if name.startswith("r2")} == {"r2_at_0.3", "r2_at_0.4", "r2_at_0.5"}
    assert found["r2_at_0.3"] != found["r2_at_0.5"]

    def explained(share: float) -> float:
        """Return what a network explains that predicts a share of the motion about each clip's mean."""
        mean = batch.latents.mean(2, keepdim=True)
        predicted = mean + share * (batch.latents - mean)
        velocity = lambda _network, _config, x, sigmas, *_: (x - predicted) / frame_sigmas(sigmas, config)  # noqa: E731
        monkeypatch.setattr("training.pretrain.predict_velocity", velocity)
        return float(explained_share(network_of(config), batch, (1.0, 0.4), Generator().manual_seed(0), Share()))

    assert explained(1.0) == pytest.approx(1)
    assert explained(0.5) == pytest.approx(0.75)
    assert explained(0.0) == pytest.approx(0, abs=1e-5)


@every_length
def test_blockwise_accumulation_has_the_gradients_of_the_whole_graph(config: NetworkConfig, batch: ClipBatch) -> None:
    network = network_of(config)
    generation = BlockwiseGeneration(network, config, batch, LEVEL_DISTANCES)
    inputs = generation.inputs(1, Generator().manual_seed(0))
    gradient = torch.randn(batch.latents.shape, generator=Generator().manual_seed(2))

    whole = dmd_loss(torch.cat(generation.outputs(inputs, 1), dim=2), gradient, batch.weight)
    torch.autograd.backward(whole)
    expected = gradients(network)
    network.zero_grad()
    blockwise = accumulate_blockwise(SINGLE.wrap(network), generation, inputs, 1, gradient, batch.weight)

    torch.testing.assert_close(blockwise, whole.detach())
    assert max(each.abs().max() for each in expected.values()) > 0
    torch.testing.assert_close(gradients(network), expected, atol=1e-6, rtol=1e-4)


def gradients(network: Network) -> dict[str, Tensor]:
    return {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}


@contextmanager
def recorded_calls(network: Network) -> Iterator[list[bool]]:
    """Record for each call of the network if gradients were enabled."""
    calls: list[bool] = []
    hook = network.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    yield calls
    hook.remove()


@every_length
@pytest.mark.parametrize("exit_level", [0, 2])
def test_one_pass_per_block_has_gradients_and_the_cache_has_none(
    config: NetworkConfig, batch: ClipBatch, exit_level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, written = network_of(config), []
    extend = KVCache.extend

    def recorded(self: KVCache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        written.extend([k.requires_grad, v.requires_grad])
        return extend(self, layer, k, v)

    monkeypatch.setattr(KVCache, "extend", recorded)
    with recorded_calls(network) as calls:
        generation = BlockwiseGeneration(network, config, batch, LEVEL_DISTANCES)
        outputs = generation.outputs(generation.inputs(exit_level, Generator().manual_seed(0)), exit_level)
    assert calls == [False] * (3 * exit_level) + [True] * 3
    assert all(each.requires_grad for each in outputs)
    assert written
    assert not any(written)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_the_gradient_is_zero_where_critic_and_teacher_agree(
    config: NetworkConfig, batch: ClipBatch, guidance: float
) -> None:
    run = Distillation(DistillRecipe(guidance=guidance), maker(config))
    generated = torch.randn(batch.latents.shape, generator=Generator().manual_seed(1))
    gradient = run.generator_gradient(generated, batch, Generator().manual_seed(0))
    assert bool(gradient.any()) == (guidance > 0)


def test_clips_of_the_data_add_their_share_to_the_generators_gradient(config: NetworkConfig, batch: ClipBatch) -> None:
    """Critic, teacher and generator are the same network, so that the gradient of distillation alone is zero."""
    precise = Strategy(precision=torch.float32)
    run = Distillation(DistillRecipe(guidance=0.0, real_weight=0.25), maker(config), strategy=precise)
    found: dict[str, Tensor] = {}
    run.optimizer.register_step_pre_hook(lambda *_: found.update(gradients(run.generator.network)))
    losses = run.train_generator(batch, 1, Generator().manual_seed(0))
    again = Distillation(DistillRecipe(), maker(config), strategy=precise)
    real = again.real_loss(batch, Generator().manual_seed(0))
    torch.autograd.backward(0.25 * real)
    clip_grad_norm_(again.generator.network.parameters(), 1.0)
    assert losses["real_loss"] == pytest.approx(float(real.detach()))
    expected = gradients(again.generator.network)
    assert max(each.abs().max() for each in expected.values()) > 1e-3
    torch.testing.assert_close({name: found[name] for name in expected}, expected, atol=1e-5, rtol=1e-3)


def gaussian(mean: float) -> Callable[[Tensor, float], Tensor]:
    """Return the optimal clean estimate at sigma for a Gaussian of standard deviation 0.3."""

    def estimate(x: Tensor, sigma: float) -> Tensor:
        variance = 0.3**2
        gain = (1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2)
        return mean + gain * (x - (1 - sigma) * mean)

    return estimate


def test_points_move_to_the_teachers_distribution() -> None:
    generator = Generator().manual_seed(0)
    # Two coordinates as channels of a clip of one pixel; the generator shifts a Gaussian by its only parameter.
    points = 0.3 * torch.randn(64, 2, 1, 1, 1, generator=generator)
    mean = torch.full((2, 1, 1, 1), -1.0, requires_grad=True)
    optimizer = torch.optim.SGD([mean], lr=0.2)
    for _ in range(100):
        generated = points + mean
        sigma = float(torch.rand((), generator=generator) * 0.9 + 0.05)
        noise = torch.randn(generated.shape, generator=generator)
        noisy = add_noise(generated.detach(), noise, torch.tensor(sigma))
        fake = gaussian(float(mean.detach().mean()))(noisy, sigma)
        gradient = dmd_gradient(generated.detach(), fake, gaussian(1.0)(noisy, sigma))
        torch.autograd.backward(dmd_loss(generated, gradient))
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(mean.detach(), torch.ones_like(mean), atol=0.15, rtol=0)
