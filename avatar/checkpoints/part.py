"""One part of a checkpoint: the configuration and weights of one model, and their loading into a module.

    files --memory-map--> tensors --rename--> the module's names --merge LoRA--> --cast, copy--> the module

Tensors pass one at a time: beside the module's own weights, at most one of them is in memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from avatar.checkpoints.fields import Config, parse_fields
from avatar.checkpoints.files import CONFIG, read_config, read_meta_tensors, read_metadata, read_tensors, weight_files
from avatar.checkpoints.lora import MAX_LISTED, LoraAdapter, first_few, merge
from avatar.types import BLOCK_LATENTS

# Key of the files' metadata that names the adapter merged into the weights.
MERGED = "merged_adapter"
# Of larger files, `digest` hashes the beginning, which holds names and shapes, and a sample at every step.
WHOLE_BYTES = 16 << 20
BEGINNING_BYTES = 1 << 20
STEP_BYTES = 16 << 20
SAMPLE_BYTES = 16 << 10


@dataclass(frozen=True)
class Part:
    """The configuration and the files of one model; nothing is loaded yet.

    folder: for error messages.
    config: the fields of the model's own configuration.
    files: safetensors or pickles; each tensor is in one of them.
    rename: maps a tensor's name in the files to the module's, or to None if the module does not need it. None: the
        names are the module's.
    adapter: LoRA adapter to merge into the weights as they are read.
    tokenizer: the tokenizer's file, if the model reads text.
    decoder: of a VAE, the decoder that takes the place of its own.
    block_latents: latent frames of the checkpoint's blocks, which its denoiser states.
    """

    folder: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    rename: Callable[[str], str | None] | None = None
    adapter: LoraAdapter | None = None
    tokenizer: Path | None = None
    block_latents: int = BLOCK_LATENTS
    decoder: "Part | None" = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return a part in our layout, config.json and weights in one folder. ValueError if they are missing."""
        return cls(folder, read_config(folder), tuple(weight_files(folder)))

    def parse(self, config: type[Config]) -> Config:
        """Return the configuration as this dataclass. ValueError if fields are missing or invalid."""
        with self.naming_config():
            return parse_fields(config, self.config)

    @contextmanager
    def naming_config(self) -> Iterator[None]:
        """Put the part's configuration in front of the message of an error in it, as a ValueError."""
        try:
            yield
        except (TypeError, ValueError) as error:
            file = self.folder / CONFIG  # which some published parts have not
            raise ValueError(f"the configuration in {file if file.is_file() else self.folder}: {error}") from error

    def meta_tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors' shapes and dtypes, as meta tensors by the module's names.

        ValueError if a file is damaged or repeats a tensor, or the adapter does not match.
        """
        found: dict[str, Tensor] = {}
        for path in self.files:
            for name, tensor in self._renamed(read_meta_tensors(path)):
                if name in found:
                    raise ValueError(f"{path} holds {name}, which an earlier file holds too")
                found[name] = tensor
        if self.adapter is not None:
            merged, base, path = self.merged_adapter(), self.adapter.base, self.adapter.path
            if base and merged != base:
                found_here = f"merged with {merged}" if merged else "merged with none"
                raise ValueError(
                    f"{path} was trained on weights merged with {base}; those in {self.folder} are {found_here}"
                )
            if merged and not base:
                raise ValueError(f"weights in {self.folder} are merged with {merged} already, cannot add {path}")
            self.adapter.check(found)
        return found

    def tensors(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors by the module's names: as stored, or merged with the adapter on the device, in float32."""
        pairs = self.adapter.pairs() if self.adapter else {}
        for path in self.files:
            for name, tensor in self._renamed(read_tensors(path)):
                if self.adapter is not None and name in pairs:
                    pair = pairs[name]
                    yield name, merge(tensor, pair, self.adapter.scale(name, len(pair["A"])), device)
                else:
                    yield name, tensor

    def merged_adapter(self) -> str | None:
        """Return the name of the adapter that the stored weights are merged with already."""
        return read_metadata(self.files[0]).get(MERGED)

    def digest(self) -> str:
        """Return 16 hexadecimal digits that identify the part: sha256 of configuration, files and what belongs to it.

        Of a file over WHOLE_BYTES only size, beginning and samples are hashed, so that a start does not read gigabytes.
        Every large matrix is sampled, so other weights of the same shapes get another digest; a change of single
        numbers may go unnoticed.
        """
        state = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        if self.block_latents != BLOCK_LATENTS:  # a part of blocks of 3 has the digest that it always had
            state.update(str(self.block_latents).encode())
        if self.adapter is not None and self.adapter.peft is None:
            state.update(str(self.adapter.file_alpha).encode())
        for path in (*self.files, *(self.adapter.files if self.adapter else ())):
            state.update(_file_digest(path))
        if self.tokenizer is not None:
            state.update(self.tokenizer.read_bytes())
        if self.decoder is not None:
            state.update(self.decoder.digest().encode())
        return state.hexdigest()[:16]

    def file_of(self, name: str) -> str:
        """Return the file that holds a tensor, or the folder if none does; for error messages."""
        if len(self.files) == 1:
            return str(self.files[0])
        for path in self.files:
            if any(found == name for found, _ in self._renamed(read_meta_tensors(path))):
                return str(path)
        return str(self.folder)

    def _renamed(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for stored, tensor in tensors:
            name = self.rename(stored) if self.rename else stored
            if name is not None:
                yield name, tensor


def load_weights(module: nn.Module, part: Part, device: torch.device | str | None = None) -> None:
    """Fill every parameter and buffer of the module from the part, cast to the module's dtypes.

    A module on the meta device is allocated on `device` once it fits the part; without a device it is only compared.
    ValueError names the files and the first few tensors that are missing, unexpected, of another shape, or integers in
    place of floating-point numbers; it is raised before any weight is read. It also names a tensor that holds NaN or
    infinity, when it is read.
    """
    target, found = module.state_dict(), part.meta_tensors()
    problems = {name: f"missing {name}" for name in target if name not in found}
    problems |= {name: f"unexpected {name}" for name in found if name not in target}
    problems |= {
        name: f"{name} has shape {tuple(found[name].shape)}, expected {tuple(target[name].shape)}"
        for name in target
        if name in found and found[name].shape != target[name].shape
    }
    problems |= {
        name: f"{name} is {dtype_name(found[name].dtype)}, expected a floating-point dtype"
        for name in target
        if name in found and target[name].is_floating_point() and not found[name].is_floating_point()
    }
    if problems:
        places = sorted({part.file_of(name) for name in list(problems)[:MAX_LISTED]})
        wrong = first_few([*problems.values()])
        raise ValueError(f"weights in {', '.join(places)} do not fit {type(module).__name__}: {wrong}")
    if device is not None:
        # As Module.to_empty, whose torch.empty_like imports sympy, for half a CPU-second of a worker's start.
        target = module._apply(  # type: ignore[no-untyped-call]
            lambda each: torch.empty(each.shape, dtype=each.dtype, device=device)
        ).state_dict()
    device = next((tensor.device for tensor in target.values()), torch.device("cpu"))
    if device.type == "meta":
        return
    for name, tensor in part.tensors(device):
        target[name].copy_(tensor)
        del tensor  # before the next one is made
        if not is_finite(target[name]):
            raise ValueError(
                f"weights in {part.file_of(name)}: {name} holds NaN or infinity in {dtype_name(target[name].dtype)}, "
                "expected finite numbers; download the file again, or choose another dtype"
            )


def is_finite(tensor: Tensor) -> bool:
    """Return True if a tensor holds neither NaN nor infinity, by one pass over it, without memory of its size."""
    if not tensor.is_floating_point():
        return True
    # Finite numbers may add up to infinity, so only then each of them is looked at.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _file_digest(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").digest()
        state = hashlib.sha256(str(size).encode())
        state.update(file.read(BEGINNING_BYTES))
        for start in (*range(STEP_BYTES, size, STEP_BYTES), size - SAMPLE_BYTES):
            file.seek(start)
            state.update(file.read(SAMPLE_BYTES))
    return state.digest()
