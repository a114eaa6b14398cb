import numpy as np
import pytest

from training.synthetic.face import Face
from training.synthetic.head import Head
from training.synthetic.person import person_of
from training.synthetic.renderer import Stage

STILL, AHEAD = np.zeros(3), np.zeros(2)


@pytest.fixture(scope="module")
def stage(head: Head) -> Stage:
    return Stage(head, size=128)


def test_the_same_face_is_drawn_with_the_same_bytes(stage: Stage, head: Head) -> None:
    drawn = []
    for seed in (3, 4, 3):
        stage.show(Face(head, person_of(head, seed)))
        drawn.append(stage.draw(head.weights({}), STILL, AHEAD)[0])
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() > 10


def test_a_mouth_opens_where_the_lips_are_said_to_be(stage: Stage, head: Head) -> None:
    stage.show(Face(head, person_of(head, 4)))
    shut, _ = stage.draw(head.weights({}), STILL, AHEAD)
    opened, (row, column) = stage.draw(head.weights({"jawOpen": 0.6}), STILL, AHEAD)
    change = np.abs(opened.astype(int) - shut).mean(2)
    rows, columns = np.mgrid[0:128, 0:128]
    assert (change * rows).sum() / change.sum() == pytest.approx(row, abs=6)
    assert (change * columns).sum() / change.sum() == pytest.approx(column, abs=2)
    assert change[:50].max() <= 2


def test_the_background_is_still_while_the_head_moves(stage: Stage, head: Head) -> None:
    stage.show(Face(head, person_of(head, 4)))
    one, two = (stage.draw(head.weights({}), np.array((0, turn, 0)), AHEAD)[0] for turn in (0.0, 0.1))
    np.testing.assert_array_equal(one[:40, :12], two[:40, :12])
    assert (one != two).any()
