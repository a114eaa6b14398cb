"""Tests of avatar.denoiser.denoiser."""

import gc
import weakref
from dataclasses import fields, replace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from avatar.denoiser.attention import condition_positions
from avatar.denoiser.config import NetworkConfig, tiny
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import Network, to_velocity
from avatar.denoiser.sampler import noise
from avatar.types import Block, Conditions, Session
from tests.denoiser.conftest import (
    HEIGHT,
    WIDTH,
    every_length,
    randn,
    random_block,
    random_conditions,
    random_session,
)
from training.initialise import initialise


def latents(denoiser: Denoiser, session: Session, blocks: list[Block]) -> list[Tensor]:
    """Return the latents of a new stream of a session for the blocks."""
    state = denoiser.open(session)
    return [latent_of(denoiser.step(block, state)) for block in blocks]


def latent_of(block: Block) -> Tensor:
    assert block.latent is not None
    return block.latent


def blocks_of(config: NetworkConfig, conditions: Conditions, *indexes: int) -> list[Block]:
    return [random_block(config, index, conditions) for index in indexes]


def test_only_the_latent_changes(denoiser: Denoiser, session: Session, config: NetworkConfig) -> None:
    block = replace(random_block(config, 0, random_conditions(config, 0)), traceparent="00-1-2-01")
    result = denoiser.step(block, denoiser.open(session))
    assert latent_of(result).shape == latent_of(block).shape
    assert not torch.equal(latent_of(result), latent_of(block))
    for field in fields(Block):
        if field.name != "latent":
            assert getattr(result, field.name) is getattr(block, field.name)


def test_level_0_starts_from_the_sessions_noise(
    denoiser: Denoiser, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    blocks = blocks_of(config, conditions, 0, 1)
    bare = [replace(block, latent=None) for block in blocks]
    answers = latents(denoiser, session, blocks)
    assert all(map(torch.equal, answers, latents(denoiser, session, bare)))
    assert not torch.equal(answers[0], latents(denoiser, replace(session, seed=2), bare)[0])


def test_initial_noise_has_the_checkpoints_scale(
    network: Network, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    blocks = blocks_of(config, conditions, 0)
    little, whole = (replace(config, noise_scale=scale) for scale in (0.25, 1.0))
    answer = latents(Denoiser(network, little, level=0), session, blocks)[0]
    by_hand = Denoiser(network, whole, level=0, noise=lambda *what: 0.25 * noise(*what))
    assert torch.equal(answer, latents(by_hand, session, blocks)[0])
    assert not torch.allclose(answer, latents(Denoiser(network, whole, level=0), session, blocks)[0])


def test_a_stream_that_starts_later_has_the_same_correlated_noise(
    network: Network, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    denoiser = Denoiser(network, replace(config, noise_correlation=0.9, window_latents=config.num_frames_per_block), 0)
    blocks = blocks_of(config, conditions, 0, 1, 2)
    whole, last = latents(denoiser, session, blocks), latents(denoiser, session, blocks[2:])
    assert torch.equal(whole[2], last[0])
    independent = Denoiser(network, replace(denoiser.config, noise_correlation=0.0), 0)
    assert not torch.allclose(whole[2], latents(independent, session, blocks[2:])[0])


def test_later_levels_continue_the_level_before(
    network: Network, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    denoiser, blocks = Denoiser(network, config, level=1), blocks_of(config, conditions, 0)
    other = [replace(blocks[0], latent=latent_of(blocks[0]) + 1)]
    assert not torch.allclose(latents(denoiser, session, blocks)[0], latents(denoiser, session, other)[0])
    with pytest.raises(ValueError, match="no latent"):
        latents(denoiser, session, [replace(blocks[0], latent=None)])


@every_length
def test_levels_share_a_network_but_no_cache(
    network: Network, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    levels, alone = [[Denoiser(network, config, level) for level in range(4)] for _ in range(2)]
    states = [level.open(session) for level in levels]
    entered: list[list[Block]] = [[] for _ in levels]
    left: list[list[Tensor]] = [[] for _ in levels]
    for block in blocks_of(config, conditions, *range(5)):
        for denoiser, state, before, after in zip(levels, states, entered, left, strict=True):
            before.append(block)
            block = denoiser.step(block, state)
            after.append(latent_of(block))
    for denoiser, before, after in zip(alone, entered, left, strict=True):
        assert all(map(torch.equal, after, latents(denoiser, session, before)))
    windows = [state.cache.window(0)[0] for state in states]
    assert not torch.allclose(windows[1], windows[2])


@every_length
def test_interleaved_equals_alone(denoiser: Denoiser, config: NetworkConfig) -> None:
    sessions = [random_session(config, name, seed) for name, seed in (("first", 1), ("second", 2))]
    blocks = [blocks_of(config, random_conditions(config, version), *range(5)) for version in (0, 1)]
    alone = [latents(denoiser, *each) for each in zip(sessions, blocks, strict=True)]
    states = [denoiser.open(session) for session in sessions]
    for index in range(5):
        for which in (0, 1):
            answer = latent_of(denoiser.step(blocks[which][index], states[which]))
            assert torch.equal(answer, alone[which][index])


@every_length
def test_closing_a_stream_frees_state(
    denoiser: Denoiser, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    state = denoiser.open(session)
    answer = denoiser.step(random_block(config, 0, conditions), state)
    cache, buffer = weakref.ref(state.cache), weakref.ref(state.cache.window(0)[0].untyped_storage())
    del state
    gc.collect()
    assert cache() is None
    assert buffer() is None
    assert answer.latent is not None


def test_new_conditions_are_prefilled_and_keep_the_window(
    denoiser: Denoiser, session: Session, config: NetworkConfig
) -> None:
    first, second = (random_conditions(config, version) for version in (0, 1))
    blocks = blocks_of(config, first, 0, 1)
    state, kept = denoiser.open(session), denoiser.open(session)
    for block in blocks:
        denoiser.step(block, state)
        denoiser.step(block, kept)
    window = state.cache.window(0)[0].clone()
    changed = latent_of(denoiser.step(random_block(config, 2, second), state))
    assert not torch.allclose(changed, latent_of(denoiser.step(random_block(config, 2, first), kept)), atol=1e-3)
    filled = 2 * config.num_frames_per_block * 24
    assert torch.equal(state.cache.window(0)[0][:, :filled], window[:, :filled])
    assert state.prefilled is not None
    assert state.prefilled.version == 1


def test_conditions_are_prefilled_once(
    denoiser: Denoiser,
    network: Network,
    session: Session,
    conditions: Conditions,
    config: NetworkConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefill = Mock(wraps=network.prefill)
    monkeypatch.setattr(network, "prefill", prefill)
    latents(denoiser, session, blocks_of(config, conditions, 0, 1, 2))
    assert prefill.call_count == 1


def test_blocks_come_in_order(
    denoiser: Denoiser, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    state = denoiser.open(session)
    denoiser.step(random_block(config, 4, conditions), state)
    for wrong in (4, 6, 0):
        with pytest.raises(ValueError, match=f"expected block 5, got {wrong}"):
            denoiser.step(random_block(config, wrong, conditions), state)
    denoiser.step(random_block(config, 5, conditions), state)


@every_length
def test_history_blocks_rebuild_a_stream(
    network: Network, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    shallow = replace(config, num_layers=1, audio_inject_layers=(0,))
    one_layer = Network(shallow)
    one_layer.load_state_dict(network.state_dict(), strict=False)
    denoiser = Denoiser(one_layer, shallow, level=1)
    blocks = blocks_of(config, conditions, *range(6))
    first = 5 - denoiser.history_blocks
    through, anew, late = (
        latents(denoiser, session, each)[-1] for each in (blocks, blocks[first:], blocks[first + 1 :])
    )
    torch.testing.assert_close(anew, through, atol=1e-6, rtol=0)
    assert not torch.allclose(late, through, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": torch.zeros(3, 6, 7)}, r"features must have shape \(3, 6, 8\), got \(3, 6, 7\)"),
        ({"latent": torch.zeros(4, 3, 8, 12)}, r"latent must have shape \(4, 2, 8, 12\)"),
        ({"conditions": None}, "no conditions"),
        ({"conditions": Conditions(0, torch.zeros(4, 2, 8, 12), torch.zeros(0, 10))}, "sink must have shape"),
        ({"conditions": Conditions(0, torch.zeros(4, 1, 8, 12), torch.zeros(6, 10))}, "text has 6 tokens.* at most 5"),
        ({"conditions": Conditions(0, torch.zeros(4, 1, 8, 12), torch.zeros(2, 9))}, "text must have shape"),
        ({"index": -1}, "expected block 0, got -1"),
    ],
)
def test_an_invalid_block_is_refused_and_changes_nothing(
    network: Network,
    session: Session,
    conditions: Conditions,
    config: NetworkConfig,
    change: dict[str, object],
    said: str,
) -> None:
    denoiser, block = Denoiser(network, config, level=1), random_block(config, 0, conditions)
    state = denoiser.open(session)
    with pytest.raises(ValueError, match=said):
        denoiser.step(replace(block, **change), state)  # type: ignore[arg-type]
    assert torch.equal(latent_of(denoiser.step(block, state)), latents(denoiser, session, [block])[0])


@pytest.mark.parametrize(
    ("shape", "said"),
    [((3, 19, 8, 12), "motion latents"), ((4, 19, 8), "motion"), ((4, 1, 7, 12), "even"), ((4, 1, 8, 6), "8")],
)
def test_a_session_with_unfit_latents_is_refused(denoiser: Denoiser, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        denoiser.open(Session("odd", 1, torch.zeros(shape)))


@pytest.mark.parametrize("level", [-1, 4])
def test_a_level_outside_the_schedule_is_refused(network: Network, config: NetworkConfig, level: int) -> None:
    with pytest.raises(ValueError, match="level must be 0 to 3"):
        Denoiser(network, config, level)


def test_no_text_equals_zero_padding(
    denoiser: Denoiser, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    none, zero = (replace(conditions, text=text) for text in (torch.zeros(0, 0), torch.zeros(5, config.text_dim)))
    assert torch.equal(*(latents(denoiser, session, blocks_of(config, each, 0))[0] for each in (none, zero)))


def test_frame_ten_million_equals_frame_one_thousand_with_shifted_motion(
    network: Network,
    session: Session,
    conditions: Conditions,
    config: NetworkConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    denoiser = Denoiser(network, replace(config, sink_distance=7), level=1)
    blocks = blocks_of(config, conditions, *range(5))

    def answers_from(frame: int, motion_moved: int) -> Tensor:
        def moved_positions(height: int, width: int) -> Tensor:
            positions = condition_positions(height, width)
            positions[height * width // 4 :, 0] += motion_moved
            return positions

        monkeypatch.setattr("avatar.denoiser.cache.condition_positions", moved_positions)
        first = frame // config.num_frames_per_block
        return torch.stack(latents(denoiser, session, [replace(each, index=first + each.index) for each in blocks]))

    near, far = answers_from(10**3, 0), answers_from(10**7, 10**7 - 10**3)
    assert far.isfinite().all()
    assert torch.equal(far, answers_from(10**7, 10**7 - 10**3))
    # The remainder is the rounding of the rope table to half precision.
    assert relative_rms(far, near) < 2e-5
    assert relative_rms(answers_from(10**7, 0), near) > 1e-3, "motion at its old position gives another result"


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean().sqrt() / expected.std()).item()


def test_the_last_level_updates_the_sink(network: Network, session: Session, config: NetworkConfig) -> None:
    updates = [Denoiser(network, config, level).updates_sink(session) for level in range(4)]
    assert updates == [False, False, False, True]


@pytest.mark.parametrize(
    ("own", "requested", "update"), [(4, None, 4), (4, 7, 7), (4, 0, None), (None, None, None), (None, 2, 2)]
)
def test_a_session_sets_its_sink_update_block(
    network: Network,
    session: Session,
    config: NetworkConfig,
    own: int | None,
    requested: int | None,
    update: int | None,
) -> None:
    last = Denoiser(network, replace(config, sink_update_block=own), level=3)
    session = replace(session, sink_update_block=requested)
    assert last.sink_update_block(session) == update
    assert last.updates_sink(session) is (update is not None)


def test_a_session_sets_its_sink_distance(
    network: Network, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    blocks, denoiser = blocks_of(config, conditions, 50), Denoiser(network, config, level=1)
    for distance in (0, 9, (5, 5)):
        chosen = latents(denoiser, replace(session, sink_distance=distance), blocks)
        built = latents(Denoiser(network, replace(config, sink_distance=distance), level=1), session, blocks)
        assert torch.equal(chosen[0], built[0])
        assert not torch.equal(chosen[0], latents(denoiser, replace(session, sink_distance=30), blocks)[0])
    with pytest.raises(ValueError, match="sink_distance"):
        denoiser.open(replace(session, sink_distance=(6, 5)))


def test_each_token_gets_the_audio_of_its_masks_actors(
    network: Network, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    one, other = (random_block(config, 0, conditions) for _ in range(2))
    other = replace(other, features=other.features + 1)
    both = replace(one, features=torch.stack([one.features, other.features]))
    denoiser, masks = Denoiser(network, config, level=1), torch.zeros(2, 4, 6)
    masks[0] = 1
    torch.testing.assert_close(
        latents(denoiser, replace(session, masks=masks), [both])[0], latents(denoiser, session, [one])[0]
    )
    masks[:, 2] = torch.tensor([0.0, 1.0])[:, None]
    changed = latents(denoiser, replace(session, masks=masks), [both])[0] - latents(denoiser, session, [one])[0]
    rows = changed.abs().amax((0, 1, 3))
    assert rows.argmax() in (4, 5)  # the third row of tokens


def test_masks_and_features_must_have_equal_actors(
    denoiser: Denoiser, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    with pytest.raises(ValueError, match=r"masks must have shape \(2, 4, 6\)"):
        denoiser.open(replace(session, masks=torch.ones(2, 8, 12)))
    state = denoiser.open(replace(session, masks=torch.ones(2, 4, 6)))
    with pytest.raises(ValueError, match=r"features must have shape \(2, 3, 6, 8\)"):
        denoiser.step(random_block(config, 0, conditions), state)


def test_a_residual_output_converts_to_a_velocity(config: NetworkConfig) -> None:
    clean, epsilon, reference = randn(1, 1, 4, 2, 8, 12), randn(2, 1, 4, 2, 8, 12), randn(3, 1, 4, 1, 8, 12)
    residual = replace(config, output="x0_residual", residual_scale=0.3)
    x = 0.25 * clean + 0.75 * epsilon
    velocity = to_velocity((clean - reference) / 0.3, x, reference, 0.75, residual)
    torch.testing.assert_close(velocity, epsilon - clean, atol=1e-5, rtol=0)
    assert to_velocity(epsilon, x, reference, 0.75, config) is epsilon


def test_an_untrained_tiny_network_gives_the_still_reference() -> None:
    config = replace(tiny(), num_layers=2, audio_inject_layers=(0,))
    network = Network(config)
    initialise(network, seed=1)
    motion = randn(1, 16, 19, 8, 8)
    session, conditions = Session("still", 5, motion), Conditions(0, motion[:, :1], torch.zeros(0, 0))
    block = Block(0, torch.zeros(5, 384, 12), conditions=conditions)
    for level in range(config.num_levels):
        denoiser = Denoiser(network, config, level)
        block = denoiser.step(block, denoiser.open(session))
        if level == 0:
            expected = 0.1 * motion[:, :1] + 0.9 * config.noise_scale * noise(session, 0, 3)
            torch.testing.assert_close(latent_of(block), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(latent_of(block), motion[:, :1].expand(-1, 3, -1, -1), atol=1e-5, rtol=0)


def test_the_pose_input_is_the_reference_if_configured(
    network: Network, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    seen: list[Tensor] = []
    for pose in ("zeros", "reference"):
        denoiser = Denoiser(network, replace(config, pose=pose), level=0)
        state = denoiser.open(session)
        denoiser.step(random_block(config, 0, conditions), state)
        assert state.prefilled is not None
        seen.append(state.prefilled.pose)
    assert not seen[0].any()
    assert torch.equal(seen[1][0], conditions.sink.expand(-1, config.num_frames_per_block, -1, -1))


def test_half_precision_latents_are_half_precision(
    network: Network, session: Session, conditions: Conditions, config: NetworkConfig
) -> None:
    half = Network(config).bfloat16()
    half.load_state_dict(network.state_dict())
    blocks = blocks_of(config, conditions, *range(4))
    for level in (0, 2):
        full = latents(Denoiser(network, config, level), session, blocks)
        for answer, expected in zip(latents(Denoiser(half, config, level), session, blocks), full, strict=True):
            assert answer.dtype == torch.bfloat16
            assert relative_rms(answer.float(), expected) < 2e-2


def test_a_denoiser_of_given_sizes_refuses_others(network: Network, config: NetworkConfig, session: Session) -> None:
    Denoiser(network, config, 0, sizes=[(HEIGHT, WIDTH)]).open(session)
    with pytest.raises(ValueError, match="latents of 8x12 are not served here, only 8x8, 16x16"):
        Denoiser(network, config, 0, sizes=[(8, 8), (16, 16)]).open(session)
