"""Initial weights of a network that is trained from nothing."""

import re

import torch
from einops import rearrange
from torch import Tensor, nn

from avatar.checkpoints.part import Part
from avatar.denoiser.config import PATCH
from avatar.denoiser.model import Network

# Weights that `initialise` sets to zero.
ZERO_INIT = re.compile(
    r"(time_projection\.1|cross_attn\.o|injector\.\d+\.o|adain_layers\.\d+\.linear|head\.head|face_motion_embedding\.last|mover\.leave)\.weight"
)
# Weights of maps from latents, and to the channels of a patch of latents.
FROM_LATENTS = re.compile(r"(patch_embedding|cond_encoder|frame_packer\.\w+)\.weight")
TO_LATENTS = re.compile(r"head\.head\.(weight|bias)")


@torch.no_grad()
def initialise(network: Network, seed: int) -> None:
    """Initialise a network's weights.

    Everything that adds to the hidden state starts at zero (the layers' gates, the output of text, audio and face
    motion), and so do the head and the mover: an `x0_residual` network starts as the still reference. Other maps
    preserve variance (Xavier).
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
    """Copy the weights of a checkpoint's part whose names and shapes the network has too; return their number.

    If the network's latents have more channels, its first ones are the part's, and the others add nothing at first.
    """
    weights = network.state_dict()
    count = 0
    for name, tensor in part.tensors():
        if name not in weights:
            continue
        mine = weights[name]
        if FROM_LATENTS.fullmatch(name):
            tensor = pad_channels(tensor, mine.shape[1])
        elif TO_LATENTS.fullmatch(name):
            patches = rearrange(tensor, "(patch c) ... -> patch c ...", patch=PATCH**2)
            tensor = rearrange(pad_channels(patches, len(mine) // PATCH**2), "patch c ... -> (patch c) ...")
        if tensor.shape == mine.shape:
            mine.copy_(tensor)
            count += 1
    return count


def pad_channels(weight: Tensor, channels: int) -> Tensor:
    """Append zeros to a weight (n, c, ...) up to a number of channels."""
    missing = max(0, channels - weight.shape[1])
    return torch.cat([weight, weight.new_zeros(len(weight), missing, *weight.shape[2:])], dim=1)
