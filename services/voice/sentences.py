"""Sentences and words of a text that arrives in pieces, by their position in it.

pieces -> Sentences.add -> Sentence, Sentence, ...; the rest at `finish`
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# A sentence without an end is cut when it is longer than this, in characters: people breathe, too.
MAX_SENTENCE = 200
# After an end with ASCII punctuation follows a space, since 3.14 has none; a list's items end with their lines.
_END = re.compile(r"""[.!?…]+["'”’»)\]*_]*(?=\s)|[。！？]+[」』”’]*|\n(?=\s*\n)|\n(?=[ \t]*(?:[-*•]|\d+[.)])[ \t])""")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|approx|e\.g|i\.e|[A-Z])\.$")
# In order of preference.
_PAUSES = (re.compile(r"[;:—,、，][\"'”’)]*(?=\s)|[、，；：]"), re.compile(r"\s"))
# Languages that are written without spaces: each character counts as a word.
_WORD = re.compile(r"[぀-ヿ㐀-鿿][。！？、，]*|[^\s぀-ヿ㐀-鿿]+")


@dataclass(frozen=True)
class Word:
    """A word with its punctuation. first_char: its position in the turn's text."""

    text: str
    first_char: int


@dataclass(frozen=True)
class Sentence:
    """Text that an engine speaks at a time. first_char: its position in the turn's text."""

    text: str
    first_char: int

    @property
    def end_char(self) -> int:
        """Position after its last character."""
        return self.first_char + len(self.text)

    @property
    def spoken(self) -> str:
        """The text for an engine: one line without control characters; empty if no letter or digit is in it."""
        if not any(each.isalnum() for each in self.text):
            return ""
        return " ".join("".join(each if each.isprintable() else " " for each in self.text).split())

    def words(self) -> list[Word]:
        """Return the words that have a letter or digit, in order."""
        found = _WORD.finditer(self.text)
        return [Word(each[0], self.first_char + each.start()) for each in found if any(map(str.isalnum, each[0]))]


class Sentences:
    """Splits a text that arrives in pieces. num_chars: characters that have arrived."""

    def __init__(self) -> None:
        self.num_chars = 0
        self._rest = ""

    def add(self, text: str) -> Iterator[Sentence]:
        """Add a piece; yield the sentences that it completes."""
        self._rest += text
        self.num_chars += len(text)
        while end := self._end():
            yield self._take(end)

    def finish(self) -> Iterator[Sentence]:
        """Yield what is left."""
        while self._rest:
            yield self._take(self._end() or len(self._rest))

    def _take(self, num_chars: int) -> Sentence:
        sentence = Sentence(self._rest[:num_chars], self.num_chars - len(self._rest))
        self._rest = self._rest[num_chars:]
        return sentence

    def _end(self) -> int:
        """Return the length of the next sentence, 0 if its end has not come."""
        for match in _END.finditer(self._rest, 0, MAX_SENTENCE + 2):
            if not _ABBREVIATION.search(self._rest[: match.end()]):
                return match.end()
        if len(self._rest) <= MAX_SENTENCE:
            return 0
        for pause in _PAUSES:
            if found := [match.end() for match in pause.finditer(self._rest, MAX_SENTENCE // 3, MAX_SENTENCE)]:
                return found[-1]
        return MAX_SENTENCE
