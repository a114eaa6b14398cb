"""The training loop of all stages on a small network: resuming, checkpoints, logs and previews."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from einops import repeat
from PIL import Image
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from avatar.denoiser.model import Network
from avatar.vae.vae import Vae
from tests.training.small import BATCHES, maker, small, tensors
from training.checkpointing import Parts, Progress, restore, save
from training.consistency import ConsistencyDistillation, ConsistencyRecipe
from training.data import StoredClip
from training.distill import Distillation, DistillRecipe
from training.initialise import initialise
from training.loop import Limits, train
from training.lora import LoraConfig
from training.pretrain import Pretraining, PretrainRecipe
from training.strategy import SINGLE, Strategy


def initial_network() -> Network:
    network = Network(small())
    initialise(network, 0)
    return network


def pretraining() -> Pretraining:
    return Pretraining(PretrainRecipe(steps=6, warmup=2, batches=BATCHES), initial_network)


def distillation() -> Distillation:
    batches = replace(BATCHES, same_position=True)
    return Distillation(DistillRecipe(steps=6, update_ratio=2, batches=batches), maker(small()))


def consistency() -> ConsistencyDistillation:
    return ConsistencyDistillation(ConsistencyRecipe(steps=6, warmup=2, batches=BATCHES), maker(small()))


def save_single_file(parts: Parts, progress: Progress, out: Path, _: Strategy) -> None:
    """Save a run in the format of runs from before distributed checkpoints."""
    state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**state, **asdict(progress)}, out / "state.pt")


@pytest.mark.parametrize("make_run", [pretraining, consistency, distillation])
def test_a_stopped_run_resumes_bit_for_bit(
    prepared: list[StoredClip], tmp_path: Path, make_run: Callable[[], Any]
) -> None:
    run = make_run()
    for _ in range(2):
        run.advance(prepared)
    formats = {"distributed": save, "single": save_single_file}
    for name, save_as in formats.items():
        (tmp_path / name).mkdir()
        save_as(run.parts, run.progress, tmp_path / name, SINGLE)
    for _ in range(2):
        run.advance(prepared)
    for name in formats:
        resumed = make_run()
        restore(resumed.parts, resumed.progress, tmp_path / name)
        assert resumed.progress.step == 2
        for _ in range(2):
            resumed.advance(prepared)
        for part, state in run.parts.items():
            for ours, theirs in zip(
                tensors(resumed.parts[part].state_dict()), tensors(state.state_dict()), strict=True
            ):
                assert torch.equal(ours, theirs), (name, part)


def test_a_checkpoint_holds_what_trains(prepared: list[StoredClip], tmp_path: Path) -> None:
    def adapted() -> Pretraining:
        recipe = PretrainRecipe(steps=6, warmup=2, batches=BATCHES, muon_lr=0.0, lora=LoraConfig(rank=2, alpha=1.0))
        return Pretraining(recipe, maker(small()))

    run = adapted()
    for _ in range(2):
        run.advance(prepared)
    save(run.parts, run.progress, tmp_path, SINGLE)
    kept = FileSystemReader(next((tmp_path / "state").iterdir())).read_metadata().state_dict_metadata
    assert not any("base_layer" in name or "patch_embedding" in name for name in kept)
    assert sum("lora_A" in name for name in kept) >= 2
    resumed = adapted()
    restore(resumed.parts, resumed.progress, tmp_path)
    for each in (run, resumed):
        each.advance(prepared)
    ours, theirs = (tensors(each.wrapped.network.state_dict()) for each in (resumed, run))
    assert all(map(torch.equal, ours, theirs))


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    run = pretraining()
    state = {name: part.state_dict() for name, part in run.parts.items()}
    del state["network"]["head.head.weight"]
    torch.save({**state, **asdict(run.progress)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="is of another run: network lacks"):
        restore(run.parts, run.progress, tmp_path)


def test_an_incomplete_checkpoint_is_ignored(tmp_path: Path) -> None:
    run = pretraining()
    run.progress.step = 7
    save(run.parts, run.progress, tmp_path, SINGLE)
    (tmp_path / "state" / "00000009").mkdir()
    resumed = pretraining()
    restore(resumed.parts, resumed.progress, tmp_path)
    assert resumed.progress.step == 7
    run.progress.step = 9
    save(run.parts, run.progress, tmp_path, SINGLE)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["00000009"]


def test_pretraining_lowers_the_loss_on_its_clips(prepared: list[StoredClip]) -> None:
    run = Pretraining(PretrainRecipe(steps=30, warmup=5, batches=BATCHES), initial_network)
    losses = [run.advance(prepared[:1])["loss"] for _ in range(30)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_run_writes_state_log_plot_and_previews(latents: Path, tmp_path: Path) -> None:
    run = pretraining()
    run.steps = 2
    run.codec = cast(Vae[Any], SimpleNamespace(codec=FirstChannels()))
    train(run, latents, tmp_path, Limits(minutes=5, save_minutes=5))
    names = {path.name.partition(".tfevents")[0] for path in tmp_path.iterdir()}
    assert names == {"state", "log.jsonl", "loss.png", "recipe.json", "sheet.png", "events.out"}
    assert '"held_out_loss"' in (tmp_path / "log.jsonl").read_text()
    # Three held-out clips, and below each the network's own.
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (6 * 8, 9 * 8, 3)
    truth, generated = sheet[0:8].astype(int), sheet[8:16].astype(int)
    assert np.abs(truth - generated).mean() > 5


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_stage_2_is_watched_by_the_mouths_that_it_generates(
    prepared: list[StoredClip], monkeypatch: pytest.MonkeyPatch, shares: tuple[float, float]
) -> None:
    run = distillation()
    assert run.validate(prepared) == {}
    run.codec = cast(Vae[Any], SimpleNamespace(codec=FirstChannels()))
    assert set(run.validate(prepared)) == {"lips_r", "mouth_amplitude", "sharpness"}
    share, amplitude = shares
    truth = torch.rand(6, 48, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    truth *= torch.linspace(0.2, 1, 48)[:, None, None, None]
    portraits = torch.zeros(6, 3, 64, 64)
    monkeypatch.setattr("training.eval.previews.decoded_clips", lambda *_: (truth, share * truth, portraits))
    metrics = run.validate(prepared)
    assert metrics["mouth_amplitude"] == pytest.approx(amplitude, abs=0.02)
    assert metrics["sharpness"] == pytest.approx(amplitude, abs=0.02)
    assert metrics["lips_r"] == pytest.approx(float(share > 0), abs=1e-3)


def test_a_still_portrait_does_not_speak_because_the_lips_place_moves(
    prepared: list[StoredClip], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = distillation()
    run.codec = cast(Vae[Any], SimpleNamespace(codec=FirstChannels()))
    portraits = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    still = portraits[:, None].expand(-1, 48, -1, -1, -1)
    truth = still * torch.linspace(0.2, 1, 48)[:, None, None, None]
    monkeypatch.setattr("training.eval.previews.decoded_clips", lambda *_: (truth, still, portraits))
    metrics = run.validate(prepared)
    assert (metrics["lips_r"], metrics["mouth_amplitude"]) == (0, 0)


class FirstChannels:
    """A codec that shows the first three channels of latents as colours."""

    def new_state(self) -> None:
        return None

    def decode(self, latents: Tensor, state: None) -> Tensor:  # noqa: ARG002
        frames = repeat(latents[:, :3], "b c t h w -> b c (t four) h w", four=4)
        return frames[:, :, 3:]


def test_sigterm_saves_and_stops_a_run(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pretraining()
    advance = run.advance

    def terminated(clips: Sequence[StoredClip]) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return advance(clips)

    monkeypatch.setattr(run, "advance", terminated)
    train(run, latents, tmp_path, Limits(minutes=5, save_minutes=5))
    assert run.progress.step == 1
    resumed = pretraining()
    restore(resumed.parts, resumed.progress, tmp_path)
    assert resumed.progress == run.progress
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
