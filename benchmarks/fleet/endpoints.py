"""A fleet of stand-in workers in one process: `python -m benchmarks.fleet.endpoints` reads a `Fleet` as JSON.

Each worker has a server of its own and admits streams as in the product; all are registered by one call at a time.
Steps take no time. `step_s` of a worker's description is the time at which it was made, so that a reader can tell its
age.
"""

import asyncio
import json
import sys
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from avatar.aio import background
from avatar.rpc.server import serving, until_stopped
from avatar.runtime.device_queue import DeviceQueue
from avatar.store.redis import RedisHashes
from avatar.store.registry import WorkerRegistry
from avatar.worker.v1.discovery_pb2 import WorkerState
from benchmarks.standin.service import AudioServicer, DenoiserServicer, Stage, VaeServicer
from benchmarks.standin.step import Step
from services.registration import HEARTBEAT_S, SETTLE_S, WorkerServicer


@dataclass(frozen=True)
class Fleet:
    """targets: HOST:PORT of the workers of each stage. limits: streams at a time at each worker, else 1000.

    full: stages whose workers have all of their streams taken, but for the first `num_free` of each.
    """

    redis_url: str
    targets: dict[str, list[str]]
    limits: dict[str, int] = field(default_factory=dict)
    full: list[str] = field(default_factory=list)
    num_free: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def worker(name: str, stage: Stage) -> WorkerServicer:
    """Return the worker of a stage: `audio`, `denoiser-N` or `vae`."""
    kind, _, level = name.partition("-")
    servicer: Any = {"audio": AudioServicer, "vae": VaeServicer}.get(kind)
    return servicer(stage) if servicer else DenoiserServicer(stage, int(level))


async def register(registry: WorkerRegistry, workers: dict[str, WorkerServicer], changed: asyncio.Event) -> None:
    """Write the states of all workers at every heartbeat, and soon after a change."""
    while True:
        changed.clear()
        states = []
        for target, served in workers.items():
            info = served.info()
            info.step_s = time.time()
            states.append(WorkerState(address=target, **{served.stage: info}))
        await registry.write(*states)
        with suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_S):
                await changed.wait()
        await asyncio.sleep(SETTLE_S)


async def main() -> None:
    fleet = Fleet(**json.loads(sys.stdin.readline()))
    hashes = RedisHashes(fleet.redis_url)
    registry = WorkerRegistry(hashes, "main")
    async with AsyncExitStack() as stack:
        changed, workers = asyncio.Event(), {}
        for name, targets in fleet.targets.items():
            limit = fleet.limits.get(name, 1000)
            for index, target in enumerate(targets):
                queue = stack.enter_context(DeviceQueue())
                stage = Stage(name.partition("-")[0], Step(0.0), queue, limit, history_blocks=1)
                is_full = name in fleet.full and index >= fleet.num_free
                for number in range(limit if is_full else 0):
                    stack.enter_context(stage.admission.accept(f"other-{number}", is_live=True))
                stage.admission.on_change = changed.set
                workers[target] = worker(name, stage)
                await stack.enter_async_context(serving(target, workers[target]))
        await stack.enter_async_context(background(register(registry, workers, changed)))
        print("ready", flush=True)
        await until_stopped()


if __name__ == "__main__":
    asyncio.run(main())
