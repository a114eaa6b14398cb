"""The files of a checkpoint: config.json, and tensors in safetensors files and pickles.

Nothing in a checkpoint can run code. Tensors are memory-mapped: their bytes are read when they are used. Meta tensors
(shape and dtype on the meta device) take neither memory nor a mapping, however large the file.
"""

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG = "config.json"
# The network's class in the config.json of published checkpoints, and of ours.
CLASS_NAME = "WanModel_S2V"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
# Names of the file of weights in a folder; the index of shards is named after it.
WEIGHT_NAMES = (WEIGHTS, "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
PICKLED = (".pth", ".bin")
# Bytes that tell what a file is, and how much of a text is quoted.
HEAD_BYTES, SHOWN = 512, 80
# safetensors' own limit.
MAX_HEADER_BYTES = 100_000_000
# Bytes of tensors in each file of `save_shards`.
SHARD_BYTES = 4 << 30
# dtypes under safetensors' names.
SAFETENSORS_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
}

# dtypes in which models are served, under the names of flags and settings.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# CPU capabilities (x86-64, ARM), any of which means native bfloat16 arithmetic.
BFLOAT16_INSTRUCTIONS = ("avx512_bw", "amx_bf16", "bf16")


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if the device has instructions for this dtype.

    Without them a CPU's bfloat16 is 4 (matrices) to 70 (convolutions) times slower than its float32.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the fields of the folder's config.json. ValueError if it is missing or not a JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"no checkpoint at {folder}: expected a file {path}")
    return read_object(path)


def weight_files(folder: Path) -> list[Path]:
    """Return the folder's files of weights: one file, or the shards of its index. ValueError if there are none."""
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shard_files(index)
    raise ValueError(f"no weights in {folder}: expected {WEIGHTS}, or shards with an index")


def _shard_files(index: Path) -> list[Path]:
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{index} has no `weight_map` from tensors to files")
    names = sorted(set(files.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index} names files that are not there: {', '.join(missing[:5])}")
    return [index.parent / name for name in names]


def read_object(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON object in a file. ValueError if the file holds anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} {foreign_content(path) or f'is not JSON: {error}'}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for a configuration") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, expected an object")
    return fields


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of everything in a .safetensors, .pth or .bin file.

    The file is memory-mapped: a tensor's bytes are read when it is used. ValueError if the file is damaged, or holds
    anything but tensors; nothing in it is executed.
    """
    if path.suffix in PICKLED:
        yield from _load_pickle(path, "cpu").items()
        return
    with _open_safetensors(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            yield name, file.get_tensor(name)


def read_meta_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and meta tensor (shape and dtype) of everything in a file. ValueError as in `read_tensors`."""
    if path.suffix in PICKLED:
        yield from _load_pickle(path, "meta").items()
        return
    # Opened for torch, the file is mapped writable, which the kernel refuses if it exceeds the memory.
    with _open_safetensors(path, "np") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            entry = file.get_slice(name)
            dtype = entry.get_dtype()
            if dtype not in SAFETENSORS_DTYPES:
                raise ValueError(f"{path} holds {name} as {dtype}, expected one of {', '.join(SAFETENSORS_DTYPES)}")
            yield name, torch.empty(entry.get_shape(), dtype=SAFETENSORS_DTYPES[dtype], device="meta")


@contextmanager
def _open_safetensors(path: Path, framework: str) -> Iterator[Any]:
    """Open a safetensors file. ValueError if it is damaged, or something else."""
    _check_is_file(path)
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = foreign_content(path) or f"is not a safetensors file, or is cut short: {error}"
        raise ValueError(f"{path} {reason}") from error


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file of weights")
    if not path.exists():
        raise ValueError(f"no file of weights at {path}")


def foreign_content(path: Path) -> str:
    """Return what a file holds that programs leave in the place of weights, and what to do; empty if it is unknown.

    A sentence without its subject.
    """
    again = "copy or download it again"
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    text = head.decode("utf-8-sig", errors="replace").strip()
    lower = text.lower()
    if not text:
        return f"is empty; {again}"
    if text.startswith("version https://git-lfs"):
        found = re.search(r"^size (\d+)", text, re.MULTILINE)
        size = f" of {found[1]} bytes" if found else ""
        return f"is a Git LFS pointer and not the file{size} that it stands for; run `git lfs pull` in its repository"
    if lower.startswith(("<!doctype html", "<html", "<head", "<body")):
        return (
            "is a web page: a server sent a log-in or an overview; download the file itself, with access if it needs it"
        )
    if lower.startswith("<?xml"):
        return f"is an XML document, which servers send as an error ({text[:SHOWN]!r}); {again}"
    if head.startswith(b"PK\x03\x04") and path.suffix not in PICKLED:
        return "is a zip archive: unpack it, or, if torch.save wrote it, rename it so that it ends in .bin"
    if head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"BZh", b"\xfd7zXZ", b"Rar!")):
        return "is a compressed archive: unpack it"
    if head.startswith(b"GGUF"):
        return "is a GGUF file, which is not supported; download the safetensors files"
    if head[8:9] == b"{" and path.suffix in PICKLED:
        return "is a safetensors file: rename it so that it ends in .safetensors"
    if head[8:9] == b"{":
        return _missing_bytes(path, int.from_bytes(head[:8], "little"))
    if path.suffix != ".json" and text.isprintable() and text.isascii():
        return f"is text, which servers send as an error ({text[:SHOWN]!r}); {again}"
    return ""


def _missing_bytes(path: Path, header_bytes: int) -> str:
    """Return how much of a safetensors file is missing, by its header; empty if it is complete or damaged."""
    expected = 8 + header_bytes
    if header_bytes > MAX_HEADER_BYTES:
        return ""
    with path.open("rb") as file:
        header = file.read(expected)[8:]
    if len(header) == header_bytes:
        try:
            tensors = json.loads(header)
            expected += max(entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__")
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
            return ""
    found = path.stat().st_size
    return f"is cut short: it has {found} of {expected} bytes; copy or download it again" if found < expected else ""


def _load_pickle(path: Path, device: str) -> dict[str, Tensor]:
    """Load the tensors of a file written by torch.save: memory-mapped on the CPU, or meta tensors."""
    _check_is_file(path)
    try:
        # Files older than torch 1.6 are not zip archives and cannot be mapped.
        mapped = device == "cpu" and zipfile.is_zipfile(path)
        content = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:
        # Damaged and malicious pickles raise UnpicklingError, RuntimeError, EOFError, KeyError and others.
        first_line = str(error).partition("\n")[0]
        unknown = f"is not a file of tensors, or is cut short or not safe to read: {first_line}"
        raise ValueError(f"{path} {foreign_content(path) or unknown}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected names and their tensors")
    for name, tensor in content.items():
        is_tensor = isinstance(tensor, Tensor) and not tensor.is_sparse and tensor.device.type == device
        if not isinstance(name, str) or not is_tensor:
            raise ValueError(f"{path} holds something that is not a tensor: {name!r} is a {type(tensor).__name__}")
    return content


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty for pickles."""
    if path.suffix in PICKLED:
        return {}
    with _open_safetensors(path, "np") as file:
        metadata: dict[str, str] = file.metadata() or {}
    return metadata


def save(
    folder: Path,
    config: Mapping[str, Any],
    module: nn.Module,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write config.json and model.safetensors, floating point tensors as `dtype` if it is given.

    The weights are renamed into place last, so a failed save leaves the old checkpoint. metadata: of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: _to_stored(tensor.detach(), dtype) for name, tensor in module.state_dict().items()}
    partial = folder / f"{WEIGHTS}.partial"
    _save_file(tensors, partial, metadata)
    write_json(folder / CONFIG, config)
    partial.rename(folder / WEIGHTS)


def save_shards(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write config.json and tensors in files of about SHARD_BYTES; one file at a time is in memory.

    The index is written last: without it a folder has no weights. metadata: written into every file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    for number, shard in enumerate(_shards(tensors, dtype), 1):
        file = f"model-{number:05}.safetensors"
        _save_file(shard, folder / file, metadata)
        where.update(dict.fromkeys(shard, file))
    write_json(folder / CONFIG, config)
    write_json(folder / f"{WEIGHTS}.index.json", {"weight_map": where})


def _shards(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        shard[name] = _to_stored(tensor, dtype)
        num_bytes += shard[name].nbytes
        if num_bytes >= SHARD_BYTES:
            yield shard
            shard, num_bytes = {}, 0
    if shard:
        yield shard


def _to_stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()


def _save_file(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    try:
        save_file(tensors, path, {"format": "pt", **(metadata or {})})
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot write {path}: {error}") from error
    path.chmod(0o644)  # safetensors writes 0600, and services may run as another user


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
