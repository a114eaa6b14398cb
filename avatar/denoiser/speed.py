"""Optional acceleration: torch.compile, float8 weights, attention kernels.

Each is off by default, and raises ValueError on a device that does not support it instead of falling back to something
slower. Float8 has not run on a GPU yet.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from avatar.denoiser.attention import condition_positions, grid_size
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.float8 import quantise_linears
from avatar.denoiser.model import Network

# torch's attention kernels; with `auto` torch chooses for each call.
ATTENTION = {
    "auto": None,
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# The lowest CUDA compute capability with float8 matrix products.
FLOAT8_CAPABILITY = (8, 9)

# Recompilations of a layer before torch reports an error; five per size and dtype are expected.
MAX_GRAPHS = 256


def compile_layers(network: Network) -> None:
    """Compile the network's layers in place with torch.compile; shapes (numbers of tokens and keys) are static.

    Layers are compiled instead of the network because they share compiled code: the public network's forty layers cost
    no more than two. RoPE is inside; KV caches and positions stay outside, so that another slot or block triggers no
    recompilation.
    """
    options: Any = {"fullgraph": True, "dynamic": False, "recompile_limit": MAX_GRAPHS}
    for layer in network.layers:
        layer.compile(**options)
        layer.project = torch.compile(layer.project, **options)  # type: ignore[method-assign]


def use_float8(network: Network) -> None:
    """Quantise linear maps in place to float8 (e4m3), weights and activations, with one scale per tensor.

    Embeddings of text and time, the head and the audio encoder are unchanged. ValueError if the device or the dtype
    does not support it. Source: the reference's float8 mode.
    """
    device = network.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        raise ValueError(f"float8 needs a CUDA device of compute capability 8.9 or newer, got {device}")
    if network.dtype != torch.bfloat16:
        raise ValueError(f"float8 needs bfloat16 around it, the network has {network.dtype}")
    quantise_linears(network)


def attention_kernel(name: str, network: Network) -> SDPBackend | None:
    """Return the attention kernel of that name. ValueError if there is none, or the device does not run it."""
    if name not in ATTENTION:
        raise ValueError(f"attention is {name!r}, expected one of {', '.join(ATTENTION)}")
    kernel, config = ATTENTION[name], network.config
    if kernel is not None:
        heads = torch.zeros(1, config.num_heads, 64, config.head_dim, dtype=network.dtype, device=network.device)
        try:
            with sdpa_kernel(kernel), torch.no_grad():
                scaled_dot_product_attention(heads, heads, heads)
        except RuntimeError as error:
            raise ValueError(
                f"attention is {name!r}, which {network.device} does not run in {network.dtype} at {config.head_dim} "
                f"channels a head: {error}"
            ) from error
    return kernel


def kernel_of_step(
    config: NetworkConfig, height: int, width: int, dtype: torch.dtype, device: torch.device, kernel: SDPBackend | None
) -> str:
    """Return the name of the attention kernel that a step with a full window gets; height, width: of latents.

    kernel: from `attention_kernel`; of None, torch's choice depends on the shapes, the device and torch's version.
    """
    rows, columns = grid_size(height, width)
    num_queries = rows * columns * config.num_frames_per_block
    num_keys = len(condition_positions(height, width)) + config.window_blocks * num_queries
    q, k = (
        torch.empty(1, num, config.num_heads, config.head_dim, dtype=dtype, device=device).transpose(1, 2)
        for num in (num_queries, num_keys)
    )
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        chosen = SDPBackend(torch._fused_sdp_choice(q, k, k))
    return next((name for name, each in ATTENTION.items() if each == chosen), chosen.name.lower())
