"""Optional acceleration: torch.compile, float8 weights, attention kernels.

Each is off by default, and raises ValueError on a device that does not support it instead of falling back to something
slower. Float8 has not run on a GPU yet.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

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
    no more than two. KV caches and positions stay outside, so that another slot or block triggers no recompilation.
    """
    options: Any = {"fullgraph": True, "dynamic": False, "recompile_limit": MAX_GRAPHS}
    for layer in network.layers:
        layer.compile(**options)
        layer.project = torch.compile(layer.project, **options)  # type: ignore[method-assign]


def use_float8(network: Network) -> None:
    """Quantise linear maps in place to float8 (e4m3), weights and activations, with one scale per tensor.

    Embeddings of text and time, the head and the audio encoder are unchanged. ValueError if the device or the dtype
    does not support it, or torchao is missing.
    Source: the reference's float8 mode.
    """
    device = network.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        raise ValueError(f"float8 needs a CUDA device of compute capability 8.9 or newer, got {device}")
    if network.dtype != torch.bfloat16:
        raise ValueError(f"float8 needs bfloat16 around it, the network has {network.dtype}")
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerTensor, quantize_
    except ImportError as error:
        raise ValueError("float8 needs torchao: pip install 'avatar-suite[float8]'") from error
    quantize_(network, Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor()), is_float8)


def is_float8(module: nn.Module, name: str) -> bool:
    """Return True for modules to quantise; those computed in float32 (`UpcastLinear`) are not."""
    return type(module) is nn.Linear and not name.startswith("text_embedding")


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
