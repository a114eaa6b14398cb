"""Where a worker computes, and in what."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from avatar.checkpoints.files import is_native
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import PREFIX, WorkerSettings

logger = logging.getLogger(__name__)


def device_and_dtype(settings: WorkerSettings) -> tuple[torch.device, torch.dtype]:
    """The settings' device and dtype as torch knows them. ValueError if this machine has no such device.

    Says in the log where another dtype would be faster.
    """
    device, dtype = _device(settings), {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    if not is_native(dtype, device):
        hint = f"{PREFIX}DTYPE=float32 is many times faster here"
        logger.warning("processor without bfloat16 instructions", extra={"hint": hint})
    return device, dtype


def open_device_queue(settings: WorkerSettings) -> DeviceQueue:
    """The settings' device, to be entered. A GPU is told what to do and does it later: its thread waits for it."""
    where = _device(settings)
    return DeviceQueue(partial(torch.cuda.synchronize, where) if where.type == "cuda" else None)


def _device(settings: WorkerSettings) -> torch.device:
    device, num_cuda = torch.device(settings.device), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_cuda:
        raise ValueError(f"{PREFIX}DEVICE is {settings.device!r}, this machine has {num_cuda} CUDA devices")
    return device


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Say which setting it was whose value a model could not use."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{PREFIX}{setting.upper()}: {error}") from error
