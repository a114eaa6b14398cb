import numpy as np
import pytest

from training.synthetic.face import Face
from training.synthetic.head import Head
from training.synthetic.motion.performance import blinks_a_minute
from training.synthetic.person import person_of
from training.synthetic.renderer import Renderer

STILL, AHEAD = np.zeros(3), np.zeros(2)


@pytest.fixture(scope="module")
def renderer(head: Head) -> Renderer:
    return Renderer(head, size=128)


def bare_faced(head: Head) -> Face:
    """Return a face with neither beard nor glasses nor much perspective, looking ahead."""
    return Face(head, person_of(head, 9))


def test_a_face_is_drawn_with_the_same_bytes_again(renderer: Renderer, head: Head) -> None:
    drawn = []
    for seed in (3, 4, 3):
        renderer.set_face(Face(head, person_of(head, seed)))
        drawn.append(renderer.draw(head.weights({}), STILL, AHEAD).pixels)
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() > 10


def test_the_mouth_opens_at_the_reported_lips(renderer: Renderer, head: Head) -> None:
    renderer.set_face(bare_faced(head))
    shut = renderer.draw(head.weights({}), STILL, AHEAD)
    opened = renderer.draw(head.weights({"jawOpen": 0.6}), STILL, AHEAD)
    change = np.abs(opened.pixels.astype(int) - shut.pixels).mean(2)
    rows, columns = np.mgrid[0:128, 0:128]
    assert (change * rows).sum() / change.sum() == pytest.approx(opened.lips[0], abs=6)
    assert (change * columns).sum() / change.sum() == pytest.approx(opened.lips[1], abs=2)
    assert change[:50].max() <= 2
    assert (shut.gap, opened.gap > 6) == (0, True)


def test_lids_in_the_picture_follow_the_blink(renderer: Renderer, head: Head) -> None:
    face = bare_faced(head)
    renderer.set_face(face)
    eyes = face.place(face.base[head.part == 1], 128).mean(0).round().astype(int)
    blink = np.concatenate([np.zeros(3), np.linspace(0, 1, 6), np.linspace(1, 0, 6)])
    frames = [renderer.draw(head.weights({"eyeBlink": closed}), STILL, AHEAD).pixels for closed in blink]
    # The whites of the eyes are the brightest of the band around them.
    band = np.stack(frames)[:, eyes[0] - 4 : eyes[0] + 5, 30:98].astype(float)
    change = np.abs(band - band[0]).mean((1, 2, 3))
    assert np.corrcoef(change, blink)[0, 1] > 0.9
    assert blinks_a_minute(blink) == pytest.approx(60 * 25 / len(blink))


def test_the_background_does_not_move_with_the_head(renderer: Renderer, head: Head) -> None:
    renderer.set_face(bare_faced(head))
    one, two = (renderer.draw(head.weights({}), np.array((0, turn, 0)), AHEAD).pixels for turn in (0.0, 0.1))
    np.testing.assert_array_equal(one[:40, :8], two[:40, :8])
    assert (one != two).any()


def test_a_head_casts_shadows(renderer: Renderer, head: Head) -> None:
    renderer.set_face(bare_faced(head))
    lit = renderer.draw(head.weights({}), STILL, AHEAD).pixels.astype(int)
    renderer._shadows.compare_func = "1"
    unshadowed = renderer.draw(head.weights({}), STILL, AHEAD).pixels.astype(int)
    renderer._shadows.compare_func = "<="
    assert (unshadowed - lit).max() > 15
    assert (unshadowed - lit).min() > -3
