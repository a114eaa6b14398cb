"""Two gloo processes train as one does, with DDP and FSDP2."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import two_processes
from tests.training.small import BATCHES, small
from training.batches import Share, load_batch
from training.data import StoredClip
from training.strategy import Strategy, join


@pytest.fixture(scope="module")
def alone(prepared: list[StoredClip]) -> dict[str, Any]:
    """Results of one process with the whole batch."""
    return two_processes.train_both_stages(Strategy(precision=torch.float32), prepared)


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def both(
    request: pytest.FixtureRequest, latents: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Results of each of two processes."""
    folder = tmp_path_factory.mktemp("two-processes")
    return two_processes.run_on_two(two_processes.train_and_resume, request.param, latents, folder)


@pytest.mark.parametrize("stage", ["stage 1", "stage 2", "stage 2: critic", "stage 2 blockwise"])
def test_two_processes_have_the_gradients_of_one(stage: str, alone: dict[str, Any], both: list[dict[str, Any]]) -> None:
    expected = alone[stage]
    assert max(each.abs().max() for each in expected) > 1e-3
    for mine in both:
        torch.testing.assert_close(mine[stage], expected, atol=1e-5, rtol=1e-4)
    assert both[0]["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_ema_and_exit_levels_are_the_same_on_all_processes(alone: dict[str, Any], both: list[dict[str, Any]]) -> None:
    for mine in both:
        torch.testing.assert_close(mine["stage 2: ema"], alone["stage 2: ema"], atol=1e-5, rtol=1e-4)
        assert mine["levels"] == alone["levels"]


def test_two_stopped_processes_resume_bit_for_bit(both: list[dict[str, Any]]) -> None:
    assert [mine["resumes"] for mine in both] == [True, True]


@pytest.mark.slow
def test_shards_in_bfloat16_have_nearly_the_gradients_of_float32(
    alone: dict[str, Any], latents: Path, tmp_path: Path
) -> None:
    """They are equal on a processor without bfloat16, for which the strategy computes in float32."""
    both = two_processes.run_on_two(two_processes.train_and_resume, "fsdp2", latents, tmp_path, torch.bfloat16)
    for mine in both:
        for stage in ("stage 1", "stage 2: critic"):
            ours, theirs = (torch.cat([each.flatten() for each in run[stage]]) for run in (mine, alone))
            assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.98
        assert mine["loss"] == pytest.approx(alone["loss"], rel=0.02)
        assert all(each.isfinite().all() for each in mine["stage 2"])
        assert mine["resumes"]


def test_shares_of_a_batch_add_up_to_the_batch(prepared: list[StoredClip]) -> None:
    shares = Share(), Share(0, 2), Share(1, 2)
    whole, *parts = (load_batch(prepared, BATCHES, small(), 0, 3, share) for share in shares)
    assert torch.equal(torch.cat([part.features for part in parts]), whole.features)
    noise = [share.noise((2 // share.world, 3), torch.Generator().manual_seed(1)) for share in (Share(), Share(1, 2))]
    assert torch.equal(noise[0][1:], noise[1])
    assert not torch.equal(noise[0][0], noise[0][1])


def test_a_batch_that_does_not_divide_is_refused(prepared: list[StoredClip]) -> None:
    with pytest.raises(ValueError, match="2 clips cannot be shared by 3"):
        load_batch(prepared, BATCHES, small(), 0, 0, Share(0, 3))


def test_strategies_need_their_launcher() -> None:
    with pytest.raises(ValueError, match="torchrun"):
        join("ddp")
    with pytest.raises(ValueError, match="strategy must be one of"):
        join("zero")


def test_a_device_without_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("training.strategy.is_native", lambda *_, answer=is_native: answer)
        strategy = Strategy()
        with strategy.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert strategy.precision == product.dtype == expected
