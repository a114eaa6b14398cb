import numpy as np
import pytest

from tests.training.synthetic.speakers import speech_of
from training.data import FRAME_RATE_HZ
from training.synthetic.head import Head
from training.synthetic.motion.lips import mouth_curves, visemes_of
from training.synthetic.speech.voices import PAUSE, Speech


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
