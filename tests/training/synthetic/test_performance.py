"""Facts about the motion of whole dialogues; rates are means over many seeds."""

import numpy as np
import pytest

from tests.training.synthetic.speakers import Babbler, speech_of
from training.data import FRAME_RATE_HZ
from training.synthetic.face import Motion
from training.synthetic.head import Floats, Head, shape_indexes
from training.synthetic.motion.eyes import LOOK_SIDEWAYS, eyes_in_head
from training.synthetic.motion.head_pose import LATENCY_RANGE_S, nods, sway
from training.synthetic.motion.performance import Performance, blinks_a_minute, perform, portrait_of
from training.synthetic.speech.dialogue import Dialogue, choose_voices, make_dialogue, phrases
from training.synthetic.speech.voices import PAUSE, Speech

FRAMES = 200
Played = list[tuple[Dialogue, Performance]]


def play(names: list[str], kind: str, seed: int) -> tuple[Dialogue, Performance]:
    rng = np.random.default_rng(seed)
    dialogue = make_dialogue(Babbler(), choose_voices(rng, False), kind, FRAMES / FRAME_RATE_HZ, False, rng)
    return dialogue, perform(dialogue, names, FRAMES, rng)


@pytest.fixture(scope="module")
def names(head: Head) -> list[str]:
    return head.shape_names


@pytest.fixture(scope="module")
def speakers(names: list[str]) -> Played:
    return [play(names, "speak", seed) for seed in range(20)]


@pytest.fixture(scope="module")
def listeners(names: list[str]) -> Played:
    return [play(names, "listen", seed) for seed in range(20)]


def truths(played: Played, name: str) -> Floats:
    return np.stack([performance.truth[name] for _, performance in played])


def mouth(motion: Motion, names: list[str]) -> Floats:
    """Return the weights of expressions that open or shape the mouth, (f, e), without the smile."""
    shapes = ("jawOpen", "mouthFunnel", "mouthPucker", "mouthStretch", "mouthPress", "mouthUpperUp")
    return motion.weights[:, [index for name in shapes for index in shape_indexes(names, name)]]


def test_people_blink_15_to_20_times_a_minute(speakers: Played, listeners: Played) -> None:
    for played in (speakers, listeners):
        rates = [blinks_a_minute(blink) for blink in truths(played, "blink")]
        assert 14 < np.mean(rates) < 21


def test_people_blink_more_at_the_ends_of_phrases(speakers: Played) -> None:
    near, elsewhere = [], []
    times = np.arange(FRAMES) / FRAME_RATE_HZ
    for dialogue, performance in speakers:
        closing = np.diff(performance.truth["blink"], prepend=0) > 0.2
        at_end = np.any([(times > end - 0.1) & (times < end + 0.5) for _, end in phrases(dialogue.person)], axis=0)
        near.append(closing[at_end])
        elsewhere.append(closing[~at_end])
    assert np.concatenate(near).mean() > 1.8 * np.concatenate(elsewhere).mean()


def test_lids_close_faster_than_they_open(speakers: Played) -> None:
    steps = np.diff(truths(speakers, "blink"), axis=1)
    assert (steps < -0.05).sum() > 1.4 * (steps > 0.05).sum()


def test_heads_sway_more_than_twice_as_much_as_stiff_ones(speakers: Played) -> None:
    within = truths(speakers, "pose").std(1).mean(0)
    assert (within > 2 * np.array((0.01, 0.02, 0.006))).all()
    assert (within < 6 * np.array((0.01, 0.02, 0.006))).all()


def test_the_power_of_sway_falls_with_its_frequency() -> None:
    rng = np.random.default_rng(0)
    window = np.hanning(400)[:, None]
    power = np.mean([np.abs(np.fft.rfft(window * sway(rng, 400), axis=0)) ** 2 for _ in range(30)], axis=(0, 2))
    hz = np.fft.rfftfreq(400, 1 / FRAME_RATE_HZ)
    bands = [power[(hz >= low) & (hz < 2 * low)].mean() for low in (0.3, 0.6, 1.2, 2.4)]
    falls_db = -10 * np.diff(np.log10(bands))
    assert (falls_db > 3).all()
    assert (falls_db < 20).all()


def test_a_listener_nods_after_the_ends_of_the_others_phrases(listeners: Played) -> None:
    count, due = 0, 0
    for dialogue, performance in listeners:
        nod, ends = performance.truth["nod"], [end for _, end in phrases(dialogue.other)]
        starts = np.flatnonzero((nod[1:] > 0.004) & (nod[:-1] <= 0.004)) / FRAME_RATE_HZ
        if len(starts):
            # Every nod belongs to a phrase; a nod's later dips come within the second after its start.
            latency = np.min([np.where(starts > end, starts - end, 99) for end in ends], axis=0)
            assert latency.min() > LATENCY_RANGE_S[0] - 0.1
            count += int((latency < LATENCY_RANGE_S[1] + 0.1).sum())
        due += sum(end < FRAMES / FRAME_RATE_HZ - 1.2 for end in ends)
    assert count > 0.5 * due


def test_a_nod_looks_down_and_comes_back() -> None:
    pitch = nods(np.random.default_rng(0), 100, [1.0])
    assert pitch.min() == 0
    assert 0.03 < pitch.max() < 0.2
    assert pitch[:25].max() == pitch[70:].max() == 0


def test_nobody_nods_to_silence(speakers: Played) -> None:
    assert truths(speakers, "nod").max() == 0


def test_a_listeners_mouth_stays_shut(listeners: Played, speakers: Played, names: list[str]) -> None:
    moved = [np.abs(np.diff(mouth(performance.motion, names), axis=0)).mean() for _, performance in listeners]
    spoken = [np.abs(np.diff(mouth(performance.motion, names), axis=0)).mean() for _, performance in speakers]
    assert max(moved) == 0
    assert min(spoken) > 0


def test_a_listener_looks_at_the_viewer_more_than_a_speaker(listeners: Played, speakers: Played) -> None:
    attention = [(np.abs(truths(played, "gaze")).max(2) < 0.05).mean() for played in (listeners, speakers)]
    assert attention[0] > 0.8
    assert 0.5 < attention[1] < attention[0]


def test_eyes_keep_to_the_viewer_while_the_head_turns() -> None:
    pose = np.array([(0.0, 0.1, 0.0), (0.1, 0.0, 0.0)])
    (right, _), (_, up) = eyes_in_head(np.zeros((2, 2)), pose)
    assert right * LOOK_SIDEWAYS == pytest.approx(-0.1)
    assert up > 0


def test_smiles_and_brows_come_and_go(listeners: Played) -> None:
    for name in ("smile", "brow"):
        curves = truths(listeners, name)
        raised = (curves > 0.25).any(1)
        assert 0.3 < raised.mean() <= 1
        assert (curves < 0.05).mean() > 0.4


def test_weights_stay_in_range_and_heads_do_not_jump(speakers: Played, listeners: Played) -> None:
    for _, performance in (*speakers, *listeners):
        motion = performance.motion
        assert motion.weights.min() >= 0
        assert motion.weights.max() <= 1
        assert np.abs(motion.turn).max() < 0.45
        assert np.abs(np.diff(motion.turn, axis=0)).max() < 0.09


def test_motion_depends_on_its_seed_alone(names: list[str]) -> None:
    one, two, other = (play(names, "turns", seed)[1] for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.motion.weights, two.motion.weights)
    for name, curve in one.truth.items():
        np.testing.assert_array_equal(curve, two.truth[name])
    assert not np.array_equal(one.motion.turn, other.motion.turn)


def test_a_portrait_has_a_closed_mouth_and_open_eyes_that_look_at_the_viewer(names: list[str]) -> None:
    rng = np.random.default_rng(0)
    voice: Speech = speech_of(("ɑ", 0), (PAUSE, 1.5))
    motion = perform(Dialogue("speak", voice, speech_of((PAUSE, 0)), ("a", "")), names, 50, rng).motion
    portrait = portrait_of(motion, names, rng)
    for name in ("jawOpen", "mouthPucker", "eyeBlinkLeft"):
        assert portrait.weights[0, names.index(name)] == 0
    assert not np.array_equal(portrait.turn[0], motion.turn[0])
    np.testing.assert_allclose(portrait.gaze, eyes_in_head(np.zeros((1, 2)), portrait.turn))
