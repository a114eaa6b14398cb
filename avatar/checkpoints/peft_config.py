"""The adapter_config.json that PEFT writes beside a LoRA adapter's weights: ranks, scales and target modules.

Source: LoraConfig of PEFT 0.21; a module's own rank and alpha come from patterns, the scale is alpha / rank, or
alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from avatar.checkpoints.files import read_object

Number = TypeVar("Number", int, float)

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Fields that are not needed to merge: they concern training, the loading by PEFT, or matrices that are written already.
IGNORED = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
    *("ensure_weight_tying", "ephemeral_gpu_offload", "eva_config", "exclude_modules", "fan_in_fan_out"),
    *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config"),
    *("lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type"),
    *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
    *("target_modules", "task_type", "use_dora", "use_rslora"),
}
# Ways to initialise that leave the base weights as they are.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "mica", "orthogonal")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class PeftConfig:
    """The part of an adapter_config.json that decides how matrices are merged.

    path: the file. targets: the ends of the modules' names, or a regular expression for whole names; None: unknown.
    """

    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    targets: tuple[str, ...] | str | None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file. ValueError names what is invalid, or not supported."""
        fields = read_object(path)
        for problem in unsupported(fields):
            raise ValueError(f"{path} sets {problem}")
        try:
            rank_pattern = {key: positive(rank) for key, rank in (fields.get("rank_pattern") or {}).items()}
            alpha_pattern = {key: finite(alpha) for key, alpha in (fields.get("alpha_pattern") or {}).items()}
            rank, alpha = positive(fields["r"]), finite(fields["lora_alpha"])
            for pattern in (*rank_pattern, *alpha_pattern):
                re.compile(pattern)
        except KeyError as error:
            raise ValueError(f"{path} has no field {error.args[0]!r}; PEFT writes `r` and `lora_alpha`") from error
        except AttributeError as error:
            problem = "rank_pattern and alpha_pattern are objects"
            raise ValueError(f"{path} has a field of the wrong type: {problem}") from error
        except (TypeError, ValueError, re.error) as error:
            raise ValueError(f"{path} has a field of the wrong type: {error}") from error
        partial = fields.get("layers_to_transform") is not None or fields.get("exclude_modules")
        targets = None if partial else fields.get("target_modules")
        if isinstance(targets, list):
            targets = tuple(map(str, targets))
        elif not isinstance(targets, str) or targets == ALL_LINEAR:
            targets = None
        return cls(path, rank, alpha, rank_pattern, alpha_pattern, bool(fields.get("use_rslora")), targets)

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's matrices."""
        return pattern_value(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor of a module's product B A."""
        rank = self.rank_of(module)
        return pattern_value(self.alpha_pattern, module, self.alpha) / (rank**0.5 if self.use_rslora else rank)

    def targets_module(self, module: str) -> bool:
        """Return True if the configuration names this module as one that has matrices."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in self.targets or ())


def unsupported(fields: Mapping[str, Any]) -> list[str]:
    """Return the settings with which merging B A would give other weights than the trained ones."""
    found = []
    if str(fields.get("peft_type", "LORA")).upper() != "LORA":
        found.append(f"peft_type to {fields['peft_type']!r}; only LORA is supported")
    if fields.get("use_dora"):
        found.append("use_dora; DoRA is not supported: merge it with PEFT's merge_and_unload, or train plain LoRA")
    if fields.get("bias") not in (None, "none"):
        found.append(f"bias to {fields['bias']!r}; only 'none' is supported: biases of the network stay as they are")
    if fields.get("modules_to_save"):
        found.append(f"modules_to_save to {fields['modules_to_save']}; whole modules are not replaced by an adapter")
    if fields.get("fan_in_fan_out"):
        found.append("fan_in_fan_out; the network has no transposed weights")
    if fields.get("init_lora_weights") not in PLAIN_STARTS:
        found.append(
            f"init_lora_weights to {fields['init_lora_weights']!r}, which changes the base weights; save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion"
        )
    found += [
        f"{name} to {value!r}; it is not supported" for name, value in fields.items() if value and name not in IGNORED
    ]
    return found


def pattern_value(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """Return the value of the first pattern that matches a module's name, or the end of it after a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def positive(value: Any) -> int:
    """Return a whole number of at least 1. ValueError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"a rank is a positive integer, got {value!r}")
    return value


def finite(value: Any) -> float:
    """Return a finite number. ValueError otherwise."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"an alpha is a number, got {value!r}")
    return float(value)
