"""One run of `benchmarks.gpu`: its device, the time that is left, and what sections leave for later ones."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Rates:
    """Measured rates, operations and bytes a second; 0 where nothing was measured."""

    gemm: float = 0.0
    float8: float = 0.0
    attention: float = 0.0
    bandwidth: float = 0.0

    @property
    def are_known(self) -> bool:
        """True if a ceiling can be computed from them."""
        return all(getattr(self, each.name) for each in fields(self) if each.name != "float8")


@dataclass
class Run:
    """The device, and what earlier rows leave for later ones.

    sizes: (height, width) of latents, the first one is that of the rows without another. is_toy: toy widths on a CPU.
    deadline_s: by time.monotonic; sections that would begin after it are left out. rates: measured ceilings.
    """

    device: torch.device
    is_toy: bool
    deadline_s: float
    rates: Rates = field(default_factory=Rates)
    sizes: tuple[tuple[int, int], ...] = ((48, 88), (40, 64), (32, 48))
    network: Any = None
    latents: list[Tensor] = field(default_factory=list)
    decoding_s: dict[tuple[int, int], float] = field(default_factory=dict)

    def seconds(self, work: Callable[[], object], calls: int = 1) -> float:
        """Return the time of a call, which has run once before: the median of three rounds.

        calls: of a round, without a wait between them; ten where a wait would take a share of the time.
        """
        work()
        times = []
        for _ in range(1 if self.is_toy else 3):
            self.synchronize()
            started_s = time.perf_counter()
            for _ in range(calls):
                work()
            self.synchronize()
            times.append((time.perf_counter() - started_s) / calls)
        return statistics.median(times)

    def synchronize(self) -> None:
        """Wait until the device has nothing to do."""
        if not self.is_toy:
            torch.cuda.synchronize(self.device)

    def mark(self) -> Any:
        """Return a mark of this place in the device's work: a CUDA event, or the time on a CPU."""
        if self.is_toy:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds_between(self, first: Any, second: Any) -> float:
        """Return the time between two marks that the device has passed."""
        return float(second - first if self.is_toy else first.elapsed_time(second) / 1000)

    def free(self) -> None:
        """Return unused memory to the device, and forget its peak."""
        gc.collect()
        if not self.is_toy:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def fill(module: nn.Module) -> None:
    """Fill a module with random weights that keep values finite: norms one, matrices by their number of inputs."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            parameter.normal_(std=max(1, parameter[0].numel()) ** -0.5)
        else:
            parameter.fill_(float(not name.endswith("bias")))
