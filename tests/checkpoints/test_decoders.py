"""Tests of avatar.checkpoints.decoders: a tiny decoder is opened by its shapes and name, or refused with what it is."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from avatar import __main__
from avatar.checkpoints.decoders import find_decoder, open_decoder
from avatar.checkpoints.inspect import main
from avatar.checkpoints.layouts import VAE_FILE, open_part
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import VaeSettings
from avatar.settings import load as load_settings
from avatar.types import Block, Session
from avatar.vae.tiny_decoder import TinyDecoder, TinyDecoderCodec
from avatar.vae.vae import Vae, load
from avatar.vae.wan import WanCodec, WanConfig
from services.vae.__main__ import build
from tests.published import filled, vae_as_published


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Weights of the published names and shapes, with two of the encoder's, in float16."""
    torch.manual_seed(0)
    tensors = {name: tensor.half() for name, tensor in filled(TinyDecoder()).items()}
    return {
        **tensors,
        "encoder.0.weight": torch.zeros(64, 3, 3, 3),
        "encoder.2.conv.weight": torch.zeros(64, 128, 1, 1),
    }


@pytest.fixture(scope="module")
def published_with(
    published: Path, weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A published folder with the VAE's file alone, and taew2_1 beside it."""
    folder = tmp_path_factory.mktemp("decoder") / "checkpoint"
    shutil.copytree(published, folder)
    save_file(weights, folder / "taew2_1.safetensors")
    yield folder
    shutil.rmtree(folder)


def shaped(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Return a few tensors of a decoder, other than the tiny one's in `_1_weight` for `decoder.1.weight` and so on."""
    tensors = {
        "_1_weight": (256, 16, 3, 3),
        "_3_conv_0_weight": (256, 512, 3, 3),
        "_22_weight": (3, 64, 3, 3),
        **shapes,
    }
    return {f"decoder{name}".replace("_", "."): torch.zeros(shape) for name, shape in tensors.items()}


def frames_of(vae: Vae[TinyDecoderCodec]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    session = Session("s", 0, torch.randn(16, 19, 2, 2, generator=generator))
    block = Block(1, torch.empty(0), torch.randn(16, 3, 2, 2, generator=generator))
    state = vae.open(session)
    return torch.cat([vae.frames(latent, state) for latent in vae.latent_frames(block)], dim=1)


def test_a_decoder_in_the_checkpoints_folder_decodes_and_wan_encodes(
    published_with: Path, published: Path, weights: dict[str, Tensor]
) -> None:
    part = open_part(published_with, "vae")
    assert part.digest() != open_part(published, "vae").digest()
    vae = load(part)
    assert isinstance(vae.codec, TinyDecoderCodec)
    assert torch.equal(vae.codec.decoder.state_dict()["decoder.22.weight"], weights["decoder.22.weight"].float())
    clip = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vae.codec.encode(clip), load(open_part(published, "vae")).codec.encode(clip))


def test_a_decoder_may_take_the_place_of_wans_whose_tensors_are_then_not_needed(
    published_with: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(published_with, folder)
    stored = torch.load(folder / VAE_FILE, weights_only=True)
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(("decoder.", "conv2."))}
    torch.save(kept, folder / VAE_FILE)
    assert torch.equal(frames_of(load(open_part(folder, "vae"))), frames_of(load(open_part(published_with, "vae"))))
    (folder / "taew2_1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"do not fit AutoencoderKLWan: missing post_quant_conv\.weight"):
        load(open_part(folder, "vae"))


def test_the_name_says_which_latents_a_file_takes(tmp_path: Path) -> None:
    weights = shaped()
    for name, latents in (
        ("taew2_1.safetensors", "normalised"),
        ("taew2_1_fp16.pth", "normalised"),
        ("lighttaew2_1.safetensors", "raw"),
        ("LightTAEW2_1-v2.pth", "raw"),
    ):
        path = tmp_path / name
        save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
        assert open_decoder(path).config == {"latents": latents}
    for name, words in (
        ("decoder.safetensors", r"neither they nor its name say which latents it takes.*lighttaew2_1"),
        ("taehv.safetensors", "is by its name a decoder for HunyuanVideo, whose latents are not those of Wan 2.1"),
        ("taecvx.pth", "for CogVideoX"),
        ("taeos1_3.pth", r"for Open-Sora 1\.3"),
    ):
        path = tmp_path / name
        save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
        with pytest.raises(ValueError, match=words):
            open_decoder(path)


def test_a_folders_configuration_says_which_latents_its_file_takes(tmp_path: Path) -> None:
    save_file(shaped(), tmp_path / "model.safetensors")
    for latents in ("raw", "normalised"):
        (tmp_path / "config.json").write_text(json.dumps({"latents": latents}))
        assert open_decoder(tmp_path).config == {"latents": latents}
    (tmp_path / "model.safetensors").rename(tmp_path / "taew2_1.safetensors")
    assert open_decoder(tmp_path).config == {"latents": "normalised"}
    (tmp_path / "config.json").write_text(json.dumps({"latents": "raw"}))
    assert open_decoder(tmp_path).config == {"latents": "raw"}
    (tmp_path / "config.json").unlink()
    assert open_decoder(tmp_path).config == {"latents": "normalised"}


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"latents": "scaled"}, "latents must be normalised or raw, got 'scaled'"),
        ({}, "neither they nor its name say which latents it takes"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(
    published_with: Path, tmp_path: Path, stated: dict[str, object], words: str
) -> None:
    save_file(shaped(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=words):
        load(open_part(published_with, "vae", decoder=tmp_path))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (shaped(_1_weight=(256, 48, 3, 3)), r"latents with 48 channels \(taew2_2 or lighttaew2_2, of Wan 2\.2\)"),
        (shaped(_1_weight=(256, 32, 3, 3)), r"32 channels \(taehv1_5 or lighttaehy1_5"),
        (shaped(_1_weight=(256, 24, 3, 3)), r"24 channels \(taeh3\)"),
        (shaped(_1_weight=(256, 128, 3, 3)), r"128 channels \(taeltx"),
        (shaped(_1_weight=(256, 7, 3, 3)), r"7 channels \(unknown here\)"),
        (shaped(_0_weight=(256, 16, 3, 3)), "`super` variant"),
        (shaped(_22_weight=(12, 64, 3, 3)), "with patches: it has 12 outputs a pixel and not 3"),
        (shaped(_22_weight=(48, 64, 3, 3)), "with patches: it has 48 outputs"),
        (shaped(_1_weight=(256, 16, 3, 3, 3)), "convolves in time, which is not of this family"),
        ({"decoder.conv1.weight": torch.zeros(96, 16, 3, 3, 3)}, r"under Wan's names.*in place of Wan2\.1_VAE\.pth"),
        ({"decoder.conv_in.weight": torch.zeros(96, 16, 3, 3, 3)}, "under diffusers' names"),
        ({"decoder.layers.0.weight": torch.zeros(64, 16, 3, 3)}, "no decoder of latents that is known here"),
        ({"blocks.0.attn.q.weight": torch.zeros(4, 4)}, "no decoder of latents that is known here"),
    ],
)
def test_another_file_is_refused_with_what_it_is(tensors: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    for path in (tmp_path / "taew2_1.safetensors", tmp_path / "lighttaew2_1.pth"):
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
        with pytest.raises(ValueError, match=f"{path.name} holds .*{words}.*; expected taew2_1 or lighttaew2_1"):
            open_decoder(path)


def test_all_shapes_are_compared_before_a_weight_is_read(
    published_with: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    for name, tensor in (("decoder.16.conv.2.bias", torch.zeros(32)), ("decoder.23.weight", torch.zeros(3))):
        save_file({**weights, name: tensor}, tmp_path / "taew2_1.safetensors")
        with pytest.raises(ValueError, match=rf"taew2_1\.safetensors do not fit TinyDecoder: .*{name}"):
            load(open_part(published_with, "vae", decoder=tmp_path / "taew2_1.safetensors"))


def test_a_decoder_that_is_not_there_is_named(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file of weights at .*taew2_1\.pth"):
        open_part(published, "vae", decoder=tmp_path / "taew2_1.pth")


def test_a_decoder_of_wans_latents_is_refused_beside_another_vae(checkpoint: Path, published_with: Path) -> None:
    part = open_part(checkpoint, "vae", decoder=published_with / "taew2_1.safetensors")
    with pytest.raises(
        ValueError, match=r"taew2_1\.safetensors decodes latents of Wan's VAE, .*vae has those of light"
    ):
        load(part)


def test_one_decoder_is_found_and_several_are_refused(tmp_path: Path) -> None:
    assert find_decoder(tmp_path) is None
    for suffix in (".pth", ".safetensors"):  # of one decoder, either will do
        (tmp_path / f"taew2_1{suffix}").touch()
        assert find_decoder(tmp_path) == tmp_path / f"taew2_1{suffix}"
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/lighttaew2_1.pth").touch()
    with pytest.raises(ValueError, match=r"several decoders: .*taew2_1\.safetensors, .*lighttaew2_1\.pth; remove all"):
        find_decoder(tmp_path)


def test_a_checkpoint_is_described_and_packed_with_its_decoder(
    published_with: Path, weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "pack",
            str(published_with),
            str(tmp_path / "packed"),
            "--decoder",
            str(published_with / "taew2_1.safetensors"),
        ]
    )
    main(["inspect", str(tmp_path / "packed")])
    described = capsys.readouterr().out
    assert "decoder          9,844,611" in described
    assert f"decoder   {tmp_path / 'packed/decoder'}, tiny, takes normalised latents" in described
    codec = load(open_part(tmp_path / "packed", "vae")).codec
    assert isinstance(codec, TinyDecoderCodec)
    assert torch.equal(codec.decoder.state_dict()["decoder.22.weight"], weights["decoder.22.weight"].float())


@pytest.mark.parametrize("name", ["lightvaew2_1.safetensors", "lightvaew2_1.pth"])
def test_a_vae_of_a_quarter_of_the_widths_opens_as_wans(published: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(published, folder)
    (folder / VAE_FILE).unlink()
    with torch.device("meta"):
        shapes = {
            key: tuple(tensor.shape) for key, tensor in WanCodec(WanConfig(base_dim=24)).network.state_dict().items()
        }
    stored = vae_as_published({key: torch.randn(shape) * 0.01 for key, shape in shapes.items()})
    save_file(stored, folder / name) if name.endswith("safetensors") else torch.save(stored, folder / name)
    vae = load(open_part(folder, "vae"))
    assert torch.equal(vae.codec.network.decoder.conv_out.weight, stored["decoder.head.2.weight"])  # type: ignore[attr-defined]
    assert vae.codec.channels == 16


def test_the_command_and_the_worker_take_a_decoder(
    published: Path, published_with: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = published_with / "taew2_1.safetensors"
    assert __main__.parser().parse_args(["a.wav", "b.png", "c.mp4", "--decoder", str(path)]).decoder == path
    caplog.set_level(logging.INFO)
    with DeviceQueue() as queue:
        # One small size: the default ones take a CPU minutes.
        given = {"AVATAR_CHECKPOINT": str(published), "AVATAR_DECODER": str(path), "AVATAR_SIZES": "64x64"}
        worker = build(load_settings(VaeSettings, given), queue)
    assert worker.info().digest == open_part(published, "vae", decoder=path).digest()
    assert [
        (record.getMessage(), record.__dict__["latents"]) for record in caplog.records if hasattr(record, "latents")
    ] == [("a tiny decoder decodes", "normalised")]
