import random
from pathlib import Path

import numpy as np
import pytest

from training.data import AUDIO_RATE_HZ
from training.make_data import FIRST_HELD_OUT, Plan, make_utterance, missing_shards
from training.synthetic.sentences import is_held_out_text, sentence
from training.synthetic.voices import PAUSE, VOICES, Engines, Speech, Voice, choose_voice, merge_marks, strip_marks


class Metronome(Engines):
    """Engines that speak every text in half a second: a vowel of 0.3 s, then a pause."""

    def __init__(self) -> None:
        super().__init__(Path("none"), seed=0)
        self.texts: list[str] = []

    def speak(self, text: str, voice: Voice, tempo: float = 1.0, pitch: float = 1.0) -> Speech:  # noqa: ARG002
        self.texts.append(text)
        samples = np.zeros(AUDIO_RATE_HZ // 2, np.float32)
        samples[: int(0.3 * AUDIO_RATE_HZ)] = 0.2
        return Speech(samples, [0.0, 0.3], ["ɑ", PAUSE])


def test_no_sentence_is_in_both_splits() -> None:
    rng = random.Random(0)
    train = {sentence(rng, is_held_out=False) for _ in range(400)}
    held_out = {sentence(rng, is_held_out=True) for _ in range(100)}
    assert not train & held_out
    assert not any(is_held_out_text(text) for text in train)
    assert len(train) > 390


def test_no_voice_is_in_both_splits() -> None:
    rng = np.random.default_rng(0)
    names = [{choose_voice(rng, is_held_out).name for _ in range(300)} for is_held_out in (False, True)]
    assert not names[0] & names[1]
    assert names[0] <= {voice.name for voice in VOICES if not voice.is_held_out}
    assert len(names[1]) > 5


def test_no_person_is_in_both_splits(tmp_path: Path) -> None:
    plan = Plan(tmp_path, {"train": 60, "held_out": 30}, deadline=0.0)
    numbers = {path.parent.name: set[int]() for path, _ in missing_shards(plan)}
    for path, clips in missing_shards(plan):
        numbers[path.parent.name] |= set(clips)
    assert numbers["train"] == set(range(60))
    assert numbers["held_out"] == set(range(FIRST_HELD_OUT, FIRST_HELD_OUT + 30))


def test_an_existing_shard_is_not_made_again(tmp_path: Path) -> None:
    plan = Plan(tmp_path, {"train": 60, "held_out": 0}, deadline=0.0)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "000001.tar").touch()
    assert [path.name for path, _ in missing_shards(plan)] == ["000000.tar", "000002.tar"]


def test_phones_keep_their_times_in_an_utterance() -> None:
    speech, text = make_utterance(Metronome(), VOICES[0], 3.0, False, np.random.default_rng(2))
    assert len(speech.samples) == 3 * AUDIO_RATE_HZ
    assert speech.onsets == sorted(speech.onsets)
    assert len(text) > 20
    loud = np.abs(speech.samples) > 0.1
    ends = [*speech.onsets[1:], 3.0]
    for start, end, phone in zip(speech.onsets, ends, speech.phones, strict=True):
        middle = int((start + end) / 2 * AUDIO_RATE_HZ)
        assert loud[middle] == (phone == "ɑ")


def test_an_utterance_depends_on_its_seed_alone() -> None:
    one, two = (Metronome(), Metronome())
    for engines in (one, two):
        make_utterance(engines, VOICES[0], 2.0, False, np.random.default_rng(3))
    assert one.texts == two.texts


@pytest.mark.parametrize(
    ("phone", "letters"), [("ˈɑː", "ɑ"), ("tʃ", "tʃ"), ("ˌoʊ", "oʊ"), ("ː", ""), (" ", ""), (",", "")]
)
def test_marks_are_removed_from_phones(phone: str, letters: str) -> None:
    assert strip_marks(phone) == letters


def test_marks_extend_their_phones() -> None:
    onsets, phones = merge_marks([0.0, 0.1, 0.2, 0.3, 0.4], ["k", "ˈ", "ɔ", "ː", "l"])
    assert phones == ["k", "ɔ", "l"]
    assert onsets == [0.0, 0.1, 0.4]
