"""Tests of avatar.text.prompt, in addition to the reference's examples (tests/parity)."""

import pytest

from avatar.text.prompt import clean


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("  two\n\n blanks\t", "two blanks"),
        ("&amp;quot;yes&amp;quot;", '"yes"'),
        ("<b> &amp;amp;amp;", "<b> &amp;"),
        ("cafÃ©", "café"),
        ("\u3000wide\u2003blanks\u00a0", "wide blanks"),
        (" \n ", ""),
        ("", ""),
    ],
)
def test_prompts_are_cleaned(prompt: str, words: str) -> None:
    assert clean(prompt) == words
