"""Convolutions that are causal in time, with the past as an argument.

A clip is a row of steps, each a small picture of features: (b, t, c, h, w), t steps. Convolutions look at one step at a
time; what came before is seen only through `Tails`, which holds the last step that each remembering layer was given.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional


class Tails:
    """The last step that each layer saw: all that a stream carries from one call to the next.

    A fresh one begins a clip. There a first step takes itself for its past, so that a still picture has no start-up
    transient.
    """

    def __init__(self) -> None:
        self._last: dict[int, Tensor] = {}

    @property
    def is_fresh(self) -> bool:
        """Whether no step has been seen yet."""
        return not self._last

    def extend(self, layer: int, steps: Tensor) -> Tensor:
        """What came one step before each of `steps`; the last of them is kept for the layer's next call.

        steps, result: (b, t, c, h, w).
        """
        past = self._last.get(layer, steps[:, :1])
        # A copy: a view would keep all steps of the call alive.
        self._last[layer] = steps[:, -1:].clone()
        return torch.cat([past, steps[:, :-1]], dim=1)


class StepConv(nn.Conv2d):
    """A convolution of every step by itself: (b, t, c, h, w) -> (b, t, c', h, w), zeros around the edge."""

    def __init__(self, width: int, width_out: int, kernel: int) -> None:
        super().__init__(width, width_out, kernel, padding=kernel // 2)

    def forward(self, input: Tensor) -> Tensor:
        pictures = super().forward(rearrange(input, "b t c h w -> (b t) c h w"))
        return rearrange(pictures, "(b t) c h w -> b t c h w", b=len(input))


class Residual(nn.Module):
    """Two convolutions that add to their input; with a `memory`, the first also sees the step before.

    memory: the number of this layer in `Tails`; None for a layer that does not look back.
    Source: the memory block of the tiny autoencoders for video (TAEHV).
    """

    def __init__(self, width: int, memory: int | None = None) -> None:
        super().__init__()
        self.memory = memory
        self.enter = StepConv(width if memory is None else 2 * width, width, 3)
        self.leave = StepConv(width, width, 3)

    def forward(self, steps: Tensor, tails: Tails) -> Tensor:
        """steps, result: (b, t, c, h, w)."""
        active = functional.silu(steps)
        if self.memory is not None:
            active = torch.cat([active, tails.extend(self.memory, active)], dim=2)
        change: Tensor = self.leave(functional.silu(self.enter(active)))
        return steps + change
