"""Random orders of messages, legal or not: each is answered or refused as documented, and nothing hangs or leaks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from avatar.errors import REASONS
from avatar.settings import GatewaySettings
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from services.local.suite import suite
from tests.conftest import ASSETS
from tests.product import CLOSE, END_TURN, INTERRUPT, connected, new_session, opening, say, speak
from tests.services.voice.fakes import ToneEngine, voice_worker

Result = TypeVar("Result")
SETTINGS = GatewaySettings(listen="127.0.0.1:0", resume_s=0.5, max_unread_s=5.0)
# A client that writes while it is refused may read INTERNAL: grpc issue 36066.
CODES = {each.code for each in REASONS.values()} | {grpc.StatusCode.OK}
WAIT_S = 20.0
MODES = strategies.sampled_from([pb.OpenAvatar.MODE_LIVE, pb.OpenAvatar.MODE_OFFLINE])
MESSAGES = {
    "speech": pb.StreamAvatarRequest(audio=pb.AudioPiece(data=b"\1\0" * 4000)),
    "nothing": pb.StreamAvatarRequest(audio=pb.AudioPiece()),
    "half a sample": pb.StreamAvatarRequest(audio=pb.AudioPiece(data=b"\1")),
    "text": say("Good day. And so on"),
    "listen": pb.StreamAvatarRequest(listen=pb.HeardAudio(data=b"\1\0" * 4000)),
    "end": END_TURN,
    "interrupt": INTERRUPT,
    "close": CLOSE,
    "empty": pb.StreamAvatarRequest(),
    "open": opening("another"),
}
VALID = strategies.sampled_from(["speech", "speech", "speech", "listen", "end", "interrupt"])


class Gateway:
    """A suite with room for two streams, and the event loop that it runs in."""

    def __init__(self, checkpoint: Path, redis_url: str) -> None:
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.run(self._start(checkpoint, redis_url))

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        async def bounded() -> Result:
            async with asyncio.timeout(WAIT_S):
                return await coroutine

        return self.runner.run(bounded())

    async def _start(self, checkpoint: Path, redis_url: str) -> None:
        store = SessionStore(RedisHashes(redis_url))
        self.stack.push_async_callback(store.aclose)
        voice = await self.stack.enter_async_context(voice_worker(store, ToneEngine()))
        with_voice = SETTINGS.model_copy(update={"voice": (voice,)})
        target = await self.stack.enter_async_context(suite(checkpoint, store, with_voice, capacity=2))
        self.stub = await self.stack.enter_async_context(connected(target))
        self.num_tasks = len(asyncio.all_tasks())

    def close(self) -> None:
        self.run(self.stack.aclose())
        self.runner.close()


async def read(call: Any) -> grpc.StatusCode:
    """Read a call to its end; return its status."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
    return grpc.StatusCode.OK


class AnyOrder(RuleBasedStateMachine):
    """One session, and the streams that a client opens of it."""

    gateway: Gateway

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.reading: list[asyncio.Future[grpc.StatusCode]] = []
        portrait = (ASSETS / "portrait.png").read_bytes()
        self.session = self.gateway.run(new_session(self.gateway.stub, portrait))

    @rule(mode=MODES, per_block=strategies.booleans(), return_audio=strategies.booleans())
    def open(self, mode: Any, per_block: bool, return_audio: bool) -> None:
        output = types.VideoOutput(per_block=per_block)
        self._start_call(opening(self.session.id, mode=mode, output=output, return_audio=return_audio))

    @rule(next_frame=strategies.sampled_from([0, 3, 4, 15, 1000]))
    def resume(self, next_frame: int) -> None:
        resume = pb.ResumeAvatar(next_frame=next_frame)
        self._start_call(pb.StreamAvatarRequest(open=pb.OpenAvatar(session_id=self.session.id, resume=resume)))

    @precondition(lambda self: self.calls)
    @rule(name=VALID)
    def send(self, name: str) -> None:
        self.gateway.run(self._write(self.calls[-1], MESSAGES[name]))

    @precondition(lambda self: self.calls)
    @rule(name=strategies.sampled_from(sorted(MESSAGES)))
    def send_anything(self, name: str) -> None:
        self.gateway.run(self._write(self.calls[-1], MESSAGES[name]))

    @rule(seconds=strategies.sampled_from([0.02, 0.2, SETTINGS.resume_s + 0.1]))
    def wait(self, seconds: float) -> None:
        self.gateway.run(asyncio.sleep(seconds))

    @precondition(lambda self: self.calls)
    @rule(is_abrupt=strategies.booleans())
    def leave(self, is_abrupt: bool) -> None:
        call = self.calls[-1]
        if is_abrupt:
            call.cancel()
        else:
            self.gateway.run(self._end(call))

    @rule()
    def interrupt_from_elsewhere(self) -> None:
        async def interrupt() -> grpc.StatusCode:
            try:
                await self.gateway.stub.Interrupt(pb.InterruptRequest(session_id=self.session.id), timeout=5)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        assert self.gateway.run(interrupt()) in CODES

    def teardown(self) -> None:
        assert self.gateway.run(self._ended()) <= CODES

    async def _ended(self) -> set[grpc.StatusCode]:
        """End all streams, check that their resources are free, and return their statuses."""
        for call in self.calls:
            await self._end(call)
        codes = set(await asyncio.gather(*self.reading))
        await asyncio.sleep(SETTINGS.resume_s + 0.1)
        # The workers have room for two streams: none of the earlier ones is open.
        portrait = (ASSETS / "portrait.png").read_bytes()
        sessions = [await new_session(self.gateway.stub, portrait) for _ in range(2)]
        await asyncio.gather(*(speak(self.gateway.stub, session.id, bytes(4000)) for session in sessions))
        async with asyncio.timeout(2):
            while len(asyncio.all_tasks()) > self.gateway.num_tasks:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # the last handlers end without a signal
        return codes

    def _start_call(self, first: pb.StreamAvatarRequest) -> None:
        async def start() -> Any:
            call = self.gateway.stub.StreamAvatar(timeout=WAIT_S)
            await self._write(call, first)
            self.reading.append(asyncio.ensure_future(read(call)))
            return call

        self.calls.append(self.gateway.run(start()))

    async def _write(self, call: Any, request: pb.StreamAvatarRequest) -> None:
        # If the call has ended, its reader gets the status.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            await call.write(request)

    async def _end(self, call: Any) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            await call.done_writing()


def test_messages_in_any_order_are_answered_or_refused_and_leave_nothing_behind(
    listening_checkpoint: Path, redis: str
) -> None:
    gateway = Gateway(listening_checkpoint, redis)
    try:
        AnyOrder.gateway = gateway
        run_state_machine_as_test(
            AnyOrder,
            settings=settings(
                max_examples=4,
                stateful_step_count=12,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        gateway.close()
