"""What processes use, and what is started beside them."""

import asyncio
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import psutil

from services.local.launch import ENVIRONMENT, ROOT

if TYPE_CHECKING:
    from benchmarks.pipeline.client import Job, Report


def cpu_seconds(pids: list[int]) -> float:
    """Time of the processor that these processes and this one have had, in seconds."""
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in [*pids, os.getpid()])


def own_megabytes(pid: int) -> float:
    """Memory of a process that is shared with nobody, in MB."""
    return float(psutil.Process(pid).memory_full_info().uss / 1e6)


async def started(*program: str, **options: Any) -> asyncio.subprocess.Process:
    """A Python program that ends with this one, with pipes to talk over."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.local.child", str(os.getpid()), sys.executable, *program),
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        **options,
    )


async def clients(job: "Job", limit_s: float) -> "Report":
    """What clients in a process of their own report. TimeoutError if they are not done in time."""
    from benchmarks.pipeline.client import Heard, Report

    process = await started("-m", "benchmarks.pipeline.client")
    try:
        async with asyncio.timeout(limit_s):
            told, _ = await process.communicate(json.dumps(asdict(job)).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"the clients ended with {process.returncode}")
    report = json.loads(told)
    return Report([Heard(**each) for each in report["sessions"]], report["cpu_s"])
