"""Hair, beards, accessories and places of people, without drawing them."""

from dataclasses import replace

import numpy as np
import pytest

from training.synthetic.accessories import LENS
from training.synthetic.face import Face
from training.synthetic.hair import skull_of
from training.synthetic.head import Floats, Head, Part
from training.synthetic.person import Person, person_of
from training.synthetic.scene import Lens, background, lens_of
from training.synthetic.styles import (
    STYLES,
    BeardShape,
    Glasses,
    Hat,
    Nature,
    Outfit,
    Range,
    Scarf,
    drawn,
    hair_style,
    outfit_of,
)

STILL, AHEAD = np.zeros(3), np.zeros(2)
BLACK = (0.01, 0.01, 0.01, 0.5)
GLASSES = Glasses(2.4, 0.22, 0.17, 0.015, BLACK, (0.8, 0.8, 0.8, 0.05))


@pytest.fixture(scope="module")
def person(head: Head) -> Person:
    return person_of(head, 4)


def face_with(head: Head, person: Person, outfit: Outfit) -> Face:
    return Face(head, replace(person, outfit=outfit, lens=Lens()))


def eyes_of(face: Face) -> Floats:
    eyes: Floats = face.base[face.head.part == Part.EYES]
    return eyes


@pytest.mark.parametrize("name", [name for name in STYLES if name != "bald"])
def test_hair_leaves_eyes_and_mouth_free(head: Head, person: Person, name: str) -> None:
    rng = np.random.default_rng(1)
    values = {key: drawn(rng, value) for key, value in STYLES[name].items()}
    style = replace(hair_style(Nature(np.array((1.0, 0, 0)), 0.5, 0.2), rng), name=name, **values)
    face = Face(head, replace(person, hair=style, outfit=Outfit()))
    hair = face.pose(head.weights({}), STILL, AHEAD).hair
    eyes, skull = eyes_of(face), skull_of(head, face.base)
    in_front = hair[hair[:, 2] > eyes[:, 2].mean() - 0.2]
    over = in_front[(np.abs(in_front[:, 0]) < 0.42 * skull.radii[0] / 0.7) & (in_front[:, 1] < eyes[:, 1].max())]
    assert len(over) < 0.004 * len(hair)
    assert np.ptp(hair[:, 1]) > 0.3


def test_a_beard_moves_with_the_jaw(head: Head, person: Person) -> None:
    face = face_with(head, replace(person, hair=replace(person.hair, count=0)), Outfit(BeardShape(1, 1, 1, 0.1)))
    shut, opened = (face.pose(head.weights({"jawOpen": x}), STILL, AHEAD).hair for x in (0, 0.6))
    moved = np.linalg.norm(opened - shut, axis=1)
    lips = face.base[head.mask[:, 0] > 0.5][:, 1].mean()
    chin, cheek = shut[:, 1] < lips - 0.25, shut[:, 1] > lips + 0.2
    assert moved[chin].mean() > 0.06
    assert moved[chin].mean() > 3 * moved[cheek].mean()


def test_glasses_sit_before_the_eyes_and_turn_with_the_head(head: Head, person: Person) -> None:
    face = face_with(head, person, Outfit(glasses=GLASSES))
    assert face.solid is not None
    lenses = face.solid.position[face.solid.kind == LENS]
    eyes = eyes_of(face)
    assert lenses[:, 2].min() > eyes[:, 2].max() - 0.05
    assert abs(lenses[:, 1].mean() - eyes[:, 1].mean()) < 0.05
    turned = face.pose(head.weights({}), np.array((0, 0.3, 0)), AHEAD)
    centre = face.place(turned.positions[head.part == Part.EYES].mean(0), 128)
    on_lenses = face.place(turned.worn[face.solid.kind == LENS].mean(0), 128)
    assert np.abs(on_lenses - centre).max() < 5


@pytest.mark.parametrize("kind", ["beanie", "cap", "brim"])
def test_a_hat_covers_the_crown_and_no_hair_shows_above_it(head: Head, person: Person, kind: str) -> None:
    face = face_with(head, person, Outfit(hat=Hat(kind, 0.45, BLACK, BLACK)))
    assert face.solid is not None
    skull = skull_of(head, face.base)
    assert face.solid.position[:, 1].max() > face.base[head.has_cap][:, 1].max()
    if face.ribbons is not None:
        assert face.pose(head.weights({}), STILL, AHEAD).hair[:, 1].max() < skull.centre[1] + 0.5 * skull.radii[1]


def test_a_scarf_lies_below_the_mouth(head: Head, person: Person) -> None:
    face = face_with(head, person, Outfit(scarf=Scarf(0.18, BLACK)))
    assert face.solid is not None
    lips = face.base[head.mask[:, 0] > 0.5]
    assert face.solid.position[:, 1].max() < lips[:, 1].min()


def test_long_hair_trails_behind_a_turning_head(head: Head, person: Person) -> None:
    rng = np.random.default_rng(0)
    values = {key: drawn(rng, value) for key, value in STYLES["long"].items()}
    face = Face(head, replace(person, hair=replace(person.hair, name="long", **values), outfit=Outfit()))
    turn = np.array((0, 0.3, 0))
    late, rigid = (face.pose(head.weights({}), turn, AHEAD, trail).hair for trail in (STILL, turn))
    assert face.ribbons is not None
    moved, along = np.linalg.norm(late - rigid, axis=1), face.ribbons.texture[:, 0]
    assert moved[along == 0].max() < 1e-4
    assert moved[along == 1].mean() > 0.05


def test_people_differ_in_what_they_wear() -> None:
    rng = np.random.default_rng(0)
    natures = [Nature(rng.dirichlet([0.45] * 3), rng.beta(0.4, 0.4), rng.beta(0.6, 2.0)) for _ in range(200)]
    outfits = [outfit_of(nature, rng) for nature in natures]
    for name, least, most in (("glasses", 0.1, 0.5), ("hat", 0.02, 0.3), ("beard", 0.05, 0.4), ("scarf", 0.01, 0.3)):
        assert least <= np.mean([getattr(outfit, name) is not None for outfit in outfits]) <= most
    assert {hair_style(nature, rng).name for nature in natures} == set(STYLES)
    views = [lens_of(rng).half_view for _ in natures]
    assert max(views) > 2 * min(views)


def test_backgrounds_differ_and_depend_on_their_seed_alone() -> None:
    one, two, other = (background(np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert np.abs(one.astype(int) - other).mean() > 5


def test_ranges_are_drawn_within_their_bounds() -> None:
    rng = np.random.default_rng(0)
    low, (name, high) = drawn(rng, (Range(1, 2), ("back", Range(3, 4))))
    assert 1 <= low <= 2
    assert name == "back"
    assert 3 <= high <= 4
