"""Tests of services.voice.word_times."""

import pytest

from services.voice.sentences import Sentence
from services.voice.word_times import Speed, WordTimes

SENTENCE = Sentence("a bb, cccc d.", 10)


def test_known_times_are_given_out_with_the_speech_that_they_are_in() -> None:
    words = WordTimes(SENTENCE, Speed())
    words.know([0.1, 0.2, 0.7, 0.9])
    given = [words.until(end_s) for end_s in (0.1, 0.25, 0.5, 0.8)] + [words.finish(1.0)]
    assert [[each.word.text for each in part] for part in given] == [[], ["a", "bb,"], [], ["cccc"], ["d."]]
    assert [each.start_s for part in given for each in part] == [0.1, 0.2, 0.7, 0.9]
    assert not any(each.is_estimated for part in given for each in part)


def test_an_estimate_divides_the_sentence_by_the_length_of_its_words() -> None:
    words = WordTimes(SENTENCE, Speed()).until(9.0, 10.0)
    assert [each.word.first_char for each in words] == [10, 12, 16, 21]
    starts = [each.start_s for each in words]
    assert starts == sorted(starts)
    assert starts[2] - starts[1] > starts[1] - starts[0]  # a comma is a pause
    assert all(each.is_estimated for each in words)


@pytest.mark.parametrize("seconds", [0.3, 30.0])
def test_every_word_is_given_out_once_and_in_order_whatever_the_speed(seconds: float) -> None:
    words = WordTimes(SENTENCE, Speed())
    given = [each for step in range(10) for each in words.until(seconds * step / 10)] + words.finish(seconds)
    assert [each.word for each in given] == SENTENCE.words()
    starts = [each.start_s for each in given]
    assert starts == sorted(starts)
    assert starts[-1] < seconds


def test_the_speed_of_a_sentence_is_that_of_the_next() -> None:
    speed = Speed()
    for _ in range(20):
        WordTimes(SENTENCE, speed).finish(10.0)
    streamed = [each.start_s for each in WordTimes(SENTENCE, speed).until(9.0)]
    assert streamed == pytest.approx([each.start_s for each in WordTimes(SENTENCE, speed).until(9.0, 10.0)], rel=0.01)
