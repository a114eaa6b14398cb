"""Muon: an optimizer for the matrices inside layers, and for the kernels of convolutions as matrices.

Axes: k matrices of one shape, m n their rows and columns.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avatar.checkpoints.files import is_native

# Coefficients of Newton-Schulz's odd polynomial, steepest at 0; five iterations bring singular values to 0.7 to 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(Optimizer):
    """Orthogonalised Nesterov momentum: an update moves every direction of a matrix equally far.

    Updates have a root mean square of 0.2 times the learning rate, about AdamW's, so both take the same rates.
    torch.optim.Muon computes the same in bfloat16 only and one matrix at a time; on a processor without bfloat16
    instructions that takes four times as long as the rest of a training step.
    Source: K. Jordan 2024, scaled as in arXiv 2502.16982.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update every matrix that has a gradient; matrices of one shape are orthogonalised in one batch."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                scale = 0.2 * math.sqrt(max(shape[0], shape[1:].numel())) * group["lr"]
                momenta = [self._momentum(matrix).flatten(1) for matrix in matrices]
                directions = orthogonalise(torch.stack(momenta))
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction.view(shape), alpha=scale)

    def _momentum(self, matrix: nn.Parameter) -> Tensor:
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum_buffer"], MOMENTUM)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximate U V^T of each matrix (k, m, n), in bfloat16 where the device has instructions for it."""
    x = matrices.to(torch.bfloat16 if is_native(torch.bfloat16, matrices.device) else matrices.dtype)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    linear, cubic, quintic = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=cubic, alpha=quintic), x, beta=linear)
    return (x.mT if is_tall else x).to(matrices.dtype)
