import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from avatar.audio.whisper import Whisper, WhisperConfig
from avatar.checkpoints.part import Part
from training.whisper import ENCODER_NAMES, LAYER_NAMES, convert, copy_folder, read_encoder, state_dict_of

DTYPES = {"float16": 4, "int16": 2}


def ctranslate2(variables: dict[str, NDArray[np.generic]], specification: str = "WhisperSpec") -> bytes:
    """Return a model file in CTranslate2's format."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", 6) + text(specification) + struct.pack("<II", 3, len(variables))
    for name, values in variables.items():
        data += text(name) + struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        data += struct.pack("<BI", DTYPES[values.dtype.name], values.nbytes) + values.tobytes()
    return data + struct.pack("<I", 0)


def variables_of(encoder: Whisper) -> dict[str, NDArray[np.generic]]:
    state = {name: tensor.half().numpy() for name, tensor in encoder.network.state_dict().items()}
    variables = {theirs: state[ours] for theirs, ours in ENCODER_NAMES.items()}
    for i in range(encoder.num_states - 1):
        mine = f"layers.{i}"
        variables |= {f"layer_{i}/{theirs}": state[f"{mine}.{ours}"] for theirs, ours in LAYER_NAMES.items()}
        keys_bias = np.zeros(encoder.width, np.float16)
        queries, _, values = (f"{mine}.self_attn.{name}_proj" for name in "qkv")
        variables[f"layer_{i}/self_attention/linear_0/weight"] = np.concatenate(
            [state[f"{mine}.self_attn.{name}_proj.weight"] for name in "qkv"]
        )
        variables[f"layer_{i}/self_attention/linear_0/bias"] = np.concatenate(
            [state[f"{queries}.bias"], keys_bias, state[f"{values}.bias"]]
        )
    variables["num_heads"] = np.array(encoder.network.config.encoder_attention_heads, np.int16)
    return {f"encoder/{name}": values for name, values in variables.items()}


@pytest.fixture
def encoder() -> Whisper:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    return Whisper(WhisperConfig(network={**sizes, "num_mel_bins": 16, "max_source_positions": 150}))


def test_conversion_keeps_sizes_and_every_tensor(encoder: Whisper, tmp_path: Path) -> None:
    variables = {**variables_of(encoder), "decoder/scale": np.zeros((), np.int16)}
    (tmp_path / "model.bin").write_bytes(ctranslate2(variables))
    convert(tmp_path / "model.bin", tmp_path / "audio")
    converted = Whisper.load(Part.read(tmp_path / "audio"))
    assert converted.config == encoder.config
    state = converted.network.state_dict()
    for name, tensor in encoder.network.state_dict().items():
        assert torch.equal(state[name], tensor.half().float())


def test_a_copied_folder_has_another_window_and_the_same_weights(encoder: Whisper, tmp_path: Path) -> None:
    encoder.save(tmp_path / "audio")
    copy_folder(tmp_path / "audio", tmp_path / "short", window_frames=50, right_frames=5)
    copied = Whisper.load(replace(Part.read(tmp_path / "short"), block_latents=1))
    assert (copied.config.window_frames, copied.config.right_frames) == (50, 5)
    assert copied.config.network == encoder.config.network
    state = copied.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in encoder.network.state_dict().items())
    with pytest.raises(ValueError, match="window_frames must be 14 to 150"):
        copy_folder(tmp_path / "audio", tmp_path / "shorter", window_frames=10, right_frames=5)
    assert not (tmp_path / "shorter").exists()


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="WhisperSpec; got version 6 'TransformerSpec'"):
        read_encoder(ctranslate2({}, "TransformerSpec"))


def test_a_bias_on_the_keys_is_refused(encoder: Whisper) -> None:
    variables = {name.removeprefix("encoder/"): values for name, values in variables_of(encoder).items()}
    variables["layer_1/self_attention/linear_0/bias"] = np.ones(3 * encoder.width, np.float16)
    with pytest.raises(ValueError, match="layer 1: the bias of the keys must be zero"):
        state_dict_of(variables, 2)
