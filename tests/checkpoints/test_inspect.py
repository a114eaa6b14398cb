"""Tests of avatar.checkpoints.inspect."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from avatar import __main__
from avatar.audio.model import load as load_audio
from avatar.checkpoints import files as checkpoints
from avatar.checkpoints.inspect import denoiser_memory, inspect, main, pack
from avatar.checkpoints.layouts import PARTS, VAE_FILE, open_part
from avatar.checkpoints.lora import LoraAdapter
from avatar.checkpoints.part import Part
from avatar.denoiser.config import base
from avatar.denoiser.model import Network
from avatar.denoiser.model import load as load_denoiser
from avatar.vae.vae import load as load_vae
from tests.published import ADAPTER


def gigabytes(num_bytes: int) -> float:
    return num_bytes / 1e9


@pytest.mark.parametrize(
    ("height", "width", "ring", "conditions"), [(48, 88, 10.38, 2.16), (88, 48, 10.38, 2.16), (50, 90, 11.06, 2.28)]
)
def test_memory_of_the_public_network_follows_from_its_sizes(
    height: int, width: int, ring: float, conditions: float
) -> None:
    """20,480 bytes a token, layer and bfloat16 pair; 4 blocks of 3 frames, conditions of 2.5 frames."""
    with torch.device("meta"):
        network = Network(base()).bfloat16()
    weights, window, float8_window, picture, shared = denoiser_memory(network, height, width).values()
    # The cache also keeps the reference's keys without RoPE, for the channels that depend on time: 44 of 128.
    unrotated = (height // 2) * (width // 2) * 40 * 44 * 2 * 40
    assert gigabytes(weights) == pytest.approx(32.59, abs=0.005)
    assert gigabytes(window) == pytest.approx(ring, abs=0.005)
    scales = 2 * 40 * 4 * 40 * 2  # for keys and values of each layer, block and head
    assert float8_window == window / 2 + scales
    assert gigabytes(picture - unrotated) == pytest.approx(conditions, abs=0.005)
    sink_gb = gigabytes(picture - unrotated)
    assert gigabytes(shared) == pytest.approx(sink_gb + 2 * 0.42, abs=0.005), "a sink, and the text of two versions"


def test_a_checkpoint_is_described_without_reading_its_tensors(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Part, "tensors", None)
    text = "\n".join(inspect(published, LoraAdapter(published / ADAPTER), (704, 384)))
    for line in (
        f"{published}: as published, every name and shape in place",
        "728,689    1.46 MB  bfloat16",
        "for 448 weights, rank 4, scale 16",
        "40 layers of width 32",
        "decoder   the VAE's own",
        "levels    4: sigma 1, 0.857692, 0.602151, 0.00892857, 0",
        "any of at most 288,000 pixels whose sides are multiples of 64",
        "served    704x384, 640x448, 512x512, 448x640, 384x704; AVATAR_SIZES chooses others",
        "attention flash on this machine's cpu",
        "at 704x384 in bfloat16",
    ):
        assert line in text
    text = "\n".join(inspect(published, LoraAdapter(published / ADAPTER), (704, 384), levels=2))
    assert "levels    2 of the 4 trained: sigma 1, 0.602151, 0\n" in text


def test_our_layout_is_described_too(checkpoint: Path) -> None:
    text = "\n".join(inspect(checkpoint, dtype=torch.float16))
    assert f"{checkpoint}: in our layout" in text
    assert "64x64 only" in text
    assert "at 64x64 in float16" in text


def test_inputs_of_the_network_are_listed(checkpoint: Path, listening_checkpoint: Path) -> None:
    assert "inputs    audio" in inspect(checkpoint)
    assert "inputs    audio, heard, face_motion" in inspect(listening_checkpoint)


def test_an_invalid_checkpoint_ends_the_program_with_the_reason(published: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(published, tmp_path / "copy")
    stored = torch.load(folder / VAE_FILE, weights_only=True)
    del stored["decoder.head.2.bias"]
    torch.save(stored, folder / VAE_FILE)
    with pytest.raises(SystemExit, match=rf"error: .*{VAE_FILE} do not fit .*missing decoder\.conv_out\.bias"):
        main(["inspect", str(folder)])


def test_models_that_do_not_fit_each_other_are_refused(published: Path, tmp_path: Path, checkpoint: Path) -> None:
    for name in ("denoiser", "vae"):
        shutil.copytree(checkpoint / name, tmp_path / name)
    pack(published, tmp_path / "packed")
    shutil.copytree(tmp_path / "packed" / "audio", tmp_path / "audio")
    with pytest.raises(ValueError, match=r"expects audio features of \(3, 32\) .* the encoder makes \(25, 32\)"):
        list(inspect(tmp_path))


def test_a_packed_checkpoint_loads_to_the_same_weights(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 500_000)
    out, adapter = tmp_path / "out", published / ADAPTER
    main(["pack", str(published), str(out), "--adapter", str(adapter)])
    assert len(list((out / "denoiser").glob("*.safetensors"))) > 2
    parts = {name: (open_part(published, name, LoraAdapter(adapter)), open_part(out, name)) for name in PARTS}
    networks = [load_denoiser(part, dtype=torch.bfloat16) for part in parts["denoiser"]]
    assert networks[0].config == networks[1].config
    vaes = [load_vae(part) for part in parts["vae"]]
    assert vaes[0].config == vaes[1].config
    encoders = [load_audio(part).encoder for part in parts["audio"]]
    for one, other in (
        [network.state_dict() for network in networks],
        [vae.codec.network.state_dict() for vae in vaes],  # type: ignore[attr-defined]
        [encoder.network.state_dict() for encoder in encoders],  # type: ignore[attr-defined]
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    main(["inspect", str(out)])
    assert f"adapter   {ADAPTER} is merged into the weights" in capsys.readouterr().out


def test_packing_in_another_dtype_rounds_the_merge_once(published: Path, tmp_path: Path) -> None:
    pack(published, tmp_path / "out", LoraAdapter(published / ADAPTER), torch.float32)
    packed = dict(open_part(tmp_path / "out", "denoiser").tensors())
    assert {tensor.dtype for tensor in packed.values()} == {torch.float32}
    merged = load_denoiser(open_part(published, "denoiser", LoraAdapter(published / ADAPTER))).state_dict()
    assert all(torch.equal(packed[name], merged[name]) for name in merged)


def test_an_adapter_is_not_merged_twice(published: Path, tmp_path: Path) -> None:
    adapter = LoraAdapter(published / ADAPTER)
    pack(published, tmp_path / "out", adapter)
    with pytest.raises(ValueError, match=f"are merged with {ADAPTER} already"):
        load_denoiser(open_part(tmp_path / "out", "denoiser", adapter))


def test_packing_refuses_an_existing_folder(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        pack(published, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["704", "704x", "axb", "704x384x2"])
def test_a_size_is_width_and_height(text: str, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(published), "--size", text])
    assert "is not a size, expected WIDTHxHEIGHT" in capsys.readouterr().err


def test_both_are_commands_of_the_program(
    published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["avatar", "inspect", str(published)])
    __main__.main()
    assert "as published" in capsys.readouterr().out
    assert json.loads((published / "config.json").read_text())["_class_name"] == "WanModel_S2V"
