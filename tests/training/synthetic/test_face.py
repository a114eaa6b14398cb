import numpy as np
import pytest

from training.synthetic.face import Face, above_hairline
from training.synthetic.head import Floats, Head, Part
from training.synthetic.person import person_of

STILL, AHEAD = np.zeros(3), np.zeros(2)


@pytest.fixture(scope="module")
def face(head: Head) -> Face:
    return Face(head, person_of(head, 4))


def positions(face: Face, shapes: dict[str, float] | None = None, turn: Floats = STILL) -> Floats:
    return face.pose(face.head.weights(shapes or {}), turn, AHEAD).positions


def test_a_seed_always_gives_the_same_person(head: Head) -> None:
    one, two = person_of(head, 11), person_of(head, 11)
    np.testing.assert_array_equal(one.mesh, two.mesh)
    np.testing.assert_array_equal(one.background, two.background)
    assert one.look.keys() == two.look.keys()
    assert all(np.array_equal(one.look[name], two.look[name]) for name in one.look)


def test_two_seeds_give_two_people(head: Head) -> None:
    one, two = person_of(head, 11), person_of(head, 12)
    assert np.abs(one.mesh - two.mesh).max() > 0.05
    assert not np.array_equal(one.look["skin"], two.look["skin"])


@pytest.mark.parametrize("seed", range(8))
def test_lips_are_in_the_lower_middle_of_the_picture(head: Head, seed: int) -> None:
    face = Face(head, person_of(head, seed))
    row, column = face.lips_centre(positions(face), 128)
    assert 75 < row < 95
    assert 60 < column < 68


def test_an_open_jaw_lowers_the_lips(face: Face) -> None:
    shut, _ = face.lips_centre(positions(face), 128)
    opened, _ = face.lips_centre(positions(face, {"jawOpen": 0.6}), 128)
    assert opened > shut + 1


def test_lips_turn_with_the_head(face: Face) -> None:
    _, ahead = face.lips_centre(positions(face), 128)
    _, turned = face.lips_centre(positions(face, turn=np.array((0, 0.2, 0))), 128)
    _, away = face.lips_centre(positions(face, turn=np.array((0, -0.2, 0))), 128)
    assert turned > ahead + 4
    assert away < ahead - 4


def test_shoulders_do_not_turn_with_the_head(face: Face) -> None:
    low = face.head.rest[:, 1] < 5.5
    moved = positions(face, turn=np.array((0.1, 0.3, 0.1)))
    skin = low & (face.head.part == Part.SKIN)
    np.testing.assert_array_equal(moved[skin], positions(face)[skin])


def test_a_glance_moves_only_the_eyes(face: Face) -> None:
    weights = face.head.weights({})
    there = face.pose(weights, STILL, np.array((0.5, 0))).positions
    moved = np.abs(there - positions(face)).max(1) > 0.02
    assert moved[face.head.part == Part.EYES].any()
    assert not moved[face.head.mask[:, 0] > 0.5].any()


def test_normals_have_unit_length_and_match_across_seams(face: Face) -> None:
    head = face.head
    normals = face.pose(head.weights({}), STILL, AHEAD).normals
    count = len(head.unique)
    used = np.unique(head.triangles)
    np.testing.assert_allclose(np.linalg.norm(normals[used[used < count]], axis=1), 1, atol=1e-3)
    skin = np.flatnonzero(head.part[:count] == Part.SKIN)
    _, first, same = np.unique(head.unique[skin], return_index=True, return_inverse=True)
    np.testing.assert_array_equal(normals[skin], normals[skin[first][same]])


def test_hair_is_flat_at_its_edge_and_has_volume_above(face: Face) -> None:
    height = above_hairline(face.head.rest, face.person.look["hairline"])
    cap, thick = face.head.has_cap, face.head.puff > 0.9
    lift = face._lift[:, 0]
    edge, crown = lift[cap & (np.abs(height) < 0.05)], lift[cap & thick & (height > 0.6)]
    assert edge.max() < 0.03
    assert crown.min() > 2 * edge.max()


def test_an_unknown_expression_is_refused(head: Head) -> None:
    with pytest.raises(ValueError, match="unknown expression 'grin'"):
        head.weights({"grin": 1})


def test_a_name_without_side_sets_both_sides(head: Head) -> None:
    assert head.weights({"eyeBlink": 0.5}).sum() == 1
