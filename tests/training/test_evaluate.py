import json
import math
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from avatar.checkpoints.layouts import open_part
from avatar.denoiser import model as denoiser_model
from tests.conftest import ASSETS
from tests.training.test_metrics import curve
from training import evaluate
from training.data import Clip, StoredClip, read_shard, write_shard
from training.eval import inference
from training.eval.held_out import Take, held_out_figures, score, sound_of, take_of
from training.eval.identity import Identity
from training.eval.landmarks import Landmarks, head_motion, mouth_opening
from training.eval.metrics import Figure
from training.eval.robustness import block_cost, drift_figure, endure, speech_figures


@pytest.fixture
def clips(tmp_path: Path) -> list[StoredClip]:
    """Two noisy clips of 24 frames at 64x64, with and without sound before the pictures."""
    rng = np.random.default_rng(0)

    def clip(number: int, lead_frames: int) -> Clip:
        arrays: dict[str, NDArray[Any]] = {
            "frames": rng.integers(0, 256, (24, 64, 64, 3), np.uint8),
            "reference": rng.integers(0, 256, (64, 64, 3), np.uint8),
            "sound": rng.integers(-9999, 9999, (lead_frames + 24 + 16) * 640, np.int16),
            "jaw": np.arange(24, dtype=np.float32),
        }
        return Clip(str(number), arrays, {"lead_frames": lead_frames})

    write_shard(tmp_path / "0.tar", [clip(0, 0), clip(1, 12)])
    return read_shard(tmp_path / "0.tar")


def test_frames_are_compared_with_those_of_their_own_time(checkpoint: Path, clips: list[StoredClip]) -> None:
    """A stream's first three frames are hidden, and sound before the pictures is heard."""
    models = inference.load(checkpoint)
    start, later = (take_of(models, clip) for clip in clips)
    assert len(start.made) == len(start.truth) == 21
    np.testing.assert_array_equal(start.truth[0], clips[0].array("frames")[3])
    assert len(later.made) == len(later.truth) == 24
    whole = inference.spoken(inference.Rollout(models, later.reference), sound_of(clips[1]), 3)
    np.testing.assert_array_equal(later.made, whole[12 - 3 :])
    assert later.jaw is not None
    assert start.jaw is not None
    assert start.jaw[0] == 3


def test_a_network_in_training_is_looked_at_in_place_of_the_checkpoint_s(
    checkpoint: Path, clips: list[StoredClip], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluate.Landmarks", NoFaces)
    network, config = denoiser_model.load(open_part(checkpoint, "denoiser"))
    same = evaluate.quick(checkpoint, clips, (network, config))
    assert same == evaluate.quick(checkpoint, clips)
    assert same["lip_sync_r"] is None
    assert same["edge_energy"] is not None
    for parameter in network.parameters():
        parameter.zero_()
    assert evaluate.quick(checkpoint, clips, (network, config)) != same


class NoFaces:
    """Landmarks that find nobody."""

    def points(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.full((len(frames), 468, 2), np.nan, np.float32)


class BrightMouths:
    """Landmarks that take brightness for an open mouth, and see nobody in the dark."""

    def points(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        brightness = frames.mean((1, 2, 3))
        return np.where(brightness[:, None, None] > 0, face(brightness), np.float32(np.nan))


def face(openings: NDArray[np.floating]) -> NDArray[np.float32]:
    """Mesh points of which only lips and eyes are anywhere: eyes 20 apart."""
    points = np.zeros((len(openings), 468, 2), np.float32)
    points[:, 263, 0] = 20
    points[:, 17, 1] = openings
    return points


def test_a_mouth_is_measured_in_distances_between_the_eyes() -> None:
    np.testing.assert_allclose(mouth_opening(face(np.array([0, 5, 10]))), [0, 0.25, 0.5])


def test_a_frame_without_a_face_lies_between_its_neighbours() -> None:
    points = face(np.array([2, 50, 6, 6]))
    points[1] = np.nan
    np.testing.assert_allclose(mouth_opening(points), [0.1, 0.2, 0.3, 0.3], rtol=1e-6)
    points[2:] = np.nan
    assert np.isnan(mouth_opening(points)).all()


def test_a_head_strays_in_distances_between_the_eyes() -> None:
    points = face(np.zeros(4))
    assert head_motion(points) == 0
    points[::2] += (6, 8)
    assert head_motion(points) == pytest.approx(0.25)
    points[0] = np.nan
    points[2] = np.nan
    assert head_motion(points) == 0
    assert np.isnan(head_motion(np.full_like(points, np.nan)))


def flashes(openings: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Frames as bright as a mouth is open, with noise for edges."""
    noise = np.random.default_rng(0).integers(0, 40, (32, 32, 3))
    return np.clip(noise + 100 + 20 * openings[:, None, None, None], 0, 255).astype(np.uint8)


def figures_of(made: NDArray[np.floating], truth: NDArray[np.floating]) -> dict[str, Figure]:
    """Of a take whose mouth and whose truth go like these curves."""
    frames = flashes(truth)
    take = Take(flashes(made), frames, frames[0], truth.astype(np.float32))
    return held_out_figures([score(take, cast(Landmarks, BrightMouths()))])


def test_the_truth_itself_is_a_perfect_take() -> None:
    figures = figures_of(curve(), curve())
    for name in ("lip_sync_r", "mouth_amplitude", "edge_energy", "sharpness", "flicker", "face_found"):
        assert figures[name].value == pytest.approx(1, abs=0.01), name
    assert figures["best_lag_frames"].value == 0


def test_a_mouth_that_moves_half_as_far_has_half_the_amplitude() -> None:
    figures = figures_of(0.5 * curve(), curve())
    assert figures["mouth_amplitude"].value == pytest.approx(0.5, abs=0.02)
    assert figures["lip_sync_r"].value == pytest.approx(1, abs=0.02)


def test_a_late_mouth_is_found_late() -> None:
    assert figures_of(np.roll(curve(), 2), curve())["best_lag_frames"].value == 2


def test_a_still_face_has_neither_amplitude_nor_sync_nor_lag() -> None:
    figures = figures_of(np.zeros(60), curve())
    assert figures["mouth_amplitude"].value == pytest.approx(0, abs=1e-5)
    assert figures["lip_sync_r"].value == 0
    assert figures["flicker"].value == 0
    assert figures["best_lag_frames"].value is None
    assert figures["background_db"].value == 99


def test_without_a_jaw_s_curve_the_lips_of_the_true_frames_are_the_truth() -> None:
    take = Take(flashes(curve()), flashes(curve()), flashes(curve())[0], None)
    assert held_out_figures([score(take, cast(Landmarks, BrightMouths()))])["lip_sync_r"].value == pytest.approx(1)


def test_a_take_without_a_face_counts_as_out_of_sync() -> None:
    frames = flashes(curve())
    take = Take(np.zeros_like(frames), frames, frames[0], curve().astype(np.float32))
    figures = held_out_figures([score(take, cast(Landmarks, BrightMouths()))])
    assert (figures["lip_sync_r"].value, figures["face_found"].value) == (0, 0)


def test_missing_packages_cost_their_figures_and_say_so() -> None:
    take = Take(flashes(curve()), flashes(curve()), flashes(curve())[0], curve().astype(np.float32))
    figures = held_out_figures([score(take, None)])
    assert figures["edge_energy"].value == 1
    for name in ("lip_sync_r", "best_lag_frames", "mouth_amplitude", "face_found", "identity_distance"):
        assert figures[name].value is None
        assert "training/requirements-evaluate.txt" in figures[name].note


def test_a_session_that_leaves_its_reference_drifts() -> None:
    assert drift_figure([[2.0] * 40]).value == 1
    leaving = [*[2.0] * 20, *[3.0] * 20]
    assert drift_figure([leaving, [2.0] * 40]).value == pytest.approx(1.25)


def test_a_long_session_says_its_sound_again_and_again(checkpoint: Path, clips: list[StoredClip]) -> None:
    reference = np.array(clips[0].array("reference"))
    assert len(endure(inference.load(checkpoint), reference, sound_of(clips[0]), 9)) == 9


def test_lips_that_follow_loudness_are_told_from_lips_that_do_not() -> None:
    rng = np.random.default_rng(0)
    envelope = np.abs(np.convolve(rng.normal(size=204), np.ones(5) / 5, "valid"))
    sound = (rng.normal(size=200 * 640) * envelope.repeat(640) * 0.3).astype(np.float32)
    following = speech_figures([np.roll(envelope, 1)[3:]], sound)
    assert following["speech_lag_frames"].value == 1
    assert following["speech_ratio"].value is not None
    assert following["speech_ratio"].value > 3
    other = speech_figures([np.roll(envelope, 77)[3:]], sound)
    assert other["speech_ratio"].value is not None
    assert other["speech_ratio"].value < 1.5


def test_a_block_s_cost_has_all_stages(checkpoint: Path) -> None:
    cost = block_cost(inference.load(checkpoint, torch.bfloat16), np.zeros((64, 64, 3), np.uint8))
    assert cost.value is not None
    assert cost.value > 0
    assert all(stage in cost.note for stage in ("audio", "levels", "decode"))


def test_what_is_short_of_time_looks_at_less_but_never_at_nothing() -> None:
    assert [*inference.until(range(9), time.monotonic() - 1, least=3)] == [0, 1, 2]
    assert [*inference.until(range(9), math.inf, least=3)] == [*range(9)]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
    evaluate.main()


def test_the_program_prints_a_table_and_writes_its_figures(
    checkpoint: Path,
    clips: list[StoredClip],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_shard(tmp_path / "data" / "held_out" / "0.tar", [*read_again(clips)])
    monkeypatch.setattr("training.evaluate.QUICK", evaluate.Extent(clips=2, others=2, people=1, blocks=6))
    monkeypatch.setattr("training.evaluate.Landmarks", BrightMouths)
    monkeypatch.setattr("training.evaluate.available", lambda tool: tool() if tool is BrightMouths else None)
    out, sheet = tmp_path / "figures.json", tmp_path / "sheet.png"
    arguments = ["--data", str(tmp_path / "data"), "--quick", "--json", str(out), "--sheet", str(sheet)]
    run(monkeypatch, str(checkpoint), *arguments)
    figures = json.loads(out.read_text())
    keys = "lip_sync_r lip_sync_r_other mouth_amplitude edge_energy codec_psnr face_found drift_ratio block_ms"
    assert [key for key in keys.split() if not isinstance(figures[key], float)] == []
    assert figures["codec_psnr_mouth"] is None
    assert "lips" in figures["notes"]["codec_psnr_mouth"]
    assert {"best_lag_frames", "identity_distance"} <= figures.keys()
    assert "lips against the truth, r" in capsys.readouterr().out
    assert sheet.exists()


def test_what_is_known_when_it_is_stopped_is_in_the_file(
    checkpoint: Path, clips: list[StoredClip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "data" / "held_out" / "0.tar", [*read_again(clips)])
    monkeypatch.setattr("training.evaluate.QUICK", evaluate.Extent(clips=1, others=1, people=2, blocks=4))
    monkeypatch.setattr("training.evaluate.available", lambda tool: BrightMouths() if tool is Landmarks else None)
    sessions = [[1.0] * 20]

    def long_session(*_: object) -> list[float]:
        if not sessions:
            raise KeyboardInterrupt
        return sessions.pop()

    monkeypatch.setattr("training.evaluate._long_session", long_session)
    out = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, str(checkpoint), "--data", str(tmp_path / "data"), "--quick", "--json", str(out))
    figures = json.loads(out.read_text())
    assert isinstance(figures["edge_energy"], float)
    assert figures["drift_ratio"] == 1.0


def test_long_sessions_are_of_whom_and_as_long_as_is_asked() -> None:
    def extent(**flags: object) -> evaluate.Extent:
        given = {
            "quick": False,
            "clips": None,
            "people": None,
            "hour": False,
            "minutes": None,
            "at_a_time": None,
            **flags,
        }
        return evaluate.extent_of(Namespace(**given), 50)

    assert extent() == evaluate.FULL
    assert (extent(people="all").people, extent(people="all").blocks) == (50, evaluate.FULL.blocks)
    hour = extent(hour=True, minutes=80.0)
    assert (hour.people, hour.blocks, hour.session_s) == (2, 7500, 2400)
    assert extent(hour=True, minutes=80.0, at_a_time=2).session_s == 4800


def test_sessions_beside_each_other_are_those_one_after_the_other(checkpoint: Path, clips: list[StoredClip]) -> None:
    people = [np.array(clip.array("reference")) for clip in clips[:2]]
    extent = evaluate.Extent(clips=1, others=1, people=2, blocks=4)
    alone = [*evaluate.long_sessions(checkpoint, people, extent)]
    assert [*evaluate.long_sessions(checkpoint, people, replace(extent, at_a_time=2))] == alone
    assert alone[0] != alone[1]


@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_block_costs_what_it_would_where_the_processor_can_compute(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, *, has_instructions: bool
) -> None:
    monkeypatch.setattr("training.evaluate.is_native", lambda dtype, _: dtype == torch.float32 or has_instructions)
    monkeypatch.setattr("training.evaluate.block_cost", lambda models, _: Figure(models.network.dtype.itemsize, "own"))
    costs = evaluate.cost_figures(checkpoint, np.zeros((64, 64, 3), np.uint8))
    assert costs["block_ms"].value == (2 if has_instructions else 4)
    assert costs["block_ms"].note == ("own" if has_instructions else "in float32, no torch.bfloat16 here; own")
    assert costs["block_ms_float32"] == Figure(4, "own")


def read_again(clips: list[StoredClip]) -> list[Clip]:
    return [Clip(clip.name, {name: np.array(clip.array(name)) for name in clip.offsets}, clip.info) for clip in clips]


def test_any_clip_has_the_figures_that_need_no_truth(
    checkpoint: Path, picture: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "portrait.png").write_bytes(picture)
    monkeypatch.setattr("training.evaluate.available", lambda tool: BrightMouths() if tool is Landmarks else None)
    out = tmp_path / "figures.json"
    speech, portrait = str(ASSETS / "speech.wav"), str(tmp_path / "portrait.png")
    run(monkeypatch, str(checkpoint), "--speech", speech, "--portrait", portrait, "--json", str(out))
    figures = json.loads(out.read_text())
    assert [figures[key] for key in evaluate.NEEDS_TRUTH] == [None] * len(evaluate.NEEDS_TRUTH)
    known = ("edge_energy", "face_found", "background_db", "drift_ratio", "speech_ratio", "block_ms")
    assert [key for key in known if not isinstance(figures[key], float)] == []


def test_real_landmarks_find_the_portrait_s_lips() -> None:
    pytest.importorskip("ai_edge_litert")
    image = portrait()
    points = Landmarks().points(np.stack([image, np.zeros_like(image), np.roll(image, (5, -7), (0, 1))]))
    assert np.isnan(points[1]).all()
    lips = points[:, [0, 17]]
    assert 75 < lips[0, 0, 1] < lips[0, 1, 1] < 105
    assert np.abs(lips[0, :, 0] - 64).max() < 6
    np.testing.assert_allclose(lips[2] - lips[0], np.tile((-7, 5), (2, 1)), atol=1.5)


def portrait() -> NDArray[np.uint8]:
    return np.array(Image.open(ASSETS / "portrait.png").convert("RGB").resize((128, 128)))


def test_another_light_is_the_same_person_and_another_shape_is_not() -> None:
    pytest.importorskip("dlib")
    image = portrait()
    darker = (image * 0.7).astype(np.uint8)
    wider = np.array(Image.fromarray(image).resize((176, 128)).crop((24, 0, 152, 128)))
    identity, points = Identity(), Landmarks().points(np.stack([image, darker, wider]))
    own, same, other = (
        identity.embed(frame, place) for frame, place in zip((image, darker, wider), points, strict=True)
    )
    assert own is not None
    assert same is not None
    assert other is not None
    assert np.linalg.norm(same - own) < 0.2
    assert np.linalg.norm(other - own) > 1.5 * np.linalg.norm(same - own)
    assert identity.embed(image, np.full_like(points[0], np.nan)) is None
