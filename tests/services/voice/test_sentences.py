"""Tests of services.voice.sentences: the same sentences however a text is cut into pieces."""

import pytest

from services.voice.sentences import MAX_SENTENCE, Sentence, Sentences


def split(text: str, size: int = 1000) -> list[Sentence]:
    sentences = Sentences()
    found = [each for start in range(0, len(text), size) for each in sentences.add(text[start : start + size])]
    return [*found, *sentences.finish()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello there. How are you?", ["Hello there.", "How are you?"]),
        ("Dr. Smith, e.g. J. Smith, paid 3.14 for it! Yes.", ["Dr. Smith, e.g. J. Smith, paid 3.14 for it!", "Yes."]),
        ('"Really?" he said... "No."', ['"Really?"', "he said...", '"No."']),
        ("Two things:\n- one\n- two\n\nThe end", ["Two things:", "- one", "- two", "The end"]),
        ("a line\nthat goes on.", ["a line that goes on."]),
        ("你好。世界！", ["你好。", "世界！"]),
        ("\u0000bell\u0007 \x1b[1m. Next", ["bell [1m.", "Next"]),
        ("... --- 🙂", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_text_is_split_at_the_ends_of_sentences(text: str, expected: list[str], size: int) -> None:
    sentences = split(text, size)
    assert [each.spoken for each in sentences if each.spoken] == expected
    assert "".join(each.text for each in sentences) == text
    assert all(text[each.first_char : each.end_char] == each.text for each in sentences)


@pytest.mark.parametrize("text", ["word " * 200, "x" * 1000, "first clause, " * 100])
def test_a_sentence_without_an_end_is_cut(text: str) -> None:
    sentences = split(text, 7)
    assert "".join(each.text for each in sentences) == text
    assert max(len(each.text) for each in sentences) <= MAX_SENTENCE
    if "," in text:
        assert {each.spoken[-1] for each in sentences} == {","}


def test_words_have_their_place_in_the_text() -> None:
    text = 'Say: "no - never", 你好。'
    (sentence,) = split(text)
    assert [each.text for each in sentence.words()] == ["Say:", '"no', 'never",', "你", "好。"]
    assert all(text[each.first_char :].startswith(each.text) for each in sentence.words())
