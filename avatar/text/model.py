"""What a checkpoint has for prompts, in our layout or as the public weights are laid out.

CHECKPOINT/text/                                  config.json, model.safetensors, tokenizer.json
CHECKPOINT/models_t5_umt5-xxl-enc-bf16.pth        beside google/umt5-xxl/tokenizer.json
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from avatar.checkpoint import read_config, read_tensors, weight_files
from avatar.text.umt5 import TOKENIZER, TextConfig, TextEncoder, build, module_name, sizes

FOLDER = "text"
PUBLIC_WEIGHTS = "models_t5_umt5-xxl-enc-bf16.pth"
PUBLIC_TOKENIZER = Path("google") / "umt5-xxl" / TOKENIZER


@dataclass(frozen=True)
class TextFiles:
    """What a text encoder is read from."""

    config: TextConfig
    weights: list[Path]
    tokenizer: Path

    def digest(self) -> str:
        """16 hexadecimal digits that identify the encoder: sha256 of its config, weights and tokenizer."""
        state = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for path in (*self.weights, self.tokenizer):
            with path.open("rb") as file:
                state.update(hashlib.file_digest(file, "sha256").digest())
        return state.hexdigest()[:16]


def knows_text(checkpoint: Path) -> bool:
    """Whether the checkpoint has a text encoder: prompts are refused where it has none."""
    return (checkpoint / FOLDER).is_dir() or (checkpoint / PUBLIC_WEIGHTS).is_file()


def find(checkpoint: Path) -> TextFiles:
    """The files of the checkpoint's text encoder. ValueError if it has none, or a file is missing or not what it should
    be."""
    if not knows_text(checkpoint):
        raise ValueError(f"{checkpoint} knows no text: expected a folder {FOLDER}, or {PUBLIC_WEIGHTS}")
    folder, public = checkpoint / FOLDER, checkpoint / PUBLIC_WEIGHTS
    if folder.is_dir():
        files = TextFiles(_config(folder), weight_files(folder), folder / TOKENIZER)
    else:
        files = TextFiles(_public_config(public), [public], checkpoint / PUBLIC_TOKENIZER)
    if not files.tokenizer.is_file():
        raise ValueError(f"no tokenizer for the text encoder of {checkpoint}: expected a file {files.tokenizer}")
    return files


def load(files: TextFiles, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> TextEncoder:
    """The text encoder, ready to serve. ValueError if its files are not what they should be."""
    try:
        tokenizer = Tokenizer.from_file(str(files.tokenizer))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{files.tokenizer} is not a tokenizer: {error}") from error
    network = build(files.config, dtype)
    # One tensor at a time: what is not cast stays a part of the mapped file.
    tensors = {
        module_name(name): tensor.to(device, dtype) for path in files.weights for name, tensor in read_tensors(path)
    }
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{files.weights[0]} does not fit: {' '.join(str(error).split())}") from error
    try:
        return TextEncoder(network, files.config, tokenizer)
    except ValueError as error:
        raise ValueError(f"{files.tokenizer}: {error}") from error


def embed(checkpoint: Path, prompt: str) -> Tensor:
    """The embedding (n, d) of one prompt, for programs that embed but one. ValueError as `find` and `load`."""
    return load(find(checkpoint)).embed(prompt)


def _config(folder: Path) -> TextConfig:
    fields = read_config(folder)
    try:
        return TextConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config of {folder}: {error}") from error


def _public_config(weights: Path) -> TextConfig:
    """The public weights have no config.json; their sizes are those of their tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors(weights)}
    try:
        return TextConfig(network=sizes(shapes))
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
