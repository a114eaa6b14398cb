"""Tests of avatar.denoiser.denoiser.Uploader, with a stand-in for the GPU, and of inputs that come ahead of a step."""

from dataclasses import replace
from unittest.mock import Mock, patch

import pytest
import torch

from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import INPUTS, Denoiser, Uploader
from avatar.denoiser.model import Network
from avatar.denoiser.sampler import NoiseHistory
from avatar.types import Block, Conditions, Session
from tests.denoiser.conftest import randn, random_block
from tests.standin_gpu import GPU, stand_in_gpu


def block_of_two_dtypes() -> Block:
    return Block(0, randn(1, 3, 6, 8), randn(2, 4, 2, 8, 12).half(), heard=randn(3, 3, 6, 8), noise=randn(4, 4, 2, 8))


def test_inputs_go_to_the_gpu_from_pinned_memory_on_a_stream_of_their_own() -> None:
    given = block_of_two_dtypes()
    with stand_in_gpu() as gpu:
        uploaded = Uploader(GPU).upload(given)
        (own,) = gpu.streams
        assert [each.num_elements for each in gpu.to_gpu] == [64 + 2 * 144, 768], "one copy for each dtype"
        for copy in gpu.to_gpu:
            assert copy.is_pinned
            assert not copy.is_waited_for
            assert copy.stream is own
        assert gpu.stream is gpu.computing
        for name in ("noise", "latent", "features", "heard"):
            assert getattr(uploaded, name).device == GPU
    for name in INPUTS:
        before, after = getattr(given, name), getattr(uploaded, name)
        assert after is None if before is None else torch.equal(after, before), name


def test_a_step_waits_for_its_inputs_on_the_gpu_and_keeps_their_memory() -> None:
    with stand_in_gpu() as gpu:
        uploader = Uploader(GPU)
        uploaded = uploader.upload(block_of_two_dtypes())
        assert not gpu.computing.waits_for
        uploader.wait(uploaded)
        assert gpu.computing.waits_for == gpu.streams
        used = [(id(tensor), stream) for tensor, stream in gpu.used_by]
    inputs = [getattr(uploaded, name) for name in INPUTS]
    assert used == [(id(tensor), gpu.computing) for tensor in inputs if tensor is not None]


def test_what_is_on_the_gpu_is_not_copied_again() -> None:
    with stand_in_gpu() as gpu:
        uploader = Uploader(GPU)
        uploaded = uploader.upload(block_of_two_dtypes())
        assert uploader.upload(uploaded) is uploaded
        assert len(gpu.to_gpu) == 2


@pytest.mark.parametrize("level", [0, 1])
def test_the_network_runs_after_the_wait_for_its_inputs(
    network: Network, config: NetworkConfig, session: Session, conditions: Conditions, level: int
) -> None:
    denoiser, seen = Denoiser(network, config, level), Mock()
    state, uploader = denoiser.open(session), denoiser._uploader
    seen.upload.side_effect, seen.encode_audio.side_effect = uploader.upload, StopIteration
    with (
        patch.object(uploader, "upload", seen.upload),
        patch.object(uploader, "wait", seen.wait),
        patch.object(network, "encode_audio", seen.encode_audio),
        pytest.raises(StopIteration),
    ):
        denoiser.step(random_block(config, 0, conditions), state)
    assert [name for name, *_ in seen.mock_calls] == ["upload", "wait", "encode_audio"]


@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("first", [0, 3])
def test_noise_that_is_drawn_ahead_gives_equal_latents(
    network: Network, config: NetworkConfig, session: Session, conditions: Conditions, correlation: float, first: int
) -> None:
    denoiser = Denoiser(network, replace(config, noise_correlation=correlation, noise_scale=0.5), 0)
    blocks = [random_block(config, first + number, conditions) for number in range(3)]
    history = NoiseHistory()
    ahead = [denoiser.upload(denoiser.with_noise(block, session, history)) for block in blocks]
    states = [denoiser.open(session) for _ in range(3)]
    for block, drawn in zip(blocks, ahead, strict=True):
        expected = denoiser.step(block, states[0]).latent
        with patch.object(denoiser, "with_noise", side_effect=AssertionError("drawn again")):
            made = denoiser.step(drawn, states[1]).latent
        assert expected is not None
        assert made is not None
        assert torch.equal(made, expected)
