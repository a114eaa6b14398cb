"""A checkpoint: a folder with one folder per part (`audio`, `denoiser`, `vae`), each `config.json` + safetensors.

Tensors are checked by name and shape against the module that will hold them; nothing in a checkpoint can run code.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PICKLED = (".pth", ".bin")


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of the folder's config.json. ValueError if it is missing or is not a JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"no checkpoint at {folder}: expected a file {path}")
    return _read_object(path)


def load_weights(module: nn.Module, folder: Path) -> None:
    """Fill every parameter and buffer of the module from the folder's safetensors, cast to the module's own dtypes.

    ValueError names the file and the first few tensors that are missing, surplus or of another shape.
    """
    target = module.state_dict()
    found: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        for name, tensor in read_tensors(path):
            found[name] = tuple(tensor.shape)
            if name in target and target[name].shape == tensor.shape:
                target[name].copy_(tensor)
    problems = [
        *(f"missing {name}" for name in target if name not in found),
        *(f"unexpected {name}" for name in found if name not in target),
        *(
            f"{name} has shape {found[name]}, expected {tuple(target[name].shape)}"
            for name in target
            if name in found and found[name] != tuple(target[name].shape)
        ),
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"weights in {folder} do not fit {type(module).__name__}: {'; '.join(problems[:5])}{more}")


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors: the one file, or the shards that its index names. ValueError if there are none."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    for index in sorted(folder.glob("*.safetensors.index.json")):
        files = _read_object(index).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"{index} has no `weight_map` from tensors to files")
        names = set(files.values())
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise ValueError(f"{index} names files that are not there: {', '.join(missing[:5])}")
        return [folder / name for name in sorted(names)]
    raise ValueError(f"no weights in {folder}: expected {WEIGHTS}, or shards with an index")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, expected an object")
    return fields


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in a .safetensors, .pth or .bin file, one at a time.

    The file is mapped: a tensor's bytes are read when it is used. ValueError if the file is damaged, or holds anything
    but tensors; nothing in it is run.
    """
    if path.suffix in PICKLED:
        yield from _unpickled(path).items()
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is cut short: {error}") from error


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote."""
    try:
        # Files older than torch 1.6 are no archives, and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # Damaged and malicious pickles fail in many ways: UnpicklingError, RuntimeError, EOFError, KeyError, ...
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a file of tensors, or is cut short or not safe to read: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected names and their tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.is_sparse or tensor.is_meta:
            raise ValueError(f"{path} holds something that is not a tensor: {name!r} is a {type(tensor).__name__}")
    return content


def save(folder: Path, config: dict[str, Any], module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors, floating point tensors as `dtype` if it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).detach().contiguous()
        for name, tensor in module.state_dict().items()
    }
    partial = folder / f"{WEIGHTS}.partial"
    save_file(tensors, partial)
    partial.chmod(0o644)  # it is written for its owner alone, and services may run as another user
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder / WEIGHTS)


def digest(folder: Path) -> str:
    """16 hexadecimal digits that identify a part: sha256 of its config and weights."""
    state = hashlib.sha256((folder / CONFIG).read_bytes())
    for path in weight_files(folder):
        with path.open("rb") as file:
            state.update(hashlib.file_digest(file, "sha256").digest())
    return state.hexdigest()[:16]
