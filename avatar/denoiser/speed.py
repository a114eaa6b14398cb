"""What makes a network's steps faster where a device has it. Each is off unless it is asked for, and refused, never
replaced by something slower, where it cannot be had.

Float8 has not run on a GPU yet.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from avatar.denoiser.model import Network

# torch's own names; `auto` lets it choose call by call.
ATTENTION = {
    "auto": None,
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# The first CUDA devices with products of float8.
FLOAT8_CAPABILITY = (8, 9)

# Graphs of one layer that torch may make before it takes them for a mistake: five for each size and dtype are meant.
MAX_GRAPHS = 256


def compile_layers(network: Network) -> None:
    """Have torch.compile make the layers' code, once for each number of tokens and keys that comes.

    Layers are compiled and not the network, since all of them share what is made for one: the public network's forty
    cost no more than two. Histories and positions stay outside, so that nothing is made again for another slot or
    block.
    """
    options: Any = {"fullgraph": True, "dynamic": False, "recompile_limit": MAX_GRAPHS}
    for layer in network.layers:
        layer.compile(**options)
        layer.project = torch.compile(layer.project, **options)  # type: ignore[method-assign]


def use_float8(network: Network) -> None:
    """Keep the weights of linear maps in float8 (e4m3), and round what enters them to it: one scale for each tensor.

    Embeddings of text and time, the head and the audio encoder stay as they are. ValueError if the device, the dtype or
    torchao cannot.
    Source: the reference's float8 mode.
    """
    device = network.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        raise ValueError(f"float8 needs a CUDA device of compute capability 8.9 or newer, {device} is none")
    if network.dtype != torch.bfloat16:
        raise ValueError(f"float8 needs bfloat16 around it, the network has {network.dtype}")
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerTensor, quantize_
    except ImportError as error:
        raise ValueError("float8 needs torchao: pip install 'avatar-suite[float8]'") from error
    quantize_(network, Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor()), is_float8)


def is_float8(module: nn.Module, name: str) -> bool:
    """Whether float8 takes a module of the network. What is computed in float32 is a `WideLinear`, and stays."""
    return type(module) is nn.Linear and not name.startswith("text_embedding")


def attention_kernel(name: str, network: Network) -> SDPBackend | None:
    """The attention kernel of a name in ATTENTION. ValueError if there is none, or the device does not run it."""
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
