"""Resources that processes use, and Python programs started as child processes."""

import asyncio
import os
import sys
from typing import Any

import psutil

from services.local.processes import ENVIRONMENT, ROOT


def cpu_seconds(pids: list[int]) -> float:
    """Return the CPU time of these processes and this one, in seconds."""
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in [*pids, os.getpid()])


def unshared_megabytes(pid: int) -> float:
    """Return a process's memory that it shares with no other, in MB."""
    return float(psutil.Process(pid).memory_full_info().uss / 1e6)


async def start_program(*program: str, **options: Any) -> asyncio.subprocess.Process:
    """Start a Python program that ends with this process, with pipes to its standard input and output."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.local.child", str(os.getpid()), sys.executable, *program),
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        **options,
    )
