"""Other rules of the generation, at toy size."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from avatar.render import DenoisingLoop
from avatar.types import Block, Conditions, Session
from tests.training.small import noisy_clip
from training import ablate
from training.ablate import CleanCache, LastHistory, NoPicture, NoSink, variants
from training.data import write_shard
from training.eval import inference
from training.eval.inference import Models

SCHEDULE = (1.0, 0.9, 0.75, 0.5, 0.0)


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> Models:
    models = inference.load(checkpoint)
    return replace(models, config=replace(models.config, sink_update_block=None))


def latents_with(models: Models, loop: type[DenoisingLoop], motion_seed: int = 0, num_blocks: int = 3) -> Tensor:
    """Generate blocks of one session. Sessions of two seeds differ only in the motion latents after the picture."""
    config = models.config
    sink = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    motion = torch.randn(16, 18, 8, 8, generator=torch.Generator().manual_seed(motion_seed))
    session = Session("ablation", 0, torch.cat([sink, motion], 1))
    levels = loop(models.network, config, session, Conditions(0, sink, torch.zeros(0, 0)))
    silence = torch.zeros(config.num_encoder_layers, config.audio_dim, 12)
    latents = []
    for index in range(num_blocks):
        latent = levels.step(Block(index, silence)).latent
        assert latent is not None
        latents.append(latent)
    return torch.stack(latents)


def test_without_a_sink_motion_does_not_reach_a_block(models: Models) -> None:
    assert torch.equal(latents_with(models, NoSink, 0), latents_with(models, NoSink, 1))
    assert not torch.equal(latents_with(models, DenoisingLoop, 0), latents_with(models, DenoisingLoop, 1))


def test_without_a_picture_only_the_first_block_has_it(models: Models) -> None:
    with_picture, without = latents_with(models, NoSink), latents_with(models, NoPicture)
    assert torch.equal(with_picture[0], without[0])
    assert not torch.equal(with_picture[1], without[1])


def test_a_clean_cache_changes_blocks_after_the_first(models: Models) -> None:
    noisy, clean = latents_with(models, DenoisingLoop), latents_with(models, CleanCache)
    assert torch.equal(noisy[0], clean[0])
    assert not torch.equal(noisy[1], clean[1])


def test_the_last_levels_history_changes_blocks_after_the_first(models: Models) -> None:
    own, last = latents_with(models, DenoisingLoop), latents_with(models, LastHistory)
    assert torch.equal(own[0], last[0])
    assert not torch.equal(own[1], last[1])


def test_two_levels_are_compared_with_other_second_ones() -> None:
    rows = variants((1.0, 0.4, 0.0))
    schedules = {name: row.schedule for name, row in rows.items() if row.schedule}
    assert schedules == {"sigma 0.3": (1.0, 0.3, 0.0), "sigma 0.5": (1.0, 0.5, 0.0)}


def test_fewer_levels_are_a_subset_of_the_checkpoints() -> None:
    rows = variants(SCHEDULE)
    assert rows["3 levels"].schedule == (1.0, 0.75, 0.5, 0.0)
    assert rows["2 levels"].schedule == (1.0, 0.75, 0.0)


def test_existing_rows_are_not_repeated(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "data" / "held_out" / "0.tar", [noisy_clip(0, 0)])
    monkeypatch.setattr("training.ablate.available", lambda _: None)
    out = tmp_path / "rows.json"

    def run(*more: str) -> str:
        extent = ["--clips", "1", "--blocks", "4", "--json", str(out), "--data", str(tmp_path / "data")]
        monkeypatch.setattr("sys.argv", ["ablate", str(checkpoint), *extent, *more])
        ablate.main()
        return capsys.readouterr().out

    assert "| 2 levels |" in run("--only", "2 levels")
    row = json.loads(out.read_text())["2 levels"]
    assert isinstance(row["drift_ratio"], float)
    assert row["block_passes"] == 2
    monkeypatch.setattr("training.ablate.row", lambda *_: pytest.fail("repeated"))
    assert "| 2 levels |" in run("--only", "2 levels")
    with pytest.raises(SystemExit, match="no such row: 9 levels"):
        run("--only", "9 levels")
