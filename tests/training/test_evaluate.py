import json
import math
import time
import wave
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.small import BrightMouths, noisy_clip
from training import evaluate
from training.data import StoredClip, read_clips, write_shard
from training.eval import inference
from training.eval.metrics import Metric
from training.eval.readers.landmarks import Landmarks
from training.eval.robustness import LongSession
from training.eval.table import NEEDS_TRUTH, TABLE

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "held_out" / "0.tar", [noisy_clip(0, 0), noisy_clip(1, 12)])
    return folder


@pytest.fixture(scope="module")
def clips(data: Path) -> list[StoredClip]:
    return read_clips(data, "held_out")


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of noise as a wave file."""
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).integers(-9999, 9999, 48000, np.int16).tobytes())
    return path


@pytest.fixture
def run(checkpoint: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the program with more arguments and return the JSON that it writes."""
    monkeypatch.setattr("training.evaluate.SPEECH", speech)
    monkeypatch.setattr("training.evaluate.available", lambda tool: BrightMouths() if tool is Landmarks else None)
    out = tmp_path / "metrics.json"

    def run_program(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["evaluate", str(checkpoint), "--json", str(out), *arguments])
        try:
            evaluate.main()
        except KeyboardInterrupt:
            print("interrupted")
        metrics: dict[str, Any] = json.loads(out.read_text())
        return metrics

    return run_program


def test_a_deadline_leaves_at_least_some_items() -> None:
    assert [*inference.until(range(9), time.monotonic() - 1, least=3)] == [0, 1, 2]
    assert [*inference.until(range(9), math.inf, least=3)] == [*range(9)]


def test_the_program_prints_a_table_and_writes_its_metrics(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.evaluate.QUICK", evaluate.Extent(clips=2, others=2, people=1, blocks=6, seeds=2))
    metrics = run("--data", str(data), "--quick", "--levels", "2", "--sheet", str(tmp_path / "sheet.png"))
    keys = (
        "lip_sync_r lip_sync_r_other seed_spread mouth_amplitude edge_energy codec_psnr face_found drift_ratio block_ms"
    )
    assert [key for key in keys.split() if not isinstance(metrics[key], float)] == []
    assert metrics["codec_psnr_mouth"] is None
    assert "lip" in metrics["notes"]["codec_psnr_mouth"]
    assert all(stage in metrics["notes"]["block_ms"] for stage in ("audio", "levels", "decode"))
    assert {"best_lag_frames", "identity_distance"} <= metrics.keys()
    assert (metrics["levels"], metrics["notes"]["levels"]) == (2, "2 of the 3 trained: sigma 1, 0.5, 0")
    assert "lip sync r, mouth against the true jaw" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").exists()


def test_an_interrupted_program_has_written_its_metrics(
    run: Run, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.evaluate.QUICK", evaluate.Extent(clips=1, others=1, people=2, blocks=4))
    monkeypatch.setattr("training.evaluate.cost_metrics", lambda *_: {})
    sessions = [LongSession([1.0] * 20)]

    def long_session(*_: object) -> LongSession:
        if not sessions:
            raise KeyboardInterrupt
        return sessions.pop()

    monkeypatch.setattr("training.evaluate._long_session", long_session)
    metrics = run("--data", str(data), "--quick")
    assert "interrupted" in capsys.readouterr().out
    assert isinstance(metrics["edge_energy"], float)
    assert metrics["drift_ratio"] == 1.0


def test_any_audio_and_portrait_have_the_metrics_that_need_no_truth(
    run: Run, speech: Path, picture: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "portrait.png").write_bytes(picture)
    metrics = run("--speech", str(speech), "--portrait", str(tmp_path / "portrait.png"))
    assert [metrics[key] for key in NEEDS_TRUTH] == [None] * len(NEEDS_TRUTH)
    keys = ("edge_energy", "face_found", "background_db", "drift_ratio", "speech_ratio", "block_ms")
    assert [key for key in keys if not isinstance(metrics[key], float)] == []
    printed = [line[:42].rstrip() for line in capsys.readouterr().out.splitlines()[1:]]
    assert printed == [row.label for row in TABLE if metrics[row.key] is not None]


def test_flags_set_number_and_length_of_long_sessions() -> None:
    def extent(**flags: object) -> evaluate.Extent:
        names = ("clips", "people", "minutes", "at_a_time", "levels", "seeds", "eye_reader")
        return evaluate.extent_of(Namespace(**{**dict.fromkeys(names), "quick": False, "hour": False, **flags}), 50)

    assert extent() == evaluate.FULL
    assert (extent(people="all").people, extent(people="all").blocks) == (50, evaluate.FULL.blocks)
    hour = extent(hour=True, minutes=80.0)
    assert (hour.people, hour.blocks, hour.session_s) == (2, 7500, 2400)
    assert extent(hour=True, minutes=80.0, at_a_time=2).session_s == 4800


def test_the_last_evaluation_opens_people_of_its_own(data: Path) -> None:
    write_shard(data / "test" / "0.tar", [noisy_clip(5, 0)])
    flags = dict.fromkeys(("speech", "clips", "people", "minutes", "at_a_time", "levels", "seeds", "eye_reader"))
    for is_test, split in ((True, "test"), (False, "held_out")):
        about, _ = evaluate.evaluate(
            Namespace(**{**flags, "data": data, "test": is_test, "quick": True, "hour": False, "sheet": None,
                         "checkpoint": Path("none")})
        )  # fmt: skip
        assert about["split"] == split
    (data / "test" / "0.tar").unlink()
    with pytest.raises(ValueError, match=r"no shards in .*test"):
        evaluate.evaluate(Namespace(**{**flags, "data": data, "test": True}))


def test_parallel_long_sessions_equal_sequential_ones(checkpoint: Path, clips: list[StoredClip]) -> None:
    people = [np.array(clip.array("reference")) for clip in clips]
    extent = evaluate.Extent(clips=1, others=1, people=2, blocks=4)
    sequential = [*evaluate.long_sessions(checkpoint, people, extent)]
    assert [*evaluate.long_sessions(checkpoint, people, replace(extent, at_a_time=2))] == sequential
    assert sequential[0] != sequential[1]


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_precision_without_instructions_is_replaced_by_float32(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, *, has_bfloat16: bool
) -> None:
    monkeypatch.setattr("training.evaluate.is_native", lambda dtype, _: dtype == torch.float32 or has_bfloat16)
    monkeypatch.setattr("training.evaluate.block_cost", lambda models, _: Metric(models.network.dtype.itemsize, "own"))
    costs = evaluate.cost_metrics(checkpoint, np.zeros((64, 64, 3), np.uint8))
    assert costs["block_ms"].value == (2 if has_bfloat16 else 4)
    assert costs["block_ms"].note == ("own" if has_bfloat16 else "in float32, no torch.bfloat16 here; own")
    assert costs["block_ms_float32"] == Metric(4, "own")
