"""Convolutions that are causal in time, with their state as an argument.

Activations are (b, t, h, w, c): t steps of features (h, w, c). A convolution sees one step at a time; the step before
it comes from `Tails`, which keeps the last step of every layer with memory. Channels come last because a CPU's kernels
take a tenth less time for them in that order, and no time to bring one step into it.

Axes: b batch, t steps, h w height and width, c channels.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional


class Tails:
    """The last step that each layer with memory saw: all the state that a stream carries between calls.

    Fresh tails start a clip: its first step counts as its own past, so a still picture has no start-up transient.
    """

    def __init__(self, *, starts_at_zero: bool = False) -> None:
        """starts_at_zero: a clip's past is zeros instead."""
        self._last: dict[int, Tensor] = {}
        self._starts_at_zero = starts_at_zero

    @property
    def is_fresh(self) -> bool:
        """True before the first step."""
        return not self._last

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in self._last.values())

    def extend(self, layer: int, steps: Tensor) -> Tensor:
        """Return the step before each of `steps`, and keep the last of them for the layer's next call.

        steps, result: (b, t, h, w, c).
        """
        past = self._last.get(layer)
        if past is None:
            past = torch.zeros_like(steps[:, :1]) if self._starts_at_zero else steps[:, :1]
        if steps.shape[1] == 1:
            self._last[layer] = steps
            return past
        # A copy: a view would keep all steps of the call alive.
        self._last[layer] = steps[:, -1:].clone()
        return torch.cat([past, steps[:, :-1]], dim=1)


class StepConv(nn.Conv2d):
    """A 2D convolution of every step: (b, t, h, w, c) -> (b, t, h, w, c'), zero padding."""

    def __init__(self, width: int, width_out: int, kernel: int, *, bias: bool = True) -> None:
        super().__init__(width, width_out, kernel, padding=kernel // 2, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        pictures = super().forward(rearrange(input, "b t h w c -> (b t) c h w"))
        return rearrange(pictures, "(b t) c h w -> b t h w c", b=len(input))


class Residual(nn.Module):
    """A residual block of two convolutions; with `memory`, the first also sees the step before.

    memory: this layer's key in `Tails`; None for a layer that sees its own step only.
    Source: the memory block of the tiny autoencoders for video (TAEHV).
    """

    def __init__(self, width: int, memory: int | None = None) -> None:
        super().__init__()
        self.memory = memory
        self.enter = StepConv(width if memory is None else 2 * width, width, 3)
        self.leave = StepConv(width, width, 3)

    def forward(self, steps: Tensor, tails: Tails) -> Tensor:
        """steps, result: (b, t, h, w, c)."""
        active = functional.silu(steps)
        if self.memory is not None:
            active = torch.cat([active, tails.extend(self.memory, active)], dim=-1)
        change: Tensor = self.leave(functional.silu(self.enter(active)))
        return steps + change
