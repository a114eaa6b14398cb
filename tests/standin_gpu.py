"""A stand-in for a CUDA device: it computes on the CPU, and records the copies between host and GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)


@dataclass(eq=False)
class Stream:
    """A CUDA stream. waits_for: streams whose work must end before its own goes on."""

    name: str
    waits_for: list["Stream"] = field(default_factory=list)

    def wait_stream(self, other: "Stream") -> None:
        self.waits_for.append(other)


@dataclass
class Copy:
    """A copy between host and GPU. num_elements: of the tensor. is_pinned: the host's side is."""

    num_elements: int
    is_pinned: bool
    is_waited_for: bool
    stream: Stream


class StandInGpu(TorchFunctionMode):
    """Tensors whose `device` is GPU, in the CPU's memory.

    to_gpu, to_host: copies so far. streams: made so far. used_by: streams that were recorded as users of a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.computing = self.stream = Stream("computing")
        self.to_gpu: list[Copy] = []
        self.to_host: list[Copy] = []
        self.streams: list[Stream] = []
        self.used_by: list[tuple[Tensor, Stream]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is torch.empty:
            is_pinned = options.pop("pin_memory", False)
            return placed(func(*args, **options), "pinned" if is_pinned else "")
        if func == Tensor.device.__get__ and is_on_gpu(args):
            return GPU
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return is_on_gpu(args)
        if func is Tensor.to and args[1] == GPU:
            if is_on_gpu(args[0]):
                return args[0]
            self.to_gpu.append(self._copy(args[0], args[0], options))
            return placed(args[0].clone(), "gpu")
        if func is Tensor.copy_ and is_on_gpu(args[1]) and not is_on_gpu(args[0]):
            self.to_host.append(self._copy(args[1], args[0], options))
            return func(*args, **options)
        result = func(*args, **options)
        if is_on_gpu([args, options]):
            for each in tree_leaves(result):
                placed(each, "gpu")
        return result

    def _copy(self, sent: Tensor, host: Tensor, options: dict[str, Any]) -> Copy:
        is_pinned = getattr(host, "place", "") == "pinned"
        return Copy(sent.numel(), is_pinned, not options.get("non_blocking"), self.stream)

    def new_stream(self, _: torch.device) -> Stream:
        self.streams.append(Stream(f"stream {len(self.streams)}"))
        return self.streams[-1]

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        before, self.stream = self.stream, stream or self.stream
        yield
        self.stream = before


@contextmanager
def stand_in_gpu() -> Iterator[StandInGpu]:
    """Run the body with a GPU that is none."""
    gpu = StandInGpu()
    functions: dict[str, Any] = {"Stream": gpu.new_stream, "stream": gpu.on, "current_stream": lambda _: gpu.stream}
    record = patch.object(Tensor, "record_stream", lambda *used: gpu.used_by.append(used))  # parsed before the mode
    with patch.multiple(torch.cuda, **functions), record, gpu:
        yield gpu


def placed(tensor: Any, place: str) -> Any:
    """Return a tensor as one that lies on the GPU ("gpu"), in pinned memory ("pinned") or in the host's ("")."""
    if isinstance(tensor, Tensor):
        tensor.place = place  # type: ignore[attr-defined]
    return tensor


def is_on_gpu(tree: object) -> bool:
    """Return True if any of the tensors lies on the GPU."""
    return any(getattr(each, "place", "") == "gpu" for each in tree_leaves(tree) if isinstance(each, Tensor))
