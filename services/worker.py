"""The process of a worker: its device, dtype, session store and server."""

import logging
import os
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from grpc_health.v1 import health, health_pb2

from avatar import telemetry
from avatar.checkpoints.files import DTYPES, is_native
from avatar.rpc.server import serving
from avatar.rpc.tls import server_credentials
from avatar.runtime.admission import Device
from avatar.runtime.device_memory import DeviceMemory
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import PREFIX, WorkerSettings
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from services.address import advertised_address
from services.registration import WorkerServicer, registered

logger = logging.getLogger(__name__)

# Share of a GPU's memory, free once the weights are loaded, that streams may take.
FREE_SHARE = 0.9
# Name of a further health check: it serves if the device keeps up with one live stream, as measured at the start.
LIVE = "live"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
# The kernel's, and therefore the same in all containers (Linux only).
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class WorkerProcess:
    """A worker's session store and device queue, to build its service from.

    serving: serves one or more services, and keeps them registered in the cell, while the body runs.
    """

    store: SessionStore
    queue: DeviceQueue
    serving: Callable[..., AbstractAsyncContextManager[None]]


@asynccontextmanager
async def worker_process(service: str, settings: WorkerSettings) -> AsyncGenerator[WorkerProcess, None]:
    """Set up this process as a worker while the body runs.

    service: its name in traces and metrics. ValueError names the setting that cannot be used.
    """
    telemetry.set_up(f"avatar-{service}", settings.log_level)
    credentials = server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    torch.set_num_threads(settings.threads)
    store = SessionStore(RedisHashes(settings.redis_url))
    try:
        with open_device_queue(settings) as queue:

            @asynccontextmanager
            async def serve(*servicers: WorkerServicer) -> AsyncGenerator[None, None]:
                async with AsyncExitStack() as stack:
                    checks = health.aio.HealthServicer()
                    server = serving(
                        settings.listen, *servicers, drain_s=settings.drain_s, credentials=credentials, checks=checks
                    )
                    address = await advertised_address(settings, await stack.enter_async_context(server))
                    await checks.set(LIVE, SERVING if queue.load.session_share <= 1 else NOT_SERVING)
                    for each in servicers:
                        await stack.enter_async_context(registered(store.workers(settings.cell), address, each))
                    yield

            yield WorkerProcess(store, queue, serve)
    finally:
        await store.aclose()


def device_and_dtype(settings: WorkerSettings) -> tuple[torch.device, torch.dtype]:
    """Return the settings' device and dtype; log a hint if another dtype is faster there.

    ValueError if this machine has no such device.
    """
    device, dtype = usable_device(settings), DTYPES[settings.dtype]
    if not is_native(dtype, device):
        hint = f"{PREFIX}DTYPE=float32 is many times faster here"
        logger.warning("processor without bfloat16 instructions", extra={"hint": hint})
    return device, dtype


def open_device_queue(settings: WorkerSettings) -> DeviceQueue:
    """Return the queue of the settings' device, a context. Calls to a GPU return early, so its queue synchronizes."""
    if settings.device.startswith("cuda") and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Read at the first allocation. Streams of several sizes would otherwise leave pieces that fit no other size.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device, limit_gb = usable_device(settings), settings.memory_gb
    memory = DeviceMemory(lambda: limit_gb * 1e9) if limit_gb else None
    if device.type == "cuda":
        # Its own name: the same GPU has another number in a process that sees others.
        name = str(torch.cuda.get_device_properties(device).uuid)
        memory = memory or DeviceMemory(partial(_free_bytes, device))
        # Of the device's thread alone: a chain's transfers have streams of their own, which may wait for a peer.
        return DeviceQueue(lambda: torch.cuda.current_stream(device).synchronize(), Device(name), memory)
    return DeviceQueue(device=Device(_machine(), num_cores(), settings.threads), memory=memory)


def _free_bytes(device: torch.device) -> float:
    """Return the free memory of a GPU, without a tenth for what steps need."""
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return FREE_SHARE * (free + cached)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine() -> str:
    """Return a name of this machine, which its containers share."""
    with suppress(OSError):
        return BOOT_ID.read_text(encoding="ascii").strip()
    return f"{uuid.getnode():x}"


def usable_device(settings: WorkerSettings) -> torch.device:
    """Return the settings' device. ValueError if this machine has no such device."""
    device, num_cuda = torch.device(settings.device), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_cuda:
        raise ValueError(f"{PREFIX}DEVICE is {settings.device!r}, this machine has {num_cuda} CUDA devices")
    return device


@contextmanager
def naming_setting(name: str) -> Iterator[None]:
    """Put the setting's variable in front of a ValueError of the body."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{PREFIX}{name.upper()}: {error}") from error
