"""Readers of behaviour on faces whose motion is known, and on faces that do not move."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.training.test_metrics import curve
from training.data import Clip, read_shard, write_shard
from training.eval.behaviour import LAG, Behaviour, behaviour_metrics, closures
from training.eval.metrics import Metric
from training.eval.readers.face_curves import INNER_LIPS, NOSE_TIP, RIGID, FaceCurves, face_curves
from training.eval.readers.landmarks import LEFT_EYE, RIGHT_EYE
from training.synthetic.motion.curves import smooth

NUM_FRAMES = 120
FRAMES = np.zeros((8, 4, 4, 3), np.uint8)
# The person speaks in the first half and listens in the second; the lips close at these phones.
PHONES = [(0.0, "_"), (0.6, "p"), (0.72, "a"), (1.2, "m"), (1.32, "a"), (1.8, "b"), (1.92, "a"), (2.4, "_"), (4.2, "p")]
CLOSED_AT = (16, 31, 46)
# Frames at which the other pauses; the person nods 8 frames later, with the peak 6 frames after that.
PHRASE_ENDS = (68, 90)


def true_clip(folder: Path) -> Behaviour:
    """Return the behaviour of a clip whose rendered frames are the true ones."""
    frames = np.arange(NUM_FRAMES)
    inner = np.where(frames < 60, 0.3 + 0.05 * curve(NUM_FRAMES), 0.02).astype(np.float32)
    for frame in CLOSED_AT:
        inner[frame - 2 : frame + 3] = 0.02
    nod = np.zeros(NUM_FRAMES, np.float32)
    for end in PHRASE_ENDS:
        nod[end + 8 : end + 20] = 0.1 * np.hanning(12)
    brow = np.zeros(NUM_FRAMES, np.float32)
    brow[84:104] = np.hanning(20)
    head = 0.3 * smooth(np.random.default_rng(3).normal(size=(NUM_FRAMES, 2)), 12.0)
    paused = np.isin(frames, [frame for end in PHRASE_ENDS for frame in range(end, end + 4)])
    speaking = np.stack([frames < 60, (frames >= 60) & ~paused], 1).astype(np.float32)
    rotation = 0.1 * smooth(np.random.default_rng(4).normal(size=(NUM_FRAMES, 3)), 12.0).astype(np.float32)
    rotation[:, 0] += nod
    truth: dict[str, NDArray[Any]] = {
        "nod": nod,
        "brow": brow,
        "speaking": speaking,
        "pose": rotation,
        "frames": np.zeros((NUM_FRAMES, 1, 1, 3), np.uint8),
    }
    write_shard(folder / "0.tar", [Clip("0", truth, {"phones": PHONES, "lead_frames": 0})])
    [clip] = read_shard(folder / "0.tar")
    lids = np.zeros(NUM_FRAMES, np.float32)
    lids[[20, 21, 70, 71, 110]] = 0.9
    curves = FaceCurves(inner, head.astype(np.float32), rotation, lids, 0.3 + 0.05 * brow)
    return Behaviour(curves, curves, clip, 0, 4)


def nodding(rotation: NDArray[Any], late: int) -> NDArray[Any]:
    """Return a rotation whose pitch comes a number of frames later."""
    return np.concatenate([np.roll(rotation[:, :1], late, axis=0), rotation[:, 1:]], axis=1)


@pytest.fixture
def behaviour(tmp_path: Path) -> Behaviour:
    return true_clip(tmp_path)


def rendered(behaviour: Behaviour, **curves: NDArray[Any]) -> dict[str, Metric]:
    """Return the metrics if the rendered face has other curves."""
    return behaviour_metrics([replace(behaviour, rendered=replace(behaviour.rendered, **curves))])


def value(metric: Metric) -> float:
    assert metric.value is not None, metric.note
    return metric.value


def test_true_frames_behave_perfectly(behaviour: Behaviour) -> None:
    metrics = behaviour_metrics([behaviour])
    assert value(metrics["inner_lips"]) == 1
    assert metrics["closure_recall"] == Metric(1.0, "of 3")
    assert value(metrics["mouth_silent"]) == value(metrics["mouth_listening"]) == 0
    assert metrics["blinks"] == Metric(1.0, "38 a minute, true frames 38")
    assert 0.8 < value(metrics["border_motion"]) < 1.2
    assert value(metrics["listening_r"]) > 0.7
    assert value(metrics["head_rotation"]) == 1
    assert metrics["head_rotation"].note.endswith("reader's r with the stored truth 1.00, 1.00, 1.00")
    assert value(metrics["response"]) == 1
    assert metrics["response"].note.startswith("nod 1.00 after 2 phrases")
    assert 0.4 < value(metrics["response_latency"]) < 0.8


def test_a_face_that_does_not_move_closes_nothing_new_and_does_not_listen(behaviour: Behaviour) -> None:
    still = np.zeros(NUM_FRAMES, np.float32)
    metrics = rendered(
        behaviour,
        inner=still + 0.3,
        rotation=np.zeros((NUM_FRAMES, 3), np.float32),
        brow=still,
        lids=still,
        head=np.zeros((NUM_FRAMES, 2), np.float32),
    )
    assert value(metrics["head_rotation"]) == value(metrics["response"]) == 0
    assert value(metrics["inner_lips"]) < 1e-6
    assert value(metrics["closure_recall"]) == 0
    assert value(metrics["listening_r"]) == 0
    assert value(metrics["blinks"]) == 0
    assert metrics["border_motion"].value is None
    assert value(metrics["head_smoothness"]) == 0


def test_inner_lips_that_open_half_as_far_have_half_the_amplitude(behaviour: Behaviour) -> None:
    assert value(rendered(behaviour, inner=0.5 * behaviour.truth.inner)["inner_lips"]) == pytest.approx(0.5)


def test_each_missed_closure_counts(behaviour: Behaviour) -> None:
    inner = behaviour.truth.inner.copy()
    inner[CLOSED_AT[1] - 4 : CLOSED_AT[1] + 5] = 0.3
    assert value(rendered(behaviour, inner=inner)["closure_recall"]) == pytest.approx(2 / 3)


def test_lips_that_are_shut_all_the_time_close_nothing(behaviour: Behaviour) -> None:
    shut = np.full(NUM_FRAMES, 0.02, np.float32)
    assert value(rendered(behaviour, inner=shut)["closure_recall"]) == 0


def test_a_mouth_at_rest_is_no_closure(behaviour: Behaviour) -> None:
    """The phone at 4.2 s comes while the true mouth rests; the lips need not have opened."""
    assert len(closures(behaviour)) == len(CLOSED_AT)
    resting = replace(behaviour, truth=replace(behaviour.truth, inner=np.full(NUM_FRAMES, 0.02, np.float32)))
    assert closures(resting) == []


@pytest.mark.parametrize(("frames", "quiet"), [(slice(70, 120), False), (slice(0, 60), True)])
def test_lips_that_move_in_silence_are_told_from_lips_that_speak(
    behaviour: Behaviour, frames: slice, *, quiet: bool
) -> None:
    inner = behaviour.truth.inner.copy()
    inner[frames] += 0.05 * curve(NUM_FRAMES, seed=5)[frames]
    metrics = rendered(behaviour, inner=inner)
    for name in ("mouth_silent", "mouth_listening"):
        assert (value(metrics[name]) < 0.05) == quiet


def test_jumps_from_block_to_block_raise_the_ratio(behaviour: Behaviour) -> None:
    jumps = np.random.default_rng(0).normal(0, 0.1, (NUM_FRAMES // 4, 2)).astype(np.float32)
    head = behaviour.truth.head + np.repeat(jumps, 4, axis=0)
    assert value(rendered(behaviour, head=head)["border_motion"]) > 3
    # Seen from another frame of the stream, the same jumps are inside blocks.
    moved = replace(behaviour, rendered=replace(behaviour.rendered, head=head), first_frame=2)
    assert value(behaviour_metrics([moved])["border_motion"]) < 1


def test_a_head_that_jitters_is_less_smooth_than_one_that_sways(behaviour: Behaviour) -> None:
    jitter = np.random.default_rng(0).normal(size=(NUM_FRAMES, 2)).astype(np.float32)
    sway = np.sin(np.arange(NUM_FRAMES) / (2 * LAG))[:, None].repeat(2, 1).astype(np.float32)
    assert abs(value(rendered(behaviour, head=jitter)["head_smoothness"])) < 0.25
    assert value(rendered(behaviour, head=sway)["head_smoothness"]) > 0.7


def test_reactions_to_another_time_do_not_agree(behaviour: Behaviour) -> None:
    own = value(behaviour_metrics([behaviour])["listening_r"])
    assert behaviour.truth.brow is not None
    rotation, brow = nodding(behaviour.truth.rotation, -14), np.roll(behaviour.truth.brow, -14)
    assert value(rendered(behaviour, rotation=rotation, brow=brow)["listening_r"]) < own - 0.4


def test_nods_that_do_not_follow_phrases_are_no_response(behaviour: Behaviour) -> None:
    """On the mean of all times that they may be moved by, nods are as strong after phrases as at their ends."""
    values = [
        value(rendered(behaviour, rotation=nodding(behaviour.truth.rotation, late))["response"])
        for late in range(0, NUM_FRAMES, 5)
    ]
    assert abs(np.mean(values)) < 0.05
    half = behaviour.truth.rotation * np.array((0.5, 1, 1), np.float32)
    assert value(rendered(behaviour, rotation=half)["response"]) == pytest.approx(0.5, abs=0.05)
    later = rendered(behaviour, rotation=nodding(behaviour.truth.rotation, 4))
    own = behaviour_metrics([behaviour])
    assert value(later["response_latency"]) == pytest.approx(value(own["response_latency"]) + 4 / 25)


def test_heads_that_turn_half_as_far_have_half_the_rotation(behaviour: Behaviour) -> None:
    half = rendered(behaviour, rotation=behaviour.truth.rotation * np.array((1, 0.5, 0), np.float32))["head_rotation"]
    assert value(half) == pytest.approx(0.5)
    assert half.note.startswith("pitch 1.00, yaw 0.50, roll 0.00")


def test_faces_that_move_as_given_are_told_from_others(behaviour: Behaviour) -> None:
    lids = behaviour.truth.lids
    assert lids is not None
    given = np.zeros((6, NUM_FRAMES + 9), np.float32)
    given[:4, 9:] = np.stack([lids, *behaviour.truth.rotation.T])
    own, other = (
        behaviour_metrics([replace(behaviour, given=np.roll(given, shift, axis=1))])["motion_followed"]
        for shift in (0, 61)
    )
    assert own.value == pytest.approx(1)
    assert own.note == "lids 1.00, pitch 1.00, yaw 1.00, roll 1.00"
    assert abs(value(other)) < 0.4
    assert behaviour_metrics([behaviour])["motion_followed"].value is None


def test_without_a_reader_of_eyes_blinks_say_so_and_nods_are_read(behaviour: Behaviour) -> None:
    blind = replace(behaviour.rendered, lids=None, brow=None)
    metrics = behaviour_metrics([replace(behaviour, rendered=blind, truth=blind)])
    assert "--eye-reader" in metrics["blinks"].note
    assert metrics["listening_r"].note.startswith("nod")
    assert "brow" not in metrics["listening_r"].note


def test_without_faces_every_metric_says_so() -> None:
    metrics = behaviour_metrics([])
    assert {"inner_lips", "closure_recall", "border_motion", "listening_r"} <= metrics.keys()
    assert all(metric.value is None for metric in metrics.values())


def mesh(num_frames: int) -> NDArray[np.float32]:
    points = np.zeros((num_frames, 468, 2), np.float32)
    points[:, RIGHT_EYE], points[:, 133], points[:, 362], points[:, LEFT_EYE] = (0, 0), (5, 0), (15, 0), (20, 0)
    return points


def test_curves_are_read_from_the_mesh_in_distances_between_the_eyes() -> None:
    points, motion = mesh(8), np.arange(8, dtype=np.float32)
    points[:, INNER_LIPS[1], 1] = motion
    curves = face_curves(points, FRAMES)
    assert curves is not None
    np.testing.assert_allclose(curves.inner, motion / 20, rtol=1e-6)
    assert curves.brow is None
    assert np.ptp(curves.head) == pytest.approx(np.ptp(curves.head[0]))
    points[:, NOSE_TIP] += 2 * motion[:, None] * (3, 1)
    points[:, RIGID, 0] += motion[:, None]
    moved = face_curves(points, FRAMES)
    assert moved is not None
    np.testing.assert_allclose(moved.rotation[:, 0], motion / 20, rtol=1e-6)
    np.testing.assert_allclose(np.diff(moved.rotation[:, 1]), 3.5 / 20, rtol=1e-5)
    points[:, LEFT_EYE, 1] -= 2.0
    tilted = face_curves(points, FRAMES)
    assert tilted is not None
    np.testing.assert_allclose(tilted.rotation[:, 2], np.arctan2(2, 20), rtol=1e-5)
    # The nose is one of the six points that are averaged.
    np.testing.assert_allclose(np.diff(moved.head[:, 0]), (1 + 6 / 6) / 20, rtol=1e-5)


def test_frames_without_a_face_lie_between_their_neighbours() -> None:
    points, motion = mesh(5), np.arange(5, dtype=np.float32)
    points[:, INNER_LIPS[1], 1] = motion
    points[2] = np.nan
    curves = face_curves(points, FRAMES)
    assert curves is not None
    np.testing.assert_allclose(curves.inner, motion / 20, rtol=1e-6)
    points[1:4] = np.nan
    assert face_curves(points, FRAMES) is None
