"""LoRA adapters, through peft: trained in place of a whole network.

Every weight W of the attentions (audio injectors' included) and feed-forward networks becomes
W + alpha / rank * B A; only A and B are trained.
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
# Parts of a network with a mover that are pretrained.
PRETRAINED = ("mover.", "mouth.", "brows.", "casual_audio_encoder.", "heard_audio_encoder.")


@dataclass(frozen=True)
class LoraConfig:
    """Rank and scale of a LoRA adapter."""

    rank: int = 128
    alpha: float = 64.0


def weight_dtype(lora: LoraConfig | None) -> torch.dtype:
    """Return the dtype to load weights in: bfloat16 where a LoRA adapter leaves them frozen, else float32."""
    return torch.bfloat16 if lora else torch.float32


def make_trainable(network: Network, lora: LoraConfig | None, seed: int) -> Network:
    """Enable gradients in place: of a new LoRA adapter whose product is zero, or without one of all weights.

    A network with a mover keeps it, and the audio encoders that move mouth and brows, as they were pretrained.
    """
    network.requires_grad_(lora is None)
    if network.config.mover:
        for name, parameter in network.named_parameters():
            if name.startswith(PRETRAINED):
                parameter.requires_grad_(False)
    if lora is not None:
        # Imported here, because it takes seconds and most runs have no adapter.
        import peft

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            size = {"r": lora.rank, "lora_alpha": lora.alpha}
            config = peft.LoraConfig(**size, target_modules=TARGETS)  # type: ignore[arg-type]
            peft.inject_adapter_in_model(config, network)
        for parameter in network.parameters():
            if parameter.requires_grad:
                # bfloat16 would round small optimizer steps away.
                parameter.data = parameter.data.float()
    return network


def lora_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the adapter of a network's state, in float32 under peft's names, as public adapter files have it."""
    return {f"base_model.model.{name}": tensor.float() for name, tensor in state.items() if PAIR.fullmatch(name)}


def merge_lora(state: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """Merge the adapter of a network's state: names and shapes are then those of a network without one."""
    plain = {name.replace(".base_layer.", "."): each for name, each in state.items() if not PAIR.fullmatch(name)}
    for name, a in state.items():
        found = PAIR.fullmatch(name)
        if found and found["side"] == "A":
            module, weight = found["module"], f"{found['module']}.weight"
            b = state[f"{module}.lora_B.default.weight"]
            plain[weight] = merge(plain[weight], {"A": a, "B": b}, lora.alpha / len(a)).to(plain[weight].dtype)
    return plain
