"""Initial weights of a network that is trained from nothing."""

import re

import torch
from torch import nn

from avatar.checkpoints.part import Part
from avatar.denoiser.model import Network

# Weights that `initialise` sets to zero.
ZERO_INIT = re.compile(
    r"(time_projection\.1|cross_attn\.o|injector\.\d+\.o|adain_layers\.\d+\.linear|head\.head|face_motion_embedding\.last)\.weight"
)


@torch.no_grad()
def initialise(network: Network, seed: int) -> None:
    """Initialise a network's weights.

    Everything that adds to the hidden state starts at zero (the layers' gates, the output of text, audio and face
    motion), and so does the head: an `x0_residual` network starts as the still reference. Other maps preserve variance
    (Xavier).
    Source: adaLN-Zero of DiT (arXiv 2212.09748).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if ZERO_INIT.search(name) or name.endswith(("bias", "modulation")):
            nn.init.zeros_(weight)
        elif "norm" in name or name.endswith("encoder.weights"):
            nn.init.ones_(weight)
        elif name.startswith("trainable") or name.endswith("padding_tokens"):
            nn.init.normal_(weight, std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(weight.flatten(1), generator=generator)


@torch.no_grad()
def copy_weights(network: Network, part: Part) -> int:
    """Copy the weights of a checkpoint's part whose names and shapes the network has too; return their number."""
    weights = network.state_dict()
    found = {name: tensor for name, tensor in part.tensors() if name in weights and tensor.shape == weights[name].shape}
    for name, tensor in found.items():
        weights[name].copy_(tensor)
    return len(found)
