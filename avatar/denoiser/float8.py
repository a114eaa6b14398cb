"""Float8 (e4m3): linear maps, and the window of a KV cache.

A float8 tensor comes with scales, in the dtype that it had: value = float8 * scale. e4m3 has four significant bits, so
a value is rounded by 2 to 3 % of itself, whatever its scale. Both also run on a CPU, which emulates a GPU's matrix
product. None of it has run on a GPU yet.

Source: FP8 formats (arXiv 2209.05433).
Axes: l layers, b batch, n tokens, h heads, d width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
# Below it a scale's reciprocal is not finite.
SMALLEST_SCALE = 1e-30


def quantise(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return x in float8, and its scales over the dims that share one, which have size 1 there."""
    largest: Tensor = torch.linalg.vector_norm(x, torch.inf, dims, keepdim=True)
    scale = (largest / LARGEST).clamp(min=SMALLEST_SCALE)
    return (x / scale).to(FLOAT8), scale


class Float8Linear(nn.Module):
    """A linear map with float8 weights, whose inputs are quantised as they come, with one scale per tensor each.

    The result is rounded to the input's dtype. Compiled, quantisation is part of the kernel before.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantise(linear.weight.detach(), (0, 1))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.float().reshape(()))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = quantise(x.reshape(-1, x.shape[-1]), (0, 1))
        scale = scale.float().reshape(())
        each = ScalingType.TensorWise
        product: Tensor = scaled_mm(
            rows,
            self.weight.t(),
            scale,
            each,
            self.scale,
            each,
            bias=self.bias,
            output_dtype=x.dtype,
        )
        return product.view(*x.shape[:-1], -1)


def quantise_linears(network: nn.Module) -> None:
    """Replace linear maps in place by float8 ones, except those of `is_float8`."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and is_float8(module, name):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, Float8Linear(module))


def is_float8(module: nn.Module, name: str) -> bool:
    """Return True for modules to quantise; those computed in float32 (`UpcastLinear`) are not, nor the text's."""
    return type(module) is nn.Linear and not name.startswith("text_embedding")


class Float8Window:
    """The ring of blocks of a KV cache in float8, with a scale per layer, block and head for keys and for values."""

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_blocks: int,
        block_tokens: int,
        heads: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """heads: their number and width. dtype: of keys and values that are written and read."""
        shape = (2, num_layers, batch, num_blocks, block_tokens, *heads)
        self._numbers = torch.zeros(shape, dtype=FLOAT8, device=device)
        self._scales = torch.ones((*shape[:4], 1, heads[0], 1), dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return self._numbers.nbytes + self._scales.nbytes

    def write(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """Write a block's keys and values (b, n, h, d) of a layer."""
        for numbers, scales, x in zip(self._numbers, self._scales, (k, v), strict=True):
            numbers[layer, :, slot], scales[layer, :, slot] = quantise(x, (1, 3))

    def read(self, layer: int, num_blocks: int, *into: Tensor) -> None:
        """Write the first slots' keys and values of a layer into two tensors (b, n, h, d), in their dtype."""
        for numbers, scales, x in zip(self._numbers, self._scales, into, strict=True):
            blocks = rearrange(x, "b (block n) h d -> b block n h d", block=num_blocks)
            blocks.copy_(numbers[layer, :, :num_blocks])
            blocks.mul_(scales[layer, :, :num_blocks])
