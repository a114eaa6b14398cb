"""The optimiser of matrices inside layers.

Axes: k matrices of one shape, m n their rows and columns.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avatar.checkpoints.files import is_native

# Of the iteration's odd polynomial: steepest at 0, after five rounds every singular value is between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
MOMENTUM = 0.95


class Muon(Optimizer):
    """Momentum, made orthogonal, so that every direction of a matrix moves as far as any other.

    Steps are as long as AdamW's, 0.2 in the root mean square times the rate, so that both take the same rates.
    torch.optim.Muon does the same sums in bfloat16 alone, which takes a processor without such instructions four times
    as long as the rest of a training step, and one matrix after the other.
    Source: K. Jordan 2024 (Nesterov's momentum, Newton-Schulz), scaled as in arXiv 2502.16982.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for shape, matrices in alike.items():
                length = 0.2 * math.sqrt(max(shape)) * group["lr"]
                directions = orthogonal(torch.stack([self._momentum(matrix) for matrix in matrices]))
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=length)

    def _momentum(self, matrix: nn.Parameter) -> Tensor:
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum_buffer"], MOMENTUM)


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix (k, m, n), in bfloat16 where the device has instructions for it."""
    x = matrices.to(torch.bfloat16 if is_native(torch.bfloat16, matrices.device) else matrices.dtype)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    linear, cubic, quintic = COEFFICIENTS
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=cubic, alpha=quintic), x, beta=linear)
    return (x.mT if is_tall else x).to(matrices.dtype)
