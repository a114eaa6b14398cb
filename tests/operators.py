"""The operators of a computation and the memory traffic that they cause, counted on the meta device without memory.

Rules: an operator that makes a tensor reads each of its arguments once and writes each of its results once, as an eager
GPU does; a view costs nothing. A copy reads its source and writes its target, and a result that is written to a given
tensor (`out`) is not read. `rms_norm` and attention count as the one kernel that CUDA has for each, where the meta
device would take them apart.

Only tensors on the meta device count; it stands for a GPU. A copy to it is a `_to_copy` or `copy_` from another device,
or a `torch.tensor` made there. A cast is any other `_to_copy`. A sync is an operator that reads a number of it, or
copies from it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = {
    *("alias", "as_strided", "chunk", "detach", "expand", "lift_fresh", "permute", "select", "slice", "split", "t"),
    *("split_with_sizes", "squeeze", "transpose", "unbind", "unfold", "unsqueeze", "view", "_reshape_alias"),
    *("_unsafe_view", "view_as_complex", "view_as_real", "empty", "empty_like", "empty_strided", "new_empty"),
}
COPIES = {"_to_copy", "copy_"}
SYNCS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "item"}
FROM_HOST = {torch.tensor, torch.as_tensor}
# Functions of one kernel that the meta device takes apart.
FUSED = {torch.nn.functional.rms_norm: "rms_norm", torch.nn.functional.scaled_dot_product_attention: "attention"}


@contextmanager
def counted() -> Iterator["Operators"]:
    """Count the operators of the body."""
    operators = Operators()
    with _FusedFunctions(operators), operators:
        yield operators


class Operators(TorchDispatchMode):
    """Operators that ran, under `counted`.

    counts, num_bytes: of each operator, by its name. num_casts: how many were casts. copies: shapes of the tensors that
    came to the device. syncs: names of operators that wait for it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts, self.num_bytes, self.num_casts = Counter[str](), Counter[str](), 0
        self.copies: list[tuple[int, ...]] = []
        self.syncs: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        options = kwargs or {}
        read = args[1:2] if name == "copy_" else [args, [each for key, each in options.items() if key != "out"]]
        target = args[0] if name == "copy_" else options.get("device", "meta")
        if is_on_device(read) and (name in SYNCS or (name in COPIES and not is_meta(target))):
            self.syncs.append(name)
        result = func(*args, **options)
        if name == "convolution":
            result = as_its_weight(result, args[1])
        if name in COPIES and is_on_device(result):
            if not is_on_device(read):
                self.copies.append(tuple(result.shape))
            elif name == "_to_copy":
                self.num_casts += 1
        if name not in VIEWS:
            self.add(name, read, result)
        return result

    def add(self, name: str, arguments: object, results: object) -> None:
        """Count an operator."""
        if written := meta_bytes(results):
            self.counts[name] += 1
            self.num_bytes[name] += meta_bytes(arguments) + written

    @property
    def total_bytes(self) -> int:
        """Traffic of all operators."""
        return self.num_bytes.total()


class _FusedFunctions(TorchFunctionMode):
    """Runs each of FUSED as one operator: its result has the shape of its first argument, and no other is counted."""

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self._operators = operators

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in FUSED:
            result = func(*args, **(kwargs or {}))
            if func in FROM_HOST and is_on_device(result):
                self._operators.copies.append(tuple(result.shape))
            return result
        result = torch.empty_like(args[0])
        self._operators.add(FUSED[func], [args, kwargs], result)
        return result


def is_meta(target: object) -> bool:
    """Return True for the meta device and its tensors; target: of a copy."""
    return target.is_meta if isinstance(target, Tensor) else target is None or str(target).startswith("meta")


def is_on_device(tree: object) -> bool:
    """Return True if any of the tensors is on the meta device."""
    return any(isinstance(each, Tensor) and each.is_meta for each in tree_leaves(tree))


def meta_bytes(tree: object) -> int:
    """Return the bytes of all meta tensors in nested lists, tuples and dicts."""
    leaves: Iterable[Any] = tree_leaves(tree)
    return sum(each.nbytes for each in leaves if isinstance(each, Tensor) and each.is_meta)


def as_its_weight(result: Tensor, weight: Tensor) -> Tensor:
    """Return a convolution's result in the memory order that cuDNN gives it: channels last if its weight's are."""
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    if order is None or not weight.is_contiguous(memory_format=order):
        return result
    return torch.empty_like(result, memory_format=order)
