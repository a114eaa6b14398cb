import numpy as np
import pytest

from tests.training.synthetic.speakers import Babbler, speech_of
from training.data import AUDIO_RATE_HZ, FRAME_RATE_HZ
from training.synthetic.motion.curves import frame_times
from training.synthetic.speech.dialogue import KINDS, Dialogue, choose_voices, make_dialogue, phrases, speaking
from training.synthetic.speech.voices import PAUSE

DURATION_S = 8.0


def dialogue_of(kind: str, seed: int = 0, engines: Babbler | None = None) -> Dialogue:
    rng = np.random.default_rng(seed)
    return make_dialogue(engines or Babbler(), choose_voices(rng, False), kind, DURATION_S, False, rng)


def shares(dialogue: Dialogue) -> tuple[float, float]:
    """Return the share of the time in which the person speaks, and the other."""
    times = frame_times(round(DURATION_S * FRAME_RATE_HZ))
    person, other = (float(speaking(speech, times).mean()) for speech in (dialogue.person, dialogue.other))
    return person, other


@pytest.mark.parametrize(("kind", "speaks", "listens"), [("speak", True, False), ("listen", False, True)])
def test_one_of_two_speaks(kind: str, speaks: bool, listens: bool) -> None:
    dialogue = dialogue_of(kind)
    person, other = shares(dialogue)
    assert (person > 0.5, other > 0.5) == (speaks, listens)
    assert (person == 0, other == 0) == (not speaks, not listens)
    assert bool(np.abs(dialogue.person.samples).max() > 0.2) == speaks
    assert bool(dialogue.texts[1]) == listens


def test_turns_alternate_and_overlaps_overlap() -> None:
    times = frame_times(round(DURATION_S * FRAME_RATE_HZ))
    both: dict[str, float] = {}
    for kind in ("turns", "overlap"):
        made = [dialogue_of(kind, seed) for seed in range(8)]
        assert all(min(shares(dialogue)) > 0 for dialogue in made)
        both[kind] = float(np.mean([speaking(d.person, times) & speaking(d.other, times) for d in made]))
    assert both["turns"] < 0.1
    assert both["overlap"] > 0.4


def test_any_ten_clips_have_all_kinds() -> None:
    assert len(KINDS) == 10
    assert set(KINDS) == {"speak", "listen", "turns", "overlap"}


def test_a_dialogue_has_its_duration_and_depends_on_its_seed_alone() -> None:
    one, two, other = dialogue_of("turns", 3), dialogue_of("turns", 3), dialogue_of("turns", 4)
    assert len(one.person.samples) == len(one.other.samples) == DURATION_S * AUDIO_RATE_HZ
    np.testing.assert_array_equal(one.other.samples, two.other.samples)
    assert one.texts == two.texts != other.texts


def test_phones_keep_their_times_in_a_dialogue() -> None:
    speech = dialogue_of("speak").person
    assert speech.onsets == sorted(speech.onsets)
    ends = [*speech.onsets[1:], DURATION_S]
    for start, end, phone in zip(speech.onsets, ends, speech.phones, strict=True):
        middle = speech.samples[int((start + end) / 2 * AUDIO_RATE_HZ)]
        assert end - start < 0.002 or (abs(middle) > 0.01) == (phone != PAUSE)


def test_two_people_have_different_voices_of_their_split() -> None:
    rng = np.random.default_rng(0)
    for is_held_out in (False, True):
        for person, other in (choose_voices(rng, is_held_out) for _ in range(50)):
            assert person != other
            assert person.is_held_out == other.is_held_out == is_held_out


def test_short_pauses_do_not_end_a_phrase() -> None:
    speech = speech_of((PAUSE, 0), ("ɑ", 0.3), (PAUSE, 0.6), ("ɑ", 0.7), (PAUSE, 1.0), ("ɑ", 1.4), (PAUSE, 1.6))
    assert phrases(speech) == [(0.3, 1.0), (1.4, 1.6)]
