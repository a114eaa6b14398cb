import random
from pathlib import Path

import numpy as np
import pytest

from tests.training.synthetic.speakers import speech_of
from training.make_data import FIRST_HELD_OUT, FIRST_TEST, Plan, missing_shards, phones_of
from training.synthetic.speech.sentences import is_held_out_text, sentence
from training.synthetic.speech.voices import (
    PAUSE,
    VOICES,
    choose_voice,
    merge_marks,
    strip_marks,
)


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
    plan = Plan(tmp_path, {"train": 60, "held_out": 30, "test": 20}, deadline=0.0)
    numbers = {path.parent.name: set[int]() for path, _ in missing_shards(plan)}
    for path, clips in missing_shards(plan):
        numbers[path.parent.name] |= set(clips)
    assert numbers["train"] == set(range(60))
    assert numbers["held_out"] == set(range(FIRST_HELD_OUT, FIRST_HELD_OUT + 30))
    assert numbers["test"] == set(range(FIRST_TEST, FIRST_TEST + 20))


def test_an_existing_shard_is_not_made_again(tmp_path: Path) -> None:
    plan = Plan(tmp_path, {"train": 30, "held_out": 0}, deadline=0.0)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "000001.tar").touch()
    assert [path.name for path, _ in missing_shards(plan)] == ["000000.tar", "000002.tar"]


@pytest.mark.parametrize(
    ("phone", "letters"), [("ˈɑː", "ɑ"), ("tʃ", "tʃ"), ("ˌoʊ", "oʊ"), ("ː", ""), (" ", ""), (",", "")]
)
def test_marks_are_removed_from_phones(phone: str, letters: str) -> None:
    assert strip_marks(phone) == letters


def test_marks_extend_their_phones() -> None:
    onsets, phones = merge_marks([0.0, 0.1, 0.2, 0.3, 0.4], ["k", "ˈ", "ɔ", "ː", "l"])
    assert phones == ["k", "ɔ", "l"]
    assert onsets == [0.0, 0.1, 0.4]


def test_phones_are_stored_with_times_from_the_first_frame() -> None:
    speech = speech_of((PAUSE, 0), ("b", 1.0), ("ɑ", 1.2))
    assert phones_of(speech, 25) == [(-1.0, PAUSE), (0.0, "b"), (0.2, "ɑ")]


def test_any_prefix_of_the_shards_has_clips_to_report_on(tmp_path: Path) -> None:
    plan = Plan(tmp_path, dict.fromkeys(("train", "held_out", "test"), 20), deadline=0.0)
    order = [path.parent.name for path, _ in missing_shards(plan)]
    assert order == ["held_out"] * 2 + ["train"] * 2 + ["test"] * 2
