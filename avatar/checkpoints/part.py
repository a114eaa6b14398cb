"""One model of a checkpoint, on its way from files to a module.

    files --map--> tensors --rename--> the module's names --merge the adapter--> --cast, copy--> the module

Tensors pass one at a time: beside the module's own weights, no more than one of them is ever in memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from avatar.checkpoints.files import read_config, read_metadata, read_outlines, read_tensors, weight_files
from avatar.checkpoints.lora import FEW, LoraAdapter, first_few, merge

# The metadata of weights that an adapter has been merged into.
MERGED = "merged_adapter"
# Of larger files `digest` takes the beginning, which holds names and shapes, and a sample at every step.
WHOLE_BYTES = 16 << 20
BEGINNING_BYTES = 1 << 20
STEP_BYTES = 16 << 20
SAMPLE_BYTES = 16 << 10


def unchanged(name: str) -> str | None:
    return name


@dataclass(frozen=True)
class Part:
    """Where a model's configuration and weights are; nothing is loaded.

    folder: what messages name.
    config: the fields of the model's own configuration.
    files: safetensors or pickles that hold each tensor once.
    rename: from a tensor's name in the files to the module's, None for what is not needed.
    adapter: is merged into the weights as they are read.
    tokenizer: file that makes tokens of text, where the model reads them.
    """

    folder: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    rename: Callable[[str], str | None] = unchanged
    adapter: LoraAdapter | None = None
    tokenizer: Path | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """A part in our layout: config.json and its weights in one folder. ValueError if they are not there."""
        return cls(folder, read_config(folder), tuple(weight_files(folder)))

    def outline(self) -> dict[str, Tensor]:
        """Shapes and types of the stored tensors, by the module's names.

        ValueError if a file is damaged or repeats a tensor, or the adapter does not match.
        """
        found: dict[str, Tensor] = {}
        for path in self.files:
            for name, tensor in self._renamed(read_outlines(path)):
                if name in found:
                    raise ValueError(f"{path} holds {name}, which was there before")
                found[name] = tensor
        if self.adapter is not None:
            self._check_unmerged(self.adapter)
            self.adapter.check(found)
        return found

    def tensors(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """The module's names and tensors, one at a time: as they are stored, or merged on the device in float32."""
        pairs = self.adapter.pairs() if self.adapter else {}
        for path in self.files:
            for name, tensor in self._renamed(read_tensors(path)):
                if self.adapter is not None and name in pairs:
                    yield name, merge(tensor, pairs[name], self.adapter.alpha, device)
                else:
                    yield name, tensor

    def merged_adapter(self) -> str | None:
        """The adapter that the stored weights have been merged with."""
        return read_metadata(self.files[0]).get(MERGED)

    def digest(self) -> str:
        """16 hexadecimal digits that identify the part: sha256 of its configuration, adapter, tokenizer and files.

        For a file over WHOLE_BYTES its size, beginning and samples stand, because nobody should read gigabytes to
        start. Every large matrix is sampled, so that other weights of the same shapes have another digest; a change of
        single numbers may not show.
        """
        state = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        if self.adapter is not None:
            state.update(str(self.adapter.alpha).encode())
        for path in (*self.files, *((self.adapter.path,) if self.adapter else ())):
            state.update(_file_digest(path))
        if self.tokenizer is not None:
            state.update(self.tokenizer.read_bytes())
        return state.hexdigest()[:16]

    def place(self, name: str) -> str:
        """The file that holds a tensor, for messages; where there is no such tensor, where it was looked for."""
        if len(self.files) == 1:
            return str(self.files[0])
        holders = (path for path in self.files if any(found == name for found, _ in self._renamed(read_outlines(path))))
        return str(next(holders, self.folder))

    def _renamed(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for stored, tensor in tensors:
            name = self.rename(stored)
            if name is not None:
                yield name, tensor

    def _check_unmerged(self, adapter: LoraAdapter) -> None:
        if merged := self.merged_adapter():
            raise ValueError(f"weights in {self.folder} are merged with {merged} already, cannot add {adapter.path}")


def load_weights(module: nn.Module, part: Part) -> None:
    """Fill every parameter and buffer of the module from the part, cast to the module's own types.

    A module on the meta device is only compared. ValueError names the place and the first few tensors that are missing,
    surplus or of another shape, before anything is read.
    """
    target, found = module.state_dict(), part.outline()
    problems = {name: f"missing {name}" for name in target if name not in found}
    problems |= {name: f"unexpected {name}" for name in found if name not in target}
    problems |= {
        name: f"{name} has shape {tuple(found[name].shape)}, expected {tuple(target[name].shape)}"
        for name in target
        if name in found and found[name].shape != target[name].shape
    }
    if problems:
        places = sorted({part.place(name) for name in list(problems)[:FEW]})
        wrong = first_few([*problems.values()])
        raise ValueError(f"weights in {', '.join(places)} do not fit {type(module).__name__}: {wrong}")
    device = next((tensor.device for tensor in target.values()), torch.device("cpu"))
    if device.type == "meta":
        return
    for name, tensor in part.tensors(device):
        target[name].copy_(tensor)
        del tensor  # before the next one is made


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
