"""Two processes train as one does: small networks, gloo, DDP and FSDP2."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import pair
from tests.training.small import RULE, small, write_latents
from training.batches import Share, batch_of
from training.data import read_clips
from training.strategy import Strategy, join


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_latents(folder / "latents")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process gets from the whole batch."""
    return pair.trained(Strategy(precision=torch.float32), read_clips(folder / "latents", "train"))


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def both(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    """What each of two processes gets from it."""
    return pair.of_two(pair.trains, request.param, folder)


@pytest.mark.parametrize("stage", ["stage 1", "stage 2", "stage 2: critic", "stage 2 by block"])
def test_two_processes_have_the_gradients_of_one(stage: str, alone: dict[str, Any], both: list[dict[str, Any]]) -> None:
    expected = alone[stage]
    assert max(each.abs().max() for each in expected) > 1e-3
    for mine in both:
        assert len(mine[stage]) == len(expected)
        for ours, theirs in zip(mine[stage], expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert both[0]["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_averages_are_the_same_on_all_processes(alone: dict[str, Any], both: list[dict[str, Any]]) -> None:
    for mine in both:
        for ours, theirs in zip(mine["stage 2: average"], alone["stage 2: average"], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_processes_leave_rollouts_at_the_same_level(alone: dict[str, Any], both: list[dict[str, Any]]) -> None:
    assert both[0]["levels"] == both[1]["levels"] == alone["levels"]


def test_two_processes_that_were_stopped_go_on_bit_for_bit(both: list[dict[str, Any]]) -> None:
    assert [mine["goes on"] for mine in both] == [True, True]


def test_shares_of_a_batch_are_the_batch(folder: Path) -> None:
    clips = read_clips(folder / "latents", "train")
    whole, *parts = (batch_of(clips, RULE, small(), 0, 3, share) for share in (Share(), Share(0, 2), Share(1, 2)))
    assert torch.equal(torch.cat([part.features for part in parts]), whole.features)
    noise = [share.noise((2 // share.world, 3), torch.Generator().manual_seed(1)) for share in (Share(), Share(1, 2))]
    assert torch.equal(noise[0][1:], noise[1])
    assert not torch.equal(noise[0][0], noise[0][1])


def test_a_batch_that_cannot_be_shared_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="2 clips cannot be shared by 3"):
        batch_of(read_clips(folder / "latents", "train"), RULE, small(), 0, 0, Share(0, 3))


def test_strategies_need_their_launcher() -> None:
    with pytest.raises(ValueError, match="torchrun"):
        join("ddp")
    with pytest.raises(ValueError, match="strategy must be one of"):
        join("zero")


def test_a_device_without_bfloat16_is_asked_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("training.strategy.is_native", lambda *_, answer=is_native: answer)
        strategy = Strategy()
        with strategy.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert strategy.precision == product.dtype == expected
