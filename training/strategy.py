"""How a run is spread over processes: one, DDP or FSDP2, all of them started by torchrun.

Every process makes the same decisions from the same seeds (the batch, how many blocks, the exit level), so nothing of
them has to be sent; each takes its share of a batch's clips, with the noise that those clips would have anywhere. What
clocks, signals and folders say may differ from process to process, and is agreed on.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from avatar.checkpoints.files import is_native
from avatar.denoiser.attention import Attention
from avatar.denoiser.layers import Layer
from avatar.denoiser.model import Network
from training.batches import Share

STRATEGIES = ("single", "ddp", "fsdp2")

T = TypeVar("T")


class Calls(nn.Module):
    """Calls functions that use a network: one forward for DDP and FSDP2 to watch, whichever methods are used in it."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, function: Callable[..., T], *values: Any) -> T:
        return function(*values)


class Spread:
    """A network as this process holds it: functions that use it are called through this, and are the same on all.

    network: under FSDP2 its parameters are shards, whole only inside a call.
    """

    def __init__(self, network: Network, calls: Calls | DistributedDataParallel) -> None:
        self.network = network
        self._calls = calls

    def __call__(self, function: Callable[..., T], *values: Any) -> T:
        result: T = self._calls(function, *values)
        return result

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Round a call and its backward pass: gradients are added up, and travel with the last one.

        FSDP2's travel every time: to keep them would take the memory of whole gradients.
        """
        if is_last or not isinstance(self._calls, DistributedDataParallel):
            return nullcontext()
        waiting: AbstractContextManager[None] = self._calls.no_sync()
        return waiting


@dataclass(frozen=True)
class Strategy:
    """One process of a run.

    precision: of matrix products, float32 where the device has no instructions for what was asked; weights, gradients
        and their sums are float32. mesh: of FSDP2's processes.
    """

    kind: str = "single"
    share: Share = field(default_factory=Share)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: torch.dtype = torch.bfloat16
    mesh: DeviceMesh | None = None

    def __post_init__(self) -> None:
        if not is_native(self.precision, self.device):
            object.__setattr__(self, "precision", torch.float32)

    @property
    def is_first(self) -> bool:
        """This process writes what is written once."""
        return self.share.rank == 0

    def autocast(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, self.precision, enabled=self.precision != torch.float32
        )
        return context

    def spread(self, network: Network, is_offloaded: bool = False) -> Spread:
        """The network on this process's device, whole or in shards; it has to be the same on all processes.

        is_offloaded: FSDP2's shards wait in main memory.
        """
        if self.mesh is not None:
            calls = Calls(network)
            self._shard(calls, CPUOffloadPolicy() if is_offloaded else OffloadPolicy())
            return Spread(network, calls)
        calls = Calls(network.to(self.device))
        if self.kind == "ddp" and any(each.requires_grad for each in network.parameters()):
            # Unused are text's queries where there is one key, and in rollouts whatever prefill alone uses.
            return Spread(network, DistributedDataParallel(calls, find_unused_parameters=True))
        return Spread(network, calls)

    def _shard(self, calls: Calls, offload: OffloadPolicy) -> None:
        """Shard attention and feed-forward networks each for itself, and all the rest together.

        Not by layers, since a layer is entered in five places: its modulation and the text's keys are made for all
        layers at once, and between its two halves stands the history.
        """
        assert self.mesh is not None
        # It warns of every view, in case somebody writes to it in place; nobody does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        policy = MixedPrecisionPolicy(self.precision, torch.float32, cast_forward_inputs=False)
        for module in calls.modules():
            if isinstance(module, Attention):
                fully_shard(module, mesh=self.mesh, mp_policy=policy, offload_policy=offload)
                for method in ("queries", "keys_values", "project"):
                    register_fsdp_forward_method(module, method)
            if isinstance(module, Layer):
                fully_shard(module.ffn, mesh=self.mesh, mp_policy=policy, offload_policy=offload)
        # In shards between calls, so that averages and checkpoints find them so.
        fully_shard(calls, mesh=self.mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=True)

    def agree(self, *claims: bool) -> list[bool]:
        """Which of the claims any process makes."""
        if self.kind == "single":
            return list(claims)
        votes = torch.tensor(claims, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes]

    def mean(self, figures: dict[str, float]) -> dict[str, float]:
        """The mean of each figure over the processes."""
        if self.kind == "single" or not figures:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float64)
        dist.all_reduce(values)
        return dict(zip(figures, (values / self.share.world).tolist(), strict=True))

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, on all processes."""
        if self.kind == "single":
            return make()
        made: list[Any] = [make() if self.is_first else None]
        dist.broadcast_object_list(made, src=0)
        value: T = made[0]
        return value


SINGLE = Strategy()


def recomputing(network: Network) -> Network:
    """The network, which keeps for the way back what enters the two halves of a layer, and makes the rest again.

    A clip of the public network would otherwise keep some 200 GB. The history is not made again: it has a state.
    """
    halves: list[tuple[nn.Module, str]] = [(network.audio_injector, "forward")]
    halves += [(layer, half) for layer in network.layers for half in ("project", "forward")]
    for module, method in halves:
        setattr(module, method, partial(checkpoint, getattr(module, method), use_reentrant=False))
    return network


def join(kind: str, precision: torch.dtype = torch.bfloat16) -> Strategy:
    """This process's strategy; the other kinds than `single` join the group that torchrun started.

    GPUs are used where there are any, one for a process. Shards lie on the GPUs of one machine, and machines repeat
    each other. ValueError if the kind is unknown, or torchrun did not start this program.
    """
    if kind not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {kind!r}")
    has_gpu = torch.cuda.is_available()
    if kind == "single":
        return Strategy(kind, Share(), torch.device("cuda" if has_gpu else "cpu"), precision)
    if not dist.is_torchelastic_launched():
        raise ValueError(f"strategy {kind} is started by torchrun: torchrun --nproc-per-node N -m ...")
    # Agreements travel on the CPU, gradients where the network is.
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
    if has_gpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    return grouped(kind, device, precision, int(os.environ["LOCAL_WORLD_SIZE"]))


def grouped(kind: str, device: torch.device, precision: torch.dtype, num_local: int) -> Strategy:
    """The strategy of a process whose group is there; num_local: processes of one machine."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = None
    if kind == "fsdp2":
        many = world > num_local
        shape, names = ((world // num_local, num_local), ("machine", "shard")) if many else ((world,), ("shard",))
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return Strategy(kind, Share(rank, world), device, precision, mesh)


def leave(strategy: Strategy) -> None:
    """The end of a process of a group."""
    if strategy.kind != "single":
        dist.destroy_process_group()
