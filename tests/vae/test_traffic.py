"""The memory traffic of decoding, at the widths of the public weights and 704x384."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from avatar.types import BLOCK_LATENTS
from avatar.vae.vae import to_bytes
from avatar.vae.wan import WanCodec, WanConfig
from tests.operators import Operators, counted
from tests.standin_gpu import placed, stand_in_gpu

GB = 1e9
# Of a block: calls, and traffic in GB. diffusers' decoder has 1,339 operators and 243 GB.
EXPECTED = {
    "cat": (97, 21.4),
    "convolution": (111, 20.5),
    "div": (91, 13.6),
    "mul_": (90, 13.5),
    "silu_": (87, 13.5),
    "add_": (42, 9.3),
    "clone": (99, 8.0),
    "linalg_vector_norm": (90, 6.8),
    "_upsample_nearest_exact2d": (9, 2.4),
}


@pytest.fixture(scope="module")
def operators() -> Operators:
    """The operators of a block, in a stream that has begun."""
    codec = WanCodec(WanConfig(), device="meta", dtype=torch.bfloat16)
    state, latents = codec.new_state(), torch.empty(1, 16, BLOCK_LATENTS, 48, 88, device="meta")
    with torch.no_grad():
        codec.decode(latents[:, :, :1], state)
        with counted() as operators:
            frames = codec.decode(latents, state)
    assert frames.shape == (1, 3, 12, 384, 704)
    return operators


def test_a_block_is_decoded_with_little_traffic(operators: Operators) -> None:
    found = {name: (operators.counts[name], round(operators.num_bytes[name] / GB, 1)) for name in EXPECTED}
    assert found == EXPECTED
    assert operators.counts.total() <= 920
    assert operators.total_bytes <= 110 * GB


def test_nothing_of_a_block_but_its_latent_is_cast(operators: Operators) -> None:
    assert operators.counts["_to_copy"] == 1
    assert operators.num_bytes["_to_copy"] < 2e-3 * GB


class Departures(TorchDispatchMode):
    """Keeps the tensors that leave the meta device, which stands for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self.tensors.append(args[1])
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last_3d])
def test_frames_leave_the_device_once_as_bytes_in_their_order(order: torch.memory_format) -> None:
    decoded = torch.empty(1, 3, 4, 16, 24, device="meta").contiguous(memory_format=order)
    with Departures() as departures:
        assert to_bytes(decoded[0]).shape == (4, 16, 24, 3)
    (sent,) = departures.tensors
    assert (sent.dtype, sent.shape, sent.is_contiguous()) == (torch.uint8, (4, 16, 24, 3), True)


def test_bytes_leave_the_gpu_once_into_pinned_memory() -> None:
    frames = torch.rand(3, 4, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with stand_in_gpu() as gpu:
        arrived = to_bytes(placed(frames.clone(), "gpu"))
        assert not arrived.is_cuda
        (copy,) = gpu.to_host
    assert copy.is_pinned
    assert copy.is_waited_for, "the caller reads them at once"
    assert torch.equal(arrived, to_bytes(frames))
