from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import showcase
from training.data import AUDIO_RATE_HZ
from training.showcase import COLUMNS, ROWS, STRIDE, cut_into_turns, make_strip, shrink, write_preview

DOCS = Path(__file__).parents[2] / "docs"


def test_a_strip_continues_in_its_second_row() -> None:
    frames = np.arange(200, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    strip = make_strip(frames)
    assert strip.shape == (4 * ROWS, 6 * COLUMNS, 3)
    assert (strip[0, 6, 0], strip[4, 0, 0]) == (STRIDE, STRIDE * COLUMNS)


@pytest.mark.parametrize(("side", "shown"), [(64, 64), (100, 100), (256, 100)])
def test_large_frames_shrink_and_keep_their_brightness(side: int, shown: int) -> None:
    small = shrink(np.full((2, side, 2 * side, 3), 77, np.uint8), 100)
    assert small.shape == (2, shown, 2 * shown, 3)
    assert (small == 77).all()


def test_turns_begin_in_pauses() -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 6 * AUDIO_RATE_HZ).astype(np.float32)
    for pause_s in (1.5, 4.0):
        samples[round((pause_s - 0.2) * AUDIO_RATE_HZ) : round((pause_s + 0.2) * AUDIO_RATE_HZ)] = 0
    turns = cut_into_turns(samples, 3)
    assert [turn.start / AUDIO_RATE_HZ for turn in turns] == pytest.approx([0, 1.5, 4.0], abs=0.15)
    assert [turn.stop for turn in turns] == [*(turn.start for turn in turns[1:]), len(samples)]
    with pytest.raises(ValueError, match=r"6.0 s of speech are too short for 6 turns"):
        cut_into_turns(samples, 6)


def test_a_preview_plays_for_ever_and_says_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), np.uint8)
    write_preview(tmp_path / "a.webp", frames, 25)
    with Image.open(tmp_path / "a.webp") as image:
        assert (image.n_frames, image.info["loop"], image.size) == (5, 0, (16, 16))  # type: ignore[attr-defined]
        assert b"trainedAlgorithmicMedia" in image.info["xmp"]
        image.seek(1)
        image.load()
        assert image.info["duration"] == 40
    monkeypatch.setattr(showcase, "PREVIEW_BYTES", 100)
    with pytest.raises(ValueError, match="at most 100 are wanted"):
        write_preview(tmp_path / "a.webp", frames, 25)


def test_the_readmes_film_plays_and_is_small() -> None:
    assert (DOCS / "demo.webp").stat().st_size <= 1_000_000
    with Image.open(DOCS / "demo.webp") as image:
        assert image.n_frames > 100  # type: ignore[attr-defined]
