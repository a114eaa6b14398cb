"""Low-rank adapters (LoRA, through peft): what is trained where a whole network is too much.

Every weight W of attention and of the feed-forward networks, the audio injectors' included, becomes
W + alpha / rank * B A; B and A are trained, and everything else stays.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from avatar.checkpoints.lora import merge
from avatar.denoiser.model import Network

# Source: the training configuration of Live Avatar.
TARGETS = r".*\.([qkvo]|ffn\.[02])"
PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.default\.weight")


@dataclass(frozen=True)
class AdapterRule:
    """How large an adapter is, and how much it counts."""

    rank: int = 128
    alpha: float = 64.0


def kept_in(rule: AdapterRule | None) -> torch.dtype:
    """What weights are read as: those that an adapter leaves alone take as little memory as when they are served."""
    return torch.bfloat16 if rule else torch.float32


def made_trainable(network: Network, rule: AdapterRule | None, seed: int) -> Network:
    """The network with what is to be trained: an adapter that changes nothing yet, or with no rule all its weights."""
    network.requires_grad_(rule is None)
    if rule is not None:
        # Imported here, since it takes seconds and most runs do without.
        from peft import LoraConfig, inject_adapter_in_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shape = LoraConfig(r=rule.rank, lora_alpha=rule.alpha, target_modules=TARGETS)  # type: ignore[arg-type]
            inject_adapter_in_model(shape, network)
        for parameter in network.parameters():
            if parameter.requires_grad:
                # In bfloat16 small steps would be rounded away.
                parameter.data = parameter.data.float()
    return network


def adapter_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter in a network's state, in peft's spelling and float32: what a public adapter file holds."""
    return {f"base_model.model.{name}": tensor.float() for name, tensor in state.items() if PAIR.fullmatch(name)}


def merged(state: Mapping[str, Tensor], rule: AdapterRule) -> dict[str, Tensor]:
    """A network's state with its adapter taken in: names and shapes of a network without one."""
    plain = {name.replace(".base_layer.", "."): each for name, each in state.items() if not PAIR.fullmatch(name)}
    for name, a in state.items():
        found = PAIR.fullmatch(name)
        if found and found["side"] == "A":
            module, weight = found["module"], f"{found['module']}.weight"
            b = state[f"{module}.lora_B.default.weight"]
            plain[weight] = merge(plain[weight], {"A": a, "B": b}, rule.alpha).to(plain[weight].dtype)
    return plain
