"""Tests of avatar.checkpoints.layouts: the published layout loads as it is, or is refused with a reason."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from avatar.audio.model import load as load_audio
from avatar.audio.wav2vec2 import Wav2Vec2
from avatar.checkpoints.layouts import AUDIO_FOLDER, VAE_FILE, open_part
from avatar.checkpoints.lora import LoraAdapter
from avatar.denoiser.config import base
from avatar.denoiser.model import Network
from avatar.denoiser.model import load as load_denoiser
from avatar.vae.vae import load as load_vae
from avatar.vae.wan import WanCodec, WanConfig
from tests.published import ADAPTER, small, write_audio

FIRST_SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    """A published folder that a test may damage."""
    return Path(shutil.copytree(published, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_folder_of_these_tests_has_the_published_names(published: Path) -> None:
    with torch.device("meta"):
        network, codec = Network(base()), WanCodec(WanConfig(), device="meta").network
    assert open_part(published, "denoiser").meta_tensors().keys() == network.state_dict().keys()
    assert open_part(published, "vae").meta_tensors().keys() == codec.state_dict().keys()
    assert len(load_file(published / ADAPTER)) == 896


def test_the_network_loads_the_published_tensors(published: Path) -> None:
    network = load_denoiser(open_part(published, "denoiser"), dtype=torch.bfloat16)
    assert network.config == small()
    assert network.config.schedule == pytest.approx((1, 0.857692, 0.602151, 0.008929, 0), abs=1e-6)
    stored = {k: v for path in published.glob("diffusion*.safetensors") for k, v in load_file(path).items()}
    torch.testing.assert_close(dict(network.state_dict()), stored, rtol=0, atol=0)


def test_the_adapter_changes_its_targets_only(published: Path) -> None:
    part = open_part(published, "denoiser", LoraAdapter(published / ADAPTER))
    merged, plain = (load_denoiser(each).state_dict() for each in (part, open_part(published, "denoiser")))
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert changed == part.adapter.pairs().keys() if part.adapter else False
    assert len(changed) == 448


def test_the_vae_loads_the_published_tensors(published: Path) -> None:
    vae = load_vae(open_part(published, "vae"))
    stored = torch.load(published / VAE_FILE, weights_only=True)
    assert torch.equal(vae.codec.network.decoder.conv_out.weight, stored["decoder.head.2.weight"])  # type: ignore[attr-defined]
    assert vae.config.picture.video_size((1280, 720)) == (704, 384)


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize(("prefix", "old"), [("wav2vec2.", True), ("wav2vec2.", False), ("", True), ("", False)])
def test_wav2vec2_loads_from_every_format_and_spelling(copy: Path, pickled: bool, prefix: str, old: bool) -> None:
    states = []
    for spelling in ((True, "wav2vec2.", True), (pickled, prefix, old)):
        shutil.rmtree(copy / AUDIO_FOLDER)
        torch.manual_seed(1)
        write_audio(copy / AUDIO_FOLDER, *spelling)
        encoder = load_audio(open_part(copy, "audio")).encoder
        assert isinstance(encoder, Wav2Vec2)
        states.append(encoder.hidden_states(torch.linspace(-1, 1, 4000).sin()))
    assert states[0].shape == (25, 12, 32)
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("vae", VAE_FILE, "no VAE in .*expected a file .*Wan2.1_VAE.pth"),
        ("audio", f"{AUDIO_FOLDER}/config.json", f"expected a file .*{AUDIO_FOLDER}/config.json"),
        ("audio", f"{AUDIO_FOLDER}/pytorch_model.bin", f"no weights in .*{AUDIO_FOLDER}"),
        ("denoiser", FIRST_SHARD, f"index.json names files that are not there: {FIRST_SHARD}"),
        (
            "denoiser",
            "config.json",
            "no checkpoint at .*expected a folder denoiser, or the config.json of WanModel_S2V",
        ),
    ],
)
def test_a_missing_file_is_named(copy: Path, name: str, file: str, words: str) -> None:
    (copy / file).unlink()
    with pytest.raises(ValueError, match=words):
        open_part(copy, name)


def test_missing_tensors_are_named(copy: Path) -> None:
    stored = torch.load(copy / VAE_FILE, weights_only=True)
    del stored["decoder.head.2.weight"], stored["encoder.conv1.weight"]
    torch.save(stored, copy / VAE_FILE)
    with pytest.raises(ValueError, match=rf"{VAE_FILE} do not fit AutoencoderKLWan: missing encoder\.conv_in\.weight"):
        load_vae(open_part(copy, "vae"))


def test_another_network_is_refused(copy: Path) -> None:
    edit_config(copy, _class_name="WanModel")
    with pytest.raises(ValueError, match=r"config\.json describes a WanModel, expected WanModel_S2V"):
        open_part(copy, "vae")


def test_levels_in_a_published_config_are_refused(copy: Path) -> None:
    edit_config(copy, schedule=[1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="sets schedule; published weights run only with the levels"):
        open_part(copy, "denoiser")


def test_every_part_has_the_block_length_that_the_denoiser_states(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "short")
    config = tmp_path / "short/denoiser/config.json"
    fields = json.loads(config.read_text())
    for latents in (1, 2):
        config.write_text(json.dumps({**fields, "num_frames_per_block": latents}))
        for name in ("audio", "denoiser", "vae"):
            part = open_part(tmp_path / "short", name)
            assert part.block_latents == latents
            assert part.digest() != open_part(checkpoint, name).digest()
    for stated in (0, 4, -1, 1.0, True, "3", None):
        config.write_text(json.dumps({**fields, "num_frames_per_block": stated}))
        with pytest.raises(ValueError, match=f"num_frames_per_block in .*denoiser is {stated!r}, expected 1 to 3"):
            open_part(tmp_path / "short", "vae")


def test_a_folder_without_a_denoiser_has_blocks_of_3(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint / "vae", tmp_path / "vae")
    assert open_part(tmp_path, "vae").digest() == open_part(checkpoint, "vae").digest()
