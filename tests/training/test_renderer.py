import numpy as np
import pytest

from training.synthetic.face import Face
from training.synthetic.head import Head
from training.synthetic.person import person_of
from training.synthetic.renderer import Renderer

STILL, AHEAD = np.zeros(3), np.zeros(2)


@pytest.fixture(scope="module")
def renderer(head: Head) -> Renderer:
    return Renderer(head, size=128)


def test_a_face_is_drawn_with_the_same_bytes_again(renderer: Renderer, head: Head) -> None:
    drawn = []
    for seed in (3, 4, 3):
        renderer.set_face(Face(head, person_of(head, seed)))
        drawn.append(renderer.draw(head.weights({}), STILL, AHEAD)[0])
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() > 10


def test_the_mouth_opens_at_the_reported_lips(renderer: Renderer, head: Head) -> None:
    renderer.set_face(Face(head, person_of(head, 4)))
    shut, _ = renderer.draw(head.weights({}), STILL, AHEAD)
    opened, (row, column) = renderer.draw(head.weights({"jawOpen": 0.6}), STILL, AHEAD)
    change = np.abs(opened.astype(int) - shut).mean(2)
    rows, columns = np.mgrid[0:128, 0:128]
    assert (change * rows).sum() / change.sum() == pytest.approx(row, abs=6)
    assert (change * columns).sum() / change.sum() == pytest.approx(column, abs=2)
    assert change[:50].max() <= 2


def test_the_background_does_not_move_with_the_head(renderer: Renderer, head: Head) -> None:
    renderer.set_face(Face(head, person_of(head, 4)))
    one, two = (renderer.draw(head.weights({}), np.array((0, turn, 0)), AHEAD)[0] for turn in (0.0, 0.1))
    np.testing.assert_array_equal(one[:40, :12], two[:40, :12])
    assert (one != two).any()
