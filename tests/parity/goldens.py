"""Goldens: recorded runs of the reference, and the comparison of ours with them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from avatar.checkpoints.files import CLASS_NAME

ABOUT = "about.json"


@dataclass(frozen=True)
class Golden:
    """One golden: `name.json` describes the run and its tolerances, `name.safetensors` holds the tensors.

    A checkpoint is a folder of that name, whose `about.json` says what it must give.
    """

    folder: Path
    name: str

    @cached_property
    def info(self) -> dict[str, Any]:
        about = self.folder / self.name / ABOUT
        path = about if about.is_file() else self.folder / f"{self.name}.json"
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return info

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / f"{self.name}.safetensors")

    def sibling(self, name: str) -> "Golden":
        """Another golden of the same folder."""
        return Golden(self.folder, name)


@contextmanager
def published(folder: str = ".", config: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Make a temporary checkpoint in the published layout, with a part's config in its folder."""
    with TemporaryDirectory() as name:
        root = Path(name)
        (root / folder).mkdir(exist_ok=True)
        (root / "config.json").write_text(json.dumps({"_class_name": CLASS_NAME}), encoding="utf-8")
        if config is not None:
            fields = {"_class_name": CLASS_NAME, **config}
            (root / folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        yield root


@dataclass
class Report:
    """The worst errors of one golden, and every comparison that missed its tolerance."""

    name: str
    compared: int = 0
    worst_rel_rms: float = 0.0
    worst_abs: float = 0.0
    tolerance: str = ""
    failures: list[str] = field(default_factory=list)

    def compare(
        self, what: str, actual: Tensor, expected: Tensor, *, rel_rms: float | None = None, max_abs: float | None = None
    ) -> None:
        """Hold rms(actual - expected) / std(expected) and the largest error to their bounds, where given."""
        assert rel_rms is not None or max_abs is not None, "a comparison needs a tolerance"
        self.compared += 1
        if actual.shape != expected.shape:
            self.failures.append(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
            return
        a, b = actual.detach().double(), expected.double()
        error = a - b
        worst = error.abs().max().item() if error.numel() else 0.0
        spread = b.std(correction=0).item() if b.numel() > 1 else 0.0
        relative = error.square().mean().sqrt().item() / spread if spread > 0 else worst
        bounds = {"rel": rel_rms, "abs": max_abs}
        if self.tolerance in ("", "exact"):
            self.tolerance = ", ".join(f"{name} {bound:g}" for name, bound in bounds.items() if bound is not None)
        self.worst_abs = max(self.worst_abs, worst)
        self.worst_rel_rms = max(self.worst_rel_rms, relative)
        if not (relative <= (rel_rms if rel_rms is not None else torch.inf)):
            self.failures.append(f"{what}: relative RMS {relative:.2e}, tolerance {rel_rms:g}")
        if not (worst <= (max_abs if max_abs is not None else torch.inf)):
            self.failures.append(f"{what}: worst error {worst:.2e}, tolerance {max_abs:g}")

    def exact(self, what: str, actual: Any, expected: Any) -> None:
        """Hold tensors to bit equality and plain values to `==`."""
        self.compared += 1
        self.tolerance = self.tolerance or "exact"
        if isinstance(expected, Tensor):
            if actual.shape != expected.shape or actual.dtype != expected.dtype or not torch.equal(actual, expected):
                self.failures.append(f"{what}: tensors are not equal")
        elif actual != expected:
            self.failures.append(f"{what}: {actual!r}, expected {expected!r}")
