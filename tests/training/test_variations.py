"""Clips rendered again, and who people look like, with stand-ins for rendering and readers."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.training.small import BrightMouths
from tests.training.test_behaviour import true_clip
from tests.training.test_held_out import flashes
from tests.training.test_metrics import curve
from training.data import Clip, StoredClip, read_shard, write_shard
from training.eval import variations
from training.eval.behaviour import behaviour_metrics
from training.eval.held_out import ClipScores, RenderedClip, held_out_metrics, score
from training.eval.inference import Models
from training.eval.readers.face_curves import FaceCurves
from training.eval.readers.identity import Identity
from training.eval.readers.landmarks import Landmarks
from training.eval.robustness import LongSession, identity_of, session_metrics

LANDMARKS = cast(Landmarks, BrightMouths())
MODELS = cast(Models, None)


class Colours:
    """Embeds a picture as its mean colour."""

    def embed(self, frame: NDArray[np.uint8], points: NDArray[np.float32]) -> NDArray[np.float32] | None:
        return frame.mean((0, 1), dtype=np.float32) / 255 if np.isfinite(points).all() else None


IDENTITY = cast(Identity, Colours())


def clips_of(folder: Path, *kinds: str) -> list[StoredClip]:
    """Write clips of these kinds, whose true jaws follow `curve`."""
    jaw, other = curve().astype(np.float32), np.zeros(60 * 640, np.int16)
    arrays: dict[str, NDArray[Any]] = {"frames": flashes(curve()), "jaw": jaw, "other": other}
    write_shard(folder / "0.tar", [Clip(f"{i}", arrays, {"kind": kind}) for i, kind in enumerate(kinds)])
    return read_shard(folder / "0.tar")


def scores_of(clips: list[StoredClip], rendered: NDArray[np.uint8]) -> list[ClipScores]:
    return [
        score(RenderedClip(rendered, clip.frames(), clip.frames()[0], np.array(clip.array("jaw")), clip), LANDMARKS)
        for clip in clips
    ]


def test_another_clips_audio_is_that_of_the_next_of_the_kind(tmp_path: Path) -> None:
    clips = clips_of(tmp_path, "speak", "listen", "speak", "turns")
    assert [clips.index(variations.next_of_kind(clip, clips)) for clip in clips] == [2, 2, 0, 0]


def test_the_others_voice_may_not_change_lips_that_speak_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = clips_of(tmp_path, "speak", "overlap")
    late = RenderedClip(flashes(np.roll(curve(), 4)), flashes(curve()), flashes(curve())[0], None)
    monkeypatch.setattr(variations, "render_clip", lambda *_, **__: late)
    metric = variations.without_the_other(MODELS, clips, scores_of(clips, flashes(curve())), LANDMARKS)
    assert metric.value is not None
    assert metric.value > 0.3
    assert metric.note.startswith("1.00 with, ")
    alone = variations.without_the_other(MODELS, clips[:1], scores_of(clips[:1], flashes(curve())), LANDMARKS)
    assert alone.value is None


def test_seeds_that_change_the_lips_have_a_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = clips_of(tmp_path, "speak")
    scores = scores_of(clips, flashes(curve()))

    def spread(shift: int) -> float:
        def rendered(_models: Models, clip: StoredClip, seed: int) -> RenderedClip:
            return RenderedClip(flashes(np.roll(curve(), shift * seed)), clip.frames(), clip.frames()[0], None)

        monkeypatch.setattr(variations, "render_clip", rendered)
        return variations.with_seeds(MODELS, clips, scores, LANDMARKS, 3, np.inf)["seed_spread"].value or 0.0

    assert spread(0) < 1e-6
    assert spread(2) > 0.2
    assert variations.with_seeds(MODELS, clips, scores, LANDMARKS, 1, np.inf)["seed_spread"].value is None


@pytest.mark.parametrize(("differs", "low", "high"), [(0, 0, 1e-6), (1, 0.2, 2)])
def test_heads_that_move_alike_with_every_seed_have_no_diversity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, differs: int, low: float, high: float
) -> None:
    [clip] = clips_of(tmp_path, "speak")
    [own] = scores_of([clip], flashes(curve()))
    assert own.behaviour is not None
    curves = own.behaviour.rendered

    def moving(seed: int) -> FaceCurves:
        return replace(curves, head=np.stack([curve(seed=differs * seed), curve(seed=9)], 1).astype(np.float32))

    seeds = iter((1, 2))
    own = replace(own, behaviour=replace(own.behaviour, rendered=moving(0)))
    monkeypatch.setattr(variations, "face_curves", lambda *_: moving(next(seeds)))
    rendered = RenderedClip(flashes(curve()), clip.frames(), clip.frames()[0], None)
    monkeypatch.setattr(variations, "render_clip", lambda *_: rendered)
    diversity = variations.with_seeds(MODELS, [clip], [own], LANDMARKS, 3, np.inf)["head_diversity"].value
    assert diversity is not None
    assert low <= diversity < high


def test_curves_of_other_frames_end_with_the_clip(tmp_path: Path) -> None:
    behaviour = true_clip(tmp_path)
    shorter = variations.ending_together(behaviour, behaviour.rendered.last(100))
    assert shorter.num_frames == len(shorter.truth.inner) == len(shorter.true("nod")) == 100
    assert behaviour_metrics([shorter])["inner_lips"].value == 1
    longer = replace(behaviour, rendered=behaviour.rendered.last(90), truth=behaviour.truth.last(90))
    assert variations.ending_together(longer, behaviour.rendered).num_frames == 90


def coloured(red: int, blue: int) -> NDArray[np.uint8]:
    return np.broadcast_to(np.array((red, 40, blue), np.uint8), (30, 8, 8, 3))


def test_people_who_turn_into_others_have_no_margin() -> None:
    def metrics(*rendered: NDArray[np.uint8]) -> dict[str, float | None]:
        people = (coloured(250, 0), coloured(0, 250))
        clips = [RenderedClip(each, own, own[0], None) for each, own in zip(rendered, people, strict=True)]
        found = held_out_metrics([score(each, LANDMARKS, IDENTITY) for each in clips])
        return {name: found[name].value for name in ("identity_distance", "identity_worst", "identity_margin")}

    own = metrics(coloured(250, 0), coloured(0, 250))
    assert own["identity_worst"] == pytest.approx(0, abs=1e-6)
    assert own["identity_margin"] == pytest.approx(np.hypot(250, 250) / 255, rel=1e-4)
    swapped = metrics(coloured(250, 0), coloured(200, 50))
    assert swapped["identity_worst"] == pytest.approx(np.hypot(200, 200) / 255, rel=1e-4)
    assert swapped["identity_distance"] == pytest.approx(np.hypot(200, 200) / 255 / 2, rel=1e-4)
    assert swapped["identity_margin"] is not None
    assert swapped["identity_margin"] < 0


def test_the_worst_person_of_long_sessions_counts() -> None:
    frames, reference = coloured(250, 0), coloured(200, 0)[0]
    assert identity_of(frames, reference, LANDMARKS, IDENTITY) == pytest.approx(50 / 255, rel=1e-4)
    assert identity_of(frames, reference, None, IDENTITY) is None
    metric = session_metrics([LongSession([1.0] * 20, 0.2), LongSession([1.0] * 20, 0.4)], 4)["session_identity"]
    assert metric.value == 0.4
    assert session_metrics([LongSession([1.0] * 20)], 4)["session_identity"].value is None
