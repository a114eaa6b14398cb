"""Tests of avatar.audio.inputs."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatar.audio.inputs.face_motion import FaceMotion
from avatar.audio.inputs.voice import PAUSE, Voice, levels
from avatar.types import FACE_MOTION
from training.synthetic.motion import head_pose
from training.synthetic.motion.performance import blinks_a_minute

BLINK, PITCH, YAW, _, GAZE_RIGHT, GAZE_UP = range(len(FACE_MOTION))
MINUTE = 25 * 60
Curves = NDArray[np.floating[Any]]
# A voice: phrases of 2 s from this frame on, and pauses of 2 s.
PHRASE, PERIOD = 50, 100


def voice(num_frames: int) -> list[float]:
    """Return the levels of a voice whose phrases begin at multiples of PERIOD."""
    syllables = np.abs(np.sin(np.arange(num_frames) / 2))
    return [float(level) if n % PERIOD < PHRASE else 0.0 for n, level in enumerate(0.02 + 0.2 * syllables)]


def drawn(seed: int, own: list[float] | None = None, heard: list[float] | None = None, num: int = MINUTE) -> Curves:
    """Return the values (m, f) of a new stream."""
    silence = [0.0] * num
    return np.asarray(FaceMotion(seed).advance(own or silence, heard or silence).numpy())


def test_values_depend_on_seed_frame_and_voices_alone() -> None:
    own, heard = voice(120), voice(120)[::-1]
    whole = FaceMotion(7).advance(own, heard)
    assert whole.shape == (len(FACE_MOTION), 120)
    assert whole.dtype == torch.float32
    pieces = FaceMotion(7)
    cut = [pieces.advance(own[at : at + 4], heard[at : at + 4]) for at in range(0, 120, 4)]
    assert torch.equal(torch.cat(cut, dim=1), whole)
    assert not torch.allclose(FaceMotion(8).advance(own, heard), whole)


def test_a_stream_goes_on_from_its_state() -> None:
    own, heard = voice(1200), voice(1200)[20:] + [0.0] * 20
    motion, sizes = FaceMotion(3), set()
    for at in range(0, 1200, 200):
        span = slice(at, at + 200)
        again = FaceMotion(3, motion.to_bytes())
        assert torch.equal(again.advance(own[span], heard[span]), motion.advance(own[span], heard[span]))
        sizes.add(len(motion.to_bytes()))
    assert len(sizes) == 1
    assert sizes.pop() < 1024


@pytest.mark.parametrize("state", [b"1234", FaceMotion(0).to_bytes()[:-8] + np.float64(np.nan).tobytes()])
def test_an_invalid_state_is_refused(state: bytes) -> None:
    with pytest.raises(ValueError, match="the state of face motion"):
        FaceMotion(0, state)


def test_people_blink_15_to_20_times_a_minute_and_more_after_phrases() -> None:
    own = voice(MINUTE)
    lids = [drawn(seed, own)[BLINK] for seed in range(5)]
    assert 14 < np.mean([blinks_a_minute(each) for each in lids]) < 21
    assert all(each.min() >= 0 and each.max() <= 1 for each in lids)
    begins = np.concatenate([np.flatnonzero((each[1:] > 0.3) & (each[:-1] <= 0.3)) for each in lids]) % PERIOD
    after_end = ((begins >= PHRASE) & (begins < PHRASE + 15)).mean()
    assert after_end > 1.5 * 15 / PERIOD


def test_heads_move_like_those_of_the_training_data() -> None:
    ours = [drawn(seed)[PITCH : PITCH + 3].T for seed in range(5)]
    rng = np.random.default_rng(0)
    theirs = [head_pose.limited(head_pose.sway(rng, MINUTE) + head_pose.shifts(rng, MINUTE)[0]) for _ in range(12)]

    def speed(poses: list[Curves]) -> Curves:
        return np.asarray(np.mean([np.abs(np.diff(each, axis=0)).mean(0) for each in poses], 0))

    np.testing.assert_allclose(speed(ours), speed(theirs), rtol=0.25)
    np.testing.assert_allclose(np.concatenate(ours).std(0), np.concatenate(theirs).std(0), rtol=0.5)
    assert all(np.abs(each[0]).max() < 0.03 for each in ours), "the head starts from its pose in the picture"
    acceleration, true_acceleration = (
        np.mean([np.abs(np.diff(each, 2, axis=0)).mean(0) for each in poses], 0) for poses in (ours, theirs)
    )
    assert (acceleration < 2.5 * true_acceleration).all()


def after_phrases(values: Curves) -> Curves:
    """Average values (f,) over periods that begin with a phrase's end: (PERIOD,)."""
    whole = values[PHRASE:][: (len(values) - PHRASE) // PERIOD * PERIOD]
    return np.asarray(whole.reshape(-1, PERIOD).mean(0))


def test_a_listener_nods_after_the_others_phrases_and_a_speaker_does_not() -> None:
    heard = voice(MINUTE)
    nods = [drawn(seed, None, heard)[PITCH] - drawn(seed)[PITCH] for seed in range(3)]
    mean = np.mean([after_phrases(each) for each in nods], 0)
    # Pitch is least before 0.3 s, and greatest between 0.4 and 1.5 s, because a nod takes a while.
    assert 8 <= mean.argmax() < 38
    assert mean[10:30].mean() > mean[:7].mean() + 0.01
    speech = [0.1] * MINUTE
    np.testing.assert_array_equal(drawn(0, speech, heard)[PITCH], drawn(0, speech)[PITCH])


def test_a_listener_looks_at_the_viewer_when_the_other_begins() -> None:
    heard = voice(MINUTE)

    def away(with_voice: bool) -> float:
        looks = [drawn(seed, None, heard if with_voice else None)[GAZE_RIGHT:] for seed in range(3)]
        listening = np.arange(MINUTE) % PERIOD
        return float(np.mean([np.hypot(*each)[(listening > 26) & (listening < 34)] > 0.06 for each in looks]))

    assert away(True) < 0.5 * away(False)


@pytest.mark.parametrize(("level", "ends"), [(0.012, 1), (0.004, 2)])
def test_quiet_consonants_do_not_end_a_phrase(level: float, ends: int) -> None:
    heard, found = Voice(), []
    for frame, each in enumerate([0.2] * 20 + [level] * PAUSE + [0.2] * 20 + [0.0] * 20):
        heard.advance(frame, each)
        found.append(heard.has_ended(frame))
    assert sum(found) == ends


def test_levels_are_those_of_the_frames() -> None:
    samples = torch.cat([torch.full((640,), 0.5), torch.zeros(640), -torch.full((640,), 0.25)])
    assert levels(samples) == [0.5, 0.0, 0.25]


def test_values_are_finite_and_bounded_for_any_audio() -> None:
    noise: Tensor = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 8
    values = FaceMotion(1).advance(noise.tolist(), noise.flip(0).tolist())
    assert values.isfinite().all()
    assert values.abs().max() <= 1
