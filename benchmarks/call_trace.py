"""Count how often one block crosses from file to file: `python -m benchmarks.call_trace [--checkpoint models/tiny]`.

All services run in this process on one event loop, one offline stream speaks the shipped clip twice, and the calls of
eight blocks in mid-stream are traced on the event loop's thread. An *entry* is a call of a function of the file, or the
resumption of one of its coroutines; a *change* is a call or return from one file of avatar/ or services/ to another.
Figures are means per block. Discovery of workers, which belongs to no block, is switched off meanwhile; a renewal
of quotas, every few seconds, may enter one file more.
"""

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import grpc.aio

from avatar.failover import discovery, pool
from avatar.media import read_audio
from avatar.settings import GatewaySettings
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types
from services import registration
from services.local.processes import local_redis
from services.local.suite import suite

# Seconds between writes and reads of the registry: none happens while blocks are traced.
registration.HEARTBEAT_S = discovery.READ_EVERY_S = pool.REPORT_EVERY_S = pool.ASK_EVERY_S = 3600.0

ROOT = Path(__file__).parents[1]
FIRST_BLOCK, NUM_BLOCKS = 6, 8
PIECE_S = 0.48


class CallTrace:
    """Calls of the product's functions on this thread, from `start` to `stop`.

    calls: by file; a coroutine or generator that goes on counts as called again. num_changes: calls and returns that
    went from one file to another.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.num_changes = 0
        self._current = ""
        self._names: dict[CodeType, str] = {}

    def start(self) -> None:
        sys.setprofile(self._note)

    def stop(self) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        name = self._name(frame)
        if not name or event not in ("call", "return"):
            return
        if event == "call":
            self.calls[name] += 1
        else:
            caller = frame.f_back
            while caller and not self._name(caller):
                caller = caller.f_back
            name = self._name(caller) if caller else ""
        self.num_changes += name not in ("", self._current)
        self._current = name

    def _name(self, frame: FrameType) -> str:
        """The file of a frame, relative to the repository; empty if it is not one of the product's."""
        code = frame.f_code
        if code not in self._names:
            name = code.co_filename.removeprefix(f"{ROOT}/")
            self._names[code] = name if name.startswith(("avatar/", "services/")) else ""
        return self._names[code]


async def traced(target: str) -> CallTrace:
    """Stream the shipped clip through a gateway of this process and trace its blocks in mid-stream."""
    samples, rate_hz = read_audio(ROOT / "assets/speech.wav")
    trace = CallTrace()
    async with grpc.aio.insecure_channel(target, options=[("grpc.max_receive_message_length", 1 << 24)]) as channel:
        stub: Any = pb_grpc.AvatarServiceStub(channel)
        picture = (ROOT / "assets/portrait.png").read_bytes()
        reference = (await stub.CreateReference(pb.CreateReferenceRequest(picture=picture))).reference
        session = (await stub.CreateSession(pb.CreateSessionRequest(reference_id=reference.id, seed=420))).session
        block_frames = (await stub.GetCapabilities(pb.GetCapabilitiesRequest())).block_frames
        call = stub.StreamAvatar()
        audio = types.AudioFormat(encoding=types.SAMPLE_ENCODING_FLOAT32, rate_hz=rate_hz, num_channels=1)
        await call.write(pb.StreamAvatarRequest(open=pb.OpenAvatar(session_id=session.id, audio=audio)))

        async def speak() -> None:
            size = round(PIECE_S * rate_hz)
            for start in (*range(0, samples.shape[1], size), *range(0, samples.shape[1], size)):
                data = samples[:1, start : start + size].tobytes()
                await call.write(pb.StreamAvatarRequest(audio=pb.AudioPiece(data=data)))
            await call.write(pb.StreamAvatarRequest(close=pb.CloseAvatar()))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(speak())
            steps: dict[int, Callable[[], None]] = {
                FIRST_BLOCK * block_frames: trace.start,
                (FIRST_BLOCK + NUM_BLOCKS) * block_frames: trace.stop,
            }
            async for response in call:
                if response.HasField("frame") and (step := steps.get(response.frame.index)):
                    step()
    return trace


async def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.call_trace", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "models/tiny", help="folder of the models")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as folder:
        async with local_redis(Path(folder)) as redis_url:
            settings = GatewaySettings(listen="127.0.0.1:0", redis_url=redis_url)
            store = SessionStore(RedisHashes(redis_url))
            async with suite(flags.checkpoint, store, settings) as target:
                trace = await traced(target)
            await store.aclose()
    print(f"a block: {len(trace.calls)} files, {trace.num_changes / NUM_BLOCKS:.0f} changes of file; entries:")
    for name, count in trace.calls.most_common():
        print(f"{count / NUM_BLOCKS:6.1f}  {name}")


if __name__ == "__main__":
    asyncio.run(main())
