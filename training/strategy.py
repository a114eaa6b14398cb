"""Distribution of a run over processes: one process, DDP or FSDP2, the latter two started by torchrun.

All processes draw the same decisions (batch, number of blocks, exit level) from the same seeds, so decisions are never
sent. Each process takes its share of a batch's clips, with the noise that these clips have in any distribution. Clocks,
signals and folder listings can differ between processes; they are reduced over all processes or broadcast by the first.
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


class FunctionCall(nn.Module):
    """A module whose forward calls a function that uses the network.

    It gives DDP and FSDP2 one forward pass to hook, whichever of the network's methods the function calls.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, function: Callable[..., T], *values: Any) -> T:
        return function(*values)


class WrappedNetwork:
    """A network under a strategy. All processes must call the same functions through it, in the same order.

    network: under FSDP2 its parameters are shards, gathered only inside a call.
    """

    def __init__(self, network: Network, call: FunctionCall | DistributedDataParallel) -> None:
        self.network = network
        self._call = call

    def __call__(self, function: Callable[..., T], *values: Any) -> T:
        """Call a function that uses the network."""
        result: T = self._call(function, *values)
        return result

    def accumulate_gradients(self, is_last: bool) -> AbstractContextManager[None]:
        """Enter around a call and its backward pass: gradients accumulate and are reduced only with the last one.

        FSDP2 reduces every time, because keeping them would take the memory of unsharded gradients.
        """
        if is_last or not isinstance(self._call, DistributedDataParallel):
            return nullcontext()
        context: AbstractContextManager[None] = self._call.no_sync()
        return context


@dataclass(frozen=True)
class Strategy:
    """One process of a run.

    precision: of matrix products; float32 where the device lacks instructions for the requested dtype. Weights,
    gradients and their reductions are float32. mesh: of FSDP2's processes.
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
        """True for the process that writes the run's files."""
        return self.share.rank == 0

    def autocast(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, self.precision, enabled=self.precision != torch.float32
        )
        return context

    def wrap(self, network: Network, is_offloaded: bool = False) -> WrappedNetwork:
        """Move a network to this process's device, replicated or sharded. It must be the same on all processes.

        is_offloaded: FSDP2 keeps the shards in main memory.
        """
        if self.mesh is not None:
            call = FunctionCall(network)
            self._shard(call, CPUOffloadPolicy() if is_offloaded else OffloadPolicy())
            return WrappedNetwork(network, call)
        call = FunctionCall(network.to(self.device))
        if self.kind == "ddp" and any(each.requires_grad for each in network.parameters()):
            # Unused parameters: the text queries when there is one key, and in self-forcing those that only prefill
            # uses.
            return WrappedNetwork(network, DistributedDataParallel(call, find_unused_parameters=True))
        return WrappedNetwork(network, call)

    def _shard(self, call: FunctionCall, offload: OffloadPolicy) -> None:
        """Shard each attention and each feed-forward network as a unit of its own, and the rest as one.

        Layers cannot be the units, because a layer is entered at five points: its modulation and the text keys are
        computed for all layers at once, and the history sits between its two halves.
        """
        assert self.mesh is not None
        # FSDP2 warns of every returned view, because an in-place write to it would be an error; none happens here.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        policy = MixedPrecisionPolicy(self.precision, torch.float32, cast_forward_inputs=False)
        for module in call.modules():
            if isinstance(module, Attention):
                fully_shard(module, mesh=self.mesh, mp_policy=policy, offload_policy=offload)
                for method in ("queries", "keys_values", "project"):
                    register_fsdp_forward_method(module, method)
            if isinstance(module, Layer):
                fully_shard(module.ffn, mesh=self.mesh, mp_policy=policy, offload_policy=offload)
        # Sharded between calls, so that the EMA and checkpoints see shards.
        fully_shard(call, mesh=self.mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=True)

    def any_of(self, *flags: bool) -> list[bool]:
        """Reduce flags over all processes: true where any process has it set."""
        if self.kind == "single":
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes]

    def mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """Average each metric over all processes."""
        if self.kind == "single" or not metrics:
            return metrics
        values = torch.tensor(list(metrics.values()), dtype=torch.float64)
        dist.all_reduce(values)
        return dict(zip(metrics, (values / self.share.world).tolist(), strict=True))

    def broadcast(self, make: Callable[[], T]) -> T:
        """Call a function on the first process and return its result on all."""
        if self.kind == "single":
            return make()
        made: list[Any] = [make() if self.is_first else None]
        dist.broadcast_object_list(made, src=0)
        value: T = made[0]
        return value


SINGLE = Strategy()


def checkpoint_activations(network: Network) -> Network:
    """Recompute activations in the backward pass: only the inputs of each layer's two halves are kept.

    Without it a clip of the public network keeps about 200 GB. The history stands between the halves and is not
    recomputed, because it has state.
    """
    injectors = [network.audio_injector, *([network.heard_injector] if network.config.heard_inject_layers else [])]
    halves: list[tuple[nn.Module, str]] = [(injector, "forward") for injector in injectors]
    halves += [(layer, half) for layer in network.layers for half in ("project", "forward")]
    for module, method in halves:
        setattr(module, method, partial(checkpoint, getattr(module, method), use_reentrant=False))
    return network


def join(kind: str, is_float32: bool = False) -> Strategy:
    """Return this process's strategy. Kinds other than `single` join the process group that torchrun started.

    Each process takes one GPU where there are any. FSDP2 shards within a machine and replicates between machines.
    is_float32: of matrix products; else bfloat16 where the device has instructions for it.
    ValueError if the kind is unknown, or if torchrun did not start this program.
    """
    if kind not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {kind!r}")
    has_gpu = torch.cuda.is_available()
    precision = torch.float32 if is_float32 else torch.bfloat16
    if kind == "single":
        return Strategy(kind, Share(), torch.device("cuda" if has_gpu else "cpu"), precision)
    if not dist.is_torchelastic_launched():
        raise ValueError(f"strategy {kind} needs torchrun: torchrun --nproc-per-node N -m ...")
    # Flags and metrics are reduced on the CPU, gradients on the network's device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
    if has_gpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    return strategy_of_group(kind, device, precision, int(os.environ["LOCAL_WORLD_SIZE"]))


def strategy_of_group(kind: str, device: torch.device, precision: torch.dtype, num_local: int) -> Strategy:
    """Return the strategy of a process whose group is initialised. num_local: processes per machine."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = None
    if kind == "fsdp2":
        many = world > num_local
        shape, names = ((world // num_local, num_local), ("machine", "shard")) if many else ((world,), ("shard",))
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return Strategy(kind, Share(rank, world), device, precision, mesh)


def leave(strategy: Strategy) -> None:
    """Destroy the process group, if the strategy has one."""
    if strategy.kind != "single":
        dist.destroy_process_group()
