import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from avatar.checkpoints.part import Part
from avatar.vae import light, vae
from tests.training.conftest import synthetic_clip
from tests.training.small import tensors
from training.codec.__main__ import CodecRecipe, CodecRun, export, loss_terms, train
from training.codec.crops import CropConfig, eyes_of, lips_weight, load_crops, to_pixels
from training.codec.pca_init import normalise_latents, patches_of, set_principal_components, untrained_codec
from training.codec.report import report
from training.data import Clip, StoredClip, read_clips, read_shard, write_shard
from training.eval.psnr import mouth_boxes, psnr
from training.loop import Limits

CROPS = CropConfig(batch_size=2, size=32, num_frames=9)
RECIPE = CodecRecipe(steps=40, warmup=2, crops=CROPS)
LIMITS = Limits(minutes=5, save_minutes=5)
NUM_BATCHES = 5


@pytest.fixture(autouse=True)
def few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.codec.pca_init.NUM_BATCHES", NUM_BATCHES)


def same(one: CodecRun, two: CodecRun) -> bool:
    states = [tensors([run.codec.state_dict(), run.ema.state_dict(), run.optimizer.state_dict()]) for run in (one, two)]
    return one.step == two.step and all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_batches_depend_on_seed_and_step_alone(clips: list[StoredClip]) -> None:
    one, again, other = (load_crops(clips, CROPS, 0, step)[0] for step in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.shape == (2, 3, 9, 32, 32)
    assert one.abs().max() <= 1


def test_weights_are_largest_at_the_lips_and_one_on_average() -> None:
    weight = lips_weight(np.array([[10, 20], [30, 5]], np.float32), 40, 48, 4.0)
    assert weight.shape == (1, 2, 40, 48)
    torch.testing.assert_close(weight.mean((0, 2, 3)), torch.ones(2))
    assert [divmod(int(frame.argmax()), 48) for frame in weight[0]] == [(10, 20), (30, 5)]


def test_weights_stay_on_the_lips_in_cut_and_mirrored_crops(tmp_path: Path) -> None:
    # Black, except for one white pixel at the lips.
    frames = np.zeros((9, 48, 48, 3), np.uint8)
    frames[:, 20, 31] = 255
    lips = np.tile(np.array((20, 31), np.float32), (9, 1))
    write_shard(tmp_path / "0.tar", [Clip("0", {"frames": frames, "lips": lips}, {})])
    places = set()
    for step in range(20):
        pixels, weights = load_crops(read_shard(tmp_path / "0.tar"), replace(CROPS, batch_size=1), 0, step)
        at_lips = pixels[0, :, 4].sum(0).argmax()
        if pixels[0, :, 4].std() > 0:
            assert abs(int(at_lips) % 32 - int(weights[0, 0, 4].argmax()) % 32) <= 1
            assert abs(int(at_lips) // 32 - int(weights[0, 0, 4].argmax()) // 32) <= 1
            places.add(int(at_lips))
    assert len(places) > 5


def test_principal_components_reconstruct_the_clips(clips: list[StoredClip]) -> None:
    codec = untrained_codec(light.tiny(), 0)
    set_principal_components(codec, clips, CROPS, 0)
    frames = torch.cat([load_crops(clips, CROPS, 0, step)[0] for step in range(NUM_BATCHES)])
    with torch.no_grad():
        assert float(psnr((codec(frames) - frames).pow(2).mean())) > 20


def test_the_seed_decides_the_weights() -> None:
    first = untrained_codec(light.tiny(), 3).state_dict()
    torch.manual_seed(0)
    again, other = (untrained_codec(light.tiny(), seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["decoder.mid.enter.weight"], other["decoder.mid.enter.weight"])


def test_patches_are_those_that_the_codec_encodes(clips: list[StoredClip]) -> None:
    """The linear map of a patch is the codec's raw latent while its correction is zero."""
    codec = untrained_codec(replace(light.tiny(), latent_scale=1.0, scale=2, channels=20), 0)
    frames, _ = load_crops(clips, CROPS, 0, 0)
    with torch.no_grad():
        linear = patches_of(frames, 2) @ codec.encoder.linear.weight[:, :, 0, 0].T
        latents = codec.encode(frames)[:, :, 1:]
    torch.testing.assert_close(linear, latents.permute(0, 2, 3, 4, 1).flatten(0, 3), atol=1e-5, rtol=1e-5)


def test_normalising_gives_unit_latents_and_changes_no_frame(clips: list[StoredClip]) -> None:
    codec = untrained_codec(light.tiny(), 0)
    unit = normalise_latents(codec, clips, CROPS, 0)
    frames = torch.cat([load_crops(clips, CROPS, 0, step)[0] for step in range(NUM_BATCHES)])
    with torch.no_grad():
        latents = unit.encode(frames)[:, :, 1:]
        torch.testing.assert_close(unit(frames[:4]), codec(frames[:4]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-4, rtol=0)
    assert float(latents.pow(2).mean()) == pytest.approx(1, abs=1e-3)


def test_steps_on_one_batch_lower_its_loss(clips: list[StoredClip]) -> None:
    run = CodecRun(replace(RECIPE, warmup=1, lr=1e-3, noise=0.0), clips)
    losses = []
    for _ in range(8):
        run.step = 0
        losses.append(run.advance(clips)["picture"])
    assert losses[-1] < 0.9 * losses[0]


def test_latents_are_noised_in_training(clips: list[StoredClip]) -> None:
    codec = untrained_codec(light.tiny(), 0)
    frames, weights = load_crops(clips, CROPS, 0, 0)
    clean, noisy = (
        loss_terms(codec, frames, weights, replace(RECIPE, noise=noise), torch.Generator().manual_seed(0))["picture"]
        for noise in (0.0, 0.5)
    )
    assert noisy > clean


def test_a_constant_error_has_no_motion_term(clips: list[StoredClip], monkeypatch: pytest.MonkeyPatch) -> None:
    codec = untrained_codec(light.tiny(), 0)
    frames, weights = load_crops(clips, CROPS, 0, 0)
    growing = 0.5 * torch.arange(frames.shape[2]).reshape(-1, 1, 1) / frames.shape[2]
    for error, expected in ((0.5, 0.0), (growing, 0.5 / frames.shape[2])):
        monkeypatch.setattr(codec, "decode", lambda *_, error=error: frames + error)
        terms = loss_terms(codec, frames, weights, replace(RECIPE, noise=0.0), torch.Generator())
        assert float(terms["motion"]) == pytest.approx(expected, abs=1e-6)
        assert float(terms["picture"]) > 0.1


def test_blur_has_a_detail_term_and_displacement_nearly_none(
    clips: list[StoredClip], monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = untrained_codec(light.tiny(), 0)
    frames, weights = load_crops(clips, CROPS, 0, 0)
    results = {
        "same": frames,
        "moved": frames.roll(1, -1),
        "blurred": functional.avg_pool3d(frames, (1, 3, 3), 1, (0, 1, 1)),
    }
    detail = {}
    for name, result in results.items():
        monkeypatch.setattr(codec, "decode", lambda *_, result=result: result)
        detail[name] = float(loss_terms(codec, frames, weights, RECIPE, torch.Generator())["detail"])
    assert detail["same"] == 0 < detail["moved"] < 0.5 * detail["blurred"]


def test_a_stopped_run_resumes_bit_for_bit(clips: list[StoredClip], tmp_path: Path) -> None:
    run = CodecRun(RECIPE, clips)
    run.advance(clips)
    run.save(tmp_path / "state.pt")
    resumed = CodecRun.load(tmp_path / "state.pt", RECIPE)
    run.advance(clips)
    assert not same(run, resumed)
    resumed.advance(clips)
    assert same(run, resumed)


def test_new_clips_do_not_change_steps_before_the_next_checkpoint(clips: list[StoredClip]) -> None:
    one, two = CodecRun(RECIPE, clips), CodecRun(RECIPE, clips)
    one.advance(clips)
    two.advance([*clips, *clips])
    assert same(one, two)


def test_a_run_stops_at_its_time_limit_and_the_next_call_resumes(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = replace(RECIPE, steps=2)
    train(data, out, recipe, Limits(minutes=0, save_minutes=1))
    assert not (out / "state.pt").exists()
    train(data, out, recipe, LIMITS)
    write_shard(data / "train" / "000001.tar", [synthetic_clip(6)])
    train(data, out, replace(recipe, steps=3), LIMITS)
    run = CodecRun.load(out / "state.pt", recipe)
    assert (run.step, run.num_clips) == (3, 7)
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 0, 2, 3]
    assert (out / "sheet.png").exists()
    assert (out / "psnr.png").exists()


def test_the_export_is_loaded_by_the_product_and_its_decoder_trains_alone(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "first", replace(RECIPE, steps=1), LIMITS)
    metrics = export(data, tmp_path / "first", RECIPE, tmp_path / "vae")
    before = vae.load(Part.read(tmp_path / "vae")).codec
    assert isinstance(before, light.LightCodec)
    assert report(before, read_clips(data, "held_out"))["psnr"] == pytest.approx(metrics["psnr"], abs=1e-6)
    assert metrics["step"] == 1

    decoder_recipe = replace(RECIPE, steps=2, decoder_of=str(tmp_path / "vae"), channels=light.CHANNELS // 2)
    train(data, tmp_path / "second", decoder_recipe, LIMITS)
    export(data, tmp_path / "second", decoder_recipe, tmp_path / "better")
    after = vae.load(Part.read(tmp_path / "better")).codec
    latents = torch.randn(1, before.channels, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(before.encode(pixels), after.encode(pixels))
    assert not torch.equal(before.decode(latents, before.new_state()), after.decode(latents, after.new_state()))


def test_psnr_is_relative_to_the_range_of_pixels() -> None:
    frames = np.array([0, 255], np.uint8).reshape(1, 2, 1, 1).repeat(3, 3)
    assert to_pixels(frames)[0, 0].flatten().tolist() == [-1, 1]
    assert psnr(torch.full((4,), 0.04)) == pytest.approx(20)


def test_the_mouth_box_follows_the_lips() -> None:
    values = torch.zeros(1, 2, 128, 128)
    values[0, 0, 60:88, 40:76] = 1
    values[0, 1, 80:108, 50:86] = 1
    boxes = mouth_boxes(values, np.array([[74, 58], [94, 68]], np.float32))
    assert boxes.shape == (2, 1, 28, 36)
    assert boxes.min() == 1


def test_eyes_weigh_as_lips_and_follow_the_head() -> None:
    lips = np.tile(np.array((170, 128), np.float32), (3, 1))
    pose = np.array([(0, 0, 0), (0, 0.2, 0), (0, 0, 0.2)], np.float32)
    left, right = eyes_of(lips, pose, 256)
    np.testing.assert_allclose(left[0], (103, 96), atol=1)
    np.testing.assert_allclose(right[0], (103, 160), atol=1)
    assert (left[1] < left[0])[1], "a head that turns to the right shows its eyes further to the left of the lips"
    assert right[2][0] < left[2][0], "a head that rolls to the left lifts its right eye"
    [weight] = lips_weight(lips, 256, 256, 10.0, eyes=[left, right])
    torch.testing.assert_close(weight.mean((1, 2)), torch.ones(3))
    at_lips, at_eye, elsewhere = weight[0, 170, 128], weight[0, 103, 160], weight[0, 20, 20]
    torch.testing.assert_close(at_eye, at_lips, rtol=0.02, atol=0)
    torch.testing.assert_close(at_lips / elsewhere, torch.tensor(11.0), rtol=0.02, atol=0)
