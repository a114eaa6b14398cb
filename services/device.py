"""Where a worker computes, and in what."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from avatar.device import Device
from avatar.settings import PREFIX, WorkerSettings


def device_and_dtype(settings: WorkerSettings) -> tuple[torch.device, torch.dtype]:
    """The settings' device and dtype as torch knows them. ValueError if this machine has no such device."""
    device, num_cuda = torch.device(settings.device), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_cuda:
        raise ValueError(f"{PREFIX}DEVICE is {settings.device!r}, this machine has {num_cuda} CUDA devices")
    return device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]


def device_of(settings: WorkerSettings) -> Device:
    """The settings' device, to be entered. A GPU is told what to do and does it later: its thread waits for it."""
    where, _ = device_and_dtype(settings)
    return Device(partial(torch.cuda.synchronize, where) if where.type == "cuda" else None)


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Say which setting it was whose value a model could not use."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{PREFIX}{setting.upper()}: {error}") from error
