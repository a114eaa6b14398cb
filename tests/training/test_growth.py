from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from avatar.checkpoints.files import save
from avatar.checkpoints.part import Part
from avatar.vae import vae
from avatar.vae.light import LightCodec, LightConfig
from tests.published import filled
from tests.training.small import small
from training.batches import BatchConfig, load_batch
from training.codec.__main__ import CodecRecipe, CodecRun, export
from training.codec.crops import CropConfig, load_crops
from training.codec.growth import add_detail, deepen, fit_outputs, grow
from training.data import Clip, StoredClip, read_shard, write_shard

CROPS = CropConfig(batch_size=2, size=32, num_frames=9)


@pytest.fixture(autouse=True)
def few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.codec.growth.NUM_DETAIL_BATCHES", 16)


@pytest.fixture
def codec() -> LightCodec:
    """A small codec with random weights."""
    codec = LightCodec(LightConfig(wide=8, mid=8, thin=8, latent_scale=1.0)).requires_grad_(False)
    codec.load_state_dict(filled(codec))
    return codec


def test_a_grown_codec_has_the_same_latents_and_repeats_pixels(codec: LightCodec) -> None:
    grown = grow(codec, 2)
    frames = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = codec.encode(frames)
    torch.testing.assert_close(grown.encode(interpolate(frames, scale_factor=(1, 2, 2))), latents, rtol=0, atol=1e-5)
    one, other = (each.decode(latents, each.new_state()) for each in (codec, grown))
    torch.testing.assert_close(other, interpolate(one, scale_factor=(1, 2, 2)), rtol=0, atol=1e-5)


def test_fitted_outputs_reconstruct_better_than_repeated_pixels(codec: LightCodec, clips: list[StoredClip]) -> None:
    grown = grow(codec, 2)
    crops = [load_crops(clips, CROPS, 0, step)[0] for step in range(4)]

    def error() -> float:
        return float(torch.stack([(grown(frames) - frames).pow(2).mean() for frames in crops]).mean())

    repeated, latents = error(), grown.encode(crops[0])
    fit_outputs(grown, clips, CROPS, 0)
    assert error() < 0.5 * repeated
    torch.testing.assert_close(grown.encode(crops[0]), latents, rtol=0, atol=0)


def test_detail_leaves_the_old_channels_and_lowers_the_error(codec: LightCodec, clips: list[StoredClip]) -> None:
    fit_outputs(codec, clips, CROPS, 0)
    more = add_detail(codec, 20, clips, CROPS, 0)
    frames, _ = load_crops(clips, CROPS, 0, 3)
    latents = more.encode(frames)
    assert latents.shape[1] == more.channels == 20
    torch.testing.assert_close(latents[:, :16], codec.encode(frames), rtol=0, atol=1e-5)
    assert 0.2 < latents[:, 16:].std() / latents[:, :16].std() < 2
    error, before = ((each(frames) - frames).pow(2).mean() for each in (more, codec))
    assert error < 0.9 * before


def test_a_deeper_encoder_gives_the_same_latents_until_it_trains(codec: LightCodec, clips: list[StoredClip]) -> None:
    deeper, (frames, _) = deepen(codec, 3, 0), load_crops(clips, CROPS, 0, 0)
    assert torch.equal(deeper.encode(frames), codec.encode(frames))
    deeper.requires_grad_(True)
    torch.autograd.backward(deeper.encode(frames).square().sum())
    added = [weight for name, weight in deeper.encoder.more.named_parameters() if name.endswith("leave.weight")]
    assert len(added) == 2
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in added)


def test_a_codec_starts_with_the_channels_of_a_finished_one(
    codec: LightCodec, clips: list[StoredClip], tmp_path: Path
) -> None:
    save(tmp_path, asdict(replace(vae.tiny(), network=asdict(codec.config))), codec, torch.float16)
    recipe = CodecRecipe(steps=4, warmup=1, crops=CROPS, start=str(tmp_path), channels=18, encoder_depth=2)
    with pytest.raises(ValueError, match="has latents of 16 channels, give --channels as many or more"):
        CodecRun(replace(recipe, channels=8), clips)
    run = CodecRun(recipe, clips)
    encoder = run.codec.encoder.linear.weight.clone()
    run.advance(clips)
    assert (run.codec.config.channels, run.codec.config.encoder_depth) == (18, 2)
    assert not torch.equal(run.codec.encoder.linear.weight, encoder)


def test_a_grown_codec_is_not_grown_again(codec: LightCodec) -> None:
    with pytest.raises(ValueError, match="has the scale 2; grow one of scale 1"):
        grow(grow(codec, 2), 2)


def test_a_grown_decoder_trains_resumes_and_is_loaded_by_the_product(
    codec: LightCodec, data: Path, clips: list[StoredClip]
) -> None:
    folder = data.parent
    save(folder / "start", asdict(replace(vae.tiny(), network=asdict(codec.config))), codec, torch.float16)
    recipe = CodecRecipe(steps=4, warmup=1, crops=CROPS, decoder_of=str(folder / "start"), scale=2, squared=True)
    run = CodecRun(recipe, clips)
    encoder = {name: weight.clone() for name, weight in run.codec.encoder.state_dict().items()}
    assert run.advance(clips)["loss"] > 0
    run.save(folder / "state.pt")
    resumed = CodecRun.load(folder / "state.pt", recipe)
    assert resumed.codec.config.scale == 2
    torch.testing.assert_close(dict(resumed.codec.encoder.state_dict()), encoder, rtol=0, atol=0)
    metrics = export(data, folder, recipe, folder / "larger")
    assert {"psnr", "sharpness", "edges", "flicker"} <= metrics.keys()
    served = vae.load(Part.read(folder / "larger"))
    assert served.config.picture.fixed_size == (256, 256)
    assert served.encode_picture(torch.zeros(256, 256, 3, dtype=torch.uint8)).shape == (16, 19, 16, 16)


def test_the_loss_weighs_the_lips_of_larger_pictures_in_the_right_place(tmp_path: Path) -> None:
    latents = np.zeros((4, 12, 16, 16), np.float16)
    arrays: dict[str, Any] = {
        "latents": latents,
        "motion": latents[:, :1].repeat(19, 1),
        "features": np.zeros((2, 6, 48), np.float16),
        "lips": np.tile(np.array((200, 72), np.float32), (48, 1)),
    }
    write_shard(tmp_path / "0.tar", [Clip("0", arrays, {"lead_frames": 0, "space_stride": 16})])
    batch = load_batch(read_shard(tmp_path / "0.tar"), BatchConfig(batch_size=1, num_blocks=(4, 4)), small(), 0, 0)
    weight = batch.weight[0, 0, 0]
    row, column = divmod(int(weight.argmax()), 16)
    assert abs(row - 12) <= 1
    assert abs(column - 4) <= 1
    assert weight.max() > 3 * weight.min()
