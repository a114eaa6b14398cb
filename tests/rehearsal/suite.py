"""Two layouts of a published checkpoint as processes, and what happens to them from start to end."""

import asyncio
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from google.protobuf.field_mask_pb2 import FieldMask

from avatar.aio import background
from avatar.checkpoints.layouts import open_part
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import Network
from avatar.v1 import avatar_service_pb2 as pb
from services.local.processes import Suite, free_ports, start_redis, until_healthy
from tests.collector import collecting
from tests.conftest import speech
from tests.product import CLOSE, Call, Streamed, Stub, answer, connected, finish, new_reference, opening, pieces, send
from tests.published import ADAPTER
from tests.refusals import refused
from tests.rehearsal.timeline import Bar, bars

SIDE = 64  # of the videos, in pixels
NUM_BLOCKS, BLOCK_FRAMES = 20, 12
NUM_FITTING = 2.5  # sessions in a device's memory: a third one is refused
LIMIT_S = 600.0
# Processes by name: the services of each, and its levels.
LAYOUTS: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "one-device": {"device": (("audio", "denoiser", "vae"), "all"), "text": (("text",), "")},
    "four-levels": {
        "audio": (("audio",), ""),
        **{f"denoiser-{level}": (("denoiser",), str(level)) for level in range(4)},
        "vae": (("vae",), ""),
        "text": (("text",), ""),
    },
}
# The process that is killed while blocks are under way.
KILLED = {"one-device": "device", "four-levels": "denoiser-1"}


@dataclass
class Rehearsal:
    """A suite, and what has happened to it.

    events: wall clock in nanoseconds, and a few words. statuses: of the processes after the end.
    """

    suite: Suite
    checkpoint: Path
    layout: str
    endpoint: str
    events: list[tuple[int, str]] = field(default_factory=list)
    work: list[Bar] = field(default_factory=list)
    streamed: list[Streamed] = field(default_factory=list)
    statuses: dict[str, int | None] = field(default_factory=dict)
    refusal: str = ""

    def note(self, text: str) -> None:
        self.events.append((time.time_ns(), text))

    async def start(self, name: str) -> None:
        """Start a process of the layout, or start it again."""
        services, levels = LAYOUTS[self.layout][name]
        module: tuple[str, ...] = ("services.device", *services) if name == "device" else (f"services.{services[0]}",)
        settings = {"AVATAR_CHECKPOINT": str(self.checkpoint), "AVATAR_LEVELS": levels or "all"}
        settings |= {"AVATAR_ADAPTER": str(self.checkpoint / ADAPTER), "AVATAR_SIZES": f"{SIDE}x{SIDE}"}
        state, shared = stream_bytes(self.checkpoint)
        if name == "device":
            module = ("tests.capped_allocator", str(int(NUM_FITTING * 4 * state)), *module)
        else:
            settings["AVATAR_MEMORY_GB"] = str(NUM_FITTING * (state + shared) / 1e9)
        await self._start(name, module, settings)

    async def start_gateway(self) -> None:
        targets = self.suite.targets
        of = {service: name for name, (services, _) in LAYOUTS[self.layout].items() for service in services}
        denoisers = [targets[name] for name, (services, _) in LAYOUTS[self.layout].items() if "denoiser" in services]
        settings = {f"AVATAR_{service.upper()}": targets[of[service]] for service in ("audio", "vae", "text")}
        settings |= {"AVATAR_DENOISERS": ",".join(denoisers), "AVATAR_REBUILD_S": "300"}
        await self._start("gateway", ("services.gateway",), settings)

    async def _start(self, name: str, module: tuple[str, ...], settings: dict[str, str]) -> None:
        common = {"AVATAR_LISTEN": self.suite.targets[name], "AVATAR_REDIS_URL": self.suite.redis_url}
        common |= {"OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        common |= {"OTEL_METRICS_EXPORTER": "none", "AVATAR_DRAIN_S": "5"}
        await self.suite.start(name, sys.executable, "-m", *module, **common, **settings)


def stream_bytes(checkpoint: Path) -> tuple[int, int]:
    """Return the bytes of a session's state at a level, and of what levels of one process share."""
    config = NetworkConfig.from_dict(open_part(checkpoint, "denoiser").config)
    with torch.device("meta"):
        network = Network(config)
    return Denoiser(network, config, 0).memory(SIDE // 8, SIDE // 8)


@asynccontextmanager
async def rehearsal(layout: str, checkpoint: Path, folder: Path) -> AsyncGenerator[Rehearsal, None]:
    """Run a layout's processes until all are healthy, then the body; afterwards they are asked to end."""
    names = [*LAYOUTS[layout], "gateway"]
    redis_port, *ports = free_ports(1 + len(names))
    targets = {name: f"127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    async with collecting() as collector:
        async with Suite(folder, f"redis://127.0.0.1:{redis_port}", targets) as suite:
            found = Rehearsal(suite, checkpoint.absolute(), layout, collector.endpoint)
            found.note("start")
            await start_redis(suite, redis_port)
            for name in LAYOUTS[layout]:
                await found.start(name)
            await found.start_gateway()
            await until_healthy(suite)
            found.note("all healthy")
            yield found
        found.statuses = {name: suite.processes[name].returncode for name in names}
        found.note("drained")
        found.work = bars(collector.spans)


async def play(found: Rehearsal, picture: bytes) -> None:
    """Play two sessions: prompt, 20 blocks, another prompt, a lost worker, an interruption; a third one is refused."""
    async with connected(found.suite.gateway) as stub:
        reference = await new_reference(stub, picture, width=SIDE, height=SIDE)
        sessions = [await _session(stub, reference.id, seed) for seed in range(3)]
        call, streamed = await _open(stub, sessions[0].id), Streamed()
        found.streamed.append(streamed)
        found.note("first session, with a prompt")
        async with background(send(call, pieces(speech(0.48 * NUM_BLOCKS + 4)))):
            await _frames(call, streamed, 5)
            found.note("first frames")
            sessions[0].prompt = "a person"
            request = pb.UpdateSessionRequest(session=sessions[0], update_mask=FieldMask(paths=["prompt"]))
            update = await stub.UpdateSession(request, timeout=LIMIT_S)
            found.note(f"another prompt, from block {update.first_block} on")
            await _frames(call, streamed, update.first_block + 2)
            second = await _open(stub, sessions[1].id)
            found.note("second session")
            async with refused("NO_CAPACITY") as refusal:
                await _open(stub, sessions[2].id)
            found.refusal = refusal.message
            found.note("third session refused")
            async with background(_speak(found, second)) as speaking:
                await _frames(call, streamed, update.first_block + 5)
                await speaking
            killed = KILLED[found.layout]
            process = found.suite.processes[killed]
            process.kill()
            await process.wait()
            found.note(f"{killed} killed")
            await found.start(killed)
            await _frames(call, streamed, NUM_BLOCKS)
            found.note(f"block {NUM_BLOCKS}")
        await stub.Interrupt(pb.InterruptRequest(session_id=sessions[0].id), timeout=LIMIT_S)
        found.note("interrupted")
        await finish(call, [CLOSE], streamed)
        found.note("first session closed")


async def _session(stub: Stub, reference_id: str, seed: int) -> Any:
    request = pb.CreateSessionRequest(reference_id=reference_id, seed=seed, prompt="a person speaks")
    return (await stub.CreateSession(request, timeout=LIMIT_S)).session


async def _open(stub: Stub, session_id: str) -> Call:
    call = stub.StreamAvatar(timeout=LIMIT_S)
    await call.write(opening(session_id))
    await answer(call)
    return call


async def _frames(call: Call, streamed: Streamed, num_blocks: int) -> None:
    """Record the frames of so many blocks from the stream's start."""
    while len(streamed.frames) < num_blocks * BLOCK_FRAMES - 3:
        streamed.add(await answer(call))


async def _speak(found: Rehearsal, call: Call) -> None:
    found.streamed.append(await finish(call, [*pieces(speech(1.4)), CLOSE]))
    found.note("second session closed")


def run(layout: str, checkpoint: Path, folder: Path, picture: bytes) -> Rehearsal:
    """Rehearse a layout from start to end."""

    async def whole() -> Rehearsal:
        async with rehearsal(layout, checkpoint, folder) as found:
            await play(found, picture)
        return found

    return asyncio.run(whole())
