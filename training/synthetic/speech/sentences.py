"""Random sentences. Their split follows from their own letters."""

import random
import zlib

HELD_OUT_SHARE = 8

PEOPLE = (
    "my brother", "the new teacher", "an old friend", "our neighbour", "the young doctor", "her uncle", "the pilot",
    "a good cook", "the captain", "your sister", "the woman from Paris", "that quiet boy", "the mayor", "Mister Boyle",
    "the whole village", "somebody", "the band", "a farmer", "Joyce", "Thomas", "the people upstairs", "we", "they",
)  # fmt: skip
DEEDS = (
    "found", "painted", "bought", "brought", "threw away", "forgot", "borrowed", "moved", "watched", "opened",
    "measured", "fixed", "wrote about", "asked for", "talked about", "dreamed of", "showed me", "walked past", "pushed",
    "kept", "heard", "cooked", "chose", "followed", "washed", "remembered", "saved", "pulled up", "looked at",
)  # fmt: skip
THINGS = (
    "the blue boat", "a pair of shoes", "the broken window", "twelve apples", "a loaf of bread", "the long road",
    "some fresh milk", "the music", "a map of the mountains", "the first page", "five thousand stars",
    "a small wooden box", "the yellow umbrella", "every answer", "the weather", "a cup of tea", "the film",
    "a very big fish", "the bathroom door", "hot soup", "the village church", "a huge white cloud", "the job",
    "their voices", "the garage", "both of the horses",
    "the truth", "a few more chairs", "the phone", "the usual thing", "a beautiful beach",
)  # fmt: skip
ENDINGS = (
    "", "", "yesterday", "before the show", "in the morning", "without a word", "for the first time", "with both hands",
    "on the way home", "at half past four", "as soon as possible", "near the river", "when the rain stopped",
    "because nobody else would", "again and again", "after a while", "this summer", "by mistake", "so far",
)  # fmt: skip
OPENINGS = (
    "Hello", "Well", "Of course", "Oh", "You know", "By the way", "I believe", "Perhaps", "Thank you very much", "No",
    "Yes", "To be honest", "Wow", "Good morning", "For example", "Maybe", "As you wish", "All right", "Look",
    "Funny enough",
)  # fmt: skip
QUESTIONS = (
    "Do you think that {p} {d} {t}?", "Why would anyone believe that {p} {d} {t}?", "Who told you about {t}?",
    "How much would you pay for {t}?", "What do you remember about {t} {e}?", "Could you show {p} {t}, please?",
)  # fmt: skip
STATEMENTS = (
    "{P} {d} {t} {e}.", "{P} {d} {t} and {t2} {e}.", "{o}, {p} {d} {t} {e}.", "{o}, {p} {d} {t}, but {p2} {d2} {t2}.",
    "{E}, {p} {d} {t}.", "If {p} {d} {t}, then {p2} {d2} {t2}.", "I am sure that {p} {d} {t} {e}.",
    "We were told that {p} {d} {t} {e}.", "{o}, it was {n} to {n2}, and {p} {d} {t}.",
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "fifteen", "forty",
    "sixty five", "a hundred and eight",
)  # fmt: skip


def sentence(rng: random.Random, is_held_out: bool) -> str:
    """Draw a sentence of a split; no sentence is in both."""
    while True:
        text = compose(rng)
        if is_held_out_text(text) == is_held_out:
            return text


def is_held_out_text(text: str) -> bool:
    """Return the split of a sentence from its checksum: one in HELD_OUT_SHARE is held out."""
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def compose(rng: random.Random) -> str:
    ending = rng.choice(ENDINGS)
    form = rng.choice(QUESTIONS) if rng.random() < 0.2 else rng.choice(STATEMENTS)
    person = rng.choice(PEOPLE)
    text = form.format(
        P=person[0].upper() + person[1:],
        p=person,
        p2=rng.choice(PEOPLE),
        d=rng.choice(DEEDS),
        d2=rng.choice(DEEDS),
        t=rng.choice(THINGS),
        t2=rng.choice(THINGS),
        e=ending,
        E=(ending or "today").capitalize(),
        o=rng.choice(OPENINGS),
        n=rng.choice(NUMBERS),
        n2=rng.choice(NUMBERS),
    )
    return " ".join(text.split()).replace(" .", ".").replace(" ?", "?")
