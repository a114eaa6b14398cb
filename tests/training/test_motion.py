import numpy as np
import pytest

from training.data import AUDIO_RATE_HZ, FRAME_RATE_HZ
from training.synthetic.head import Head
from training.synthetic.motion import motion_of, mouth_curves, portrait_of, visemes_of
from training.synthetic.voices import PAUSE, Speech


def speech_of(*phones: tuple[str, float], duration_s: float = 2.0) -> Speech:
    """Return phones with their onsets, over a tone."""
    time = np.arange(round(duration_s * AUDIO_RATE_HZ)) / AUDIO_RATE_HZ
    tone = np.sin(2 * np.pi * 200 * time).astype(np.float32)
    return Speech(tone, [onset for _, onset in phones], [phone for phone, _ in phones])


@pytest.fixture(scope="module")
def names(head: Head) -> list[str]:
    return head.shape_names


def curve(speech: Speech, names: list[str], name: str, num_frames: int = 50) -> np.ndarray:
    return mouth_curves(speech, names, num_frames)[:, names.index(name)]


def test_silence_has_a_closed_mouth(names: list[str]) -> None:
    assert np.abs(mouth_curves(speech_of((PAUSE, 0)), names, 50)).max() == 0


def test_the_jaw_is_open_during_a_vowel(names: list[str]) -> None:
    jaw = curve(speech_of((PAUSE, 0), ("ɑː", 0.8), (PAUSE, 1.2)), names, "jawOpen")
    middle = (np.arange(50) + 0.5) / FRAME_RATE_HZ
    assert np.abs((middle * jaw).sum() / jaw.sum() - 1.0) < 0.02
    assert jaw.max() > 0.6
    assert jaw[middle < 0.6].max() < 0.01


def test_lips_close_for_a_short_b_between_vowels(names: list[str]) -> None:
    speech = speech_of((PAUSE, 0), ("æ", 0.5), ("b", 0.92), ("æ", 1.0), (PAUSE, 1.5))
    jaw = curve(speech, names, "jawOpen")
    assert jaw[20:28].min() < 0.25 * jaw.max()
    assert curve(speech, names, "mouthPressLeft")[20:28].max() > 0.25


def test_a_phone_of_low_dominance_takes_the_mouth_of_its_neighbours(names: list[str]) -> None:
    pucker = curve(speech_of((PAUSE, 0), ("u", 0.5), ("h", 0.9), ("u", 0.96), (PAUSE, 1.4)), names, "mouthPucker")
    assert pucker[23] > 0.5


def test_the_parts_of_a_diphthong_share_its_time() -> None:
    speech = speech_of(("aɪ", 0.4), (PAUSE, 0.8))
    (start, middle, first), (again, end, second), _ = visemes_of(speech)
    assert (start, end) == (0.4, 0.8)
    assert middle == again == pytest.approx(0.6)
    assert first.shapes["jawOpen"] > second.shapes["jawOpen"]


def test_motion_depends_on_its_seed_alone(names: list[str]) -> None:
    speech = speech_of((PAUSE, 0), ("o", 0.5), (PAUSE, 1))
    one, two = (motion_of(speech, names, 50, np.random.default_rng(5)) for _ in range(2))
    other = motion_of(speech, names, 50, np.random.default_rng(6))
    np.testing.assert_array_equal(one.weights, two.weights)
    np.testing.assert_array_equal(one.turn, two.turn)
    assert not np.array_equal(one.turn, other.turn)


def test_weights_stay_in_range_and_the_head_moves_little(names: list[str]) -> None:
    for seed in range(20):
        motion = motion_of(speech_of(("ɑ", 0)), names, 300, np.random.default_rng(seed))
        assert motion.weights.min() >= 0
        assert motion.weights.max() <= 1
        assert np.abs(motion.turn).max() < 0.45
        assert np.abs(np.diff(motion.turn, axis=0)).max() < 0.05


def test_eyes_blink(names: list[str]) -> None:
    closed = np.concatenate(
        [
            motion_of(speech_of((PAUSE, 0)), names, 250, np.random.default_rng(seed)).weights[
                :, names.index("eyeBlinkLeft")
            ]
            for seed in range(6)
        ]
    )
    assert closed.max() > 0.9
    assert 0.02 < (closed > 0.5).mean() < 0.12


def test_a_portrait_has_a_closed_mouth_and_open_eyes(names: list[str]) -> None:
    rng = np.random.default_rng(0)
    motion = motion_of(speech_of(("ɑ", 0)), names, 50, rng)
    portrait = portrait_of(motion, names, rng)
    for name in ("jawOpen", "mouthPucker", "eyeBlinkLeft"):
        assert portrait.weights[0, names.index(name)] == 0
    assert not np.array_equal(portrait.turn[0], motion.turn[0])
