"""Playback events of random turns, gaps and interrupts, over stand-in stages in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, cast

from hypothesis import example, given, settings
from hypothesis import strategies as st

from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as api
from avatar.worker.v1 import types_pb2
from services.gateway.options import StreamOptions
from tests.conftest import speech
from tests.product import CLOSE, END_TURN, INTERRUPT, connected, finish, new_session, open_stream, pieces, send
from tests.services.gateway.clock import VirtualTimeLoop
from tests.services.gateway.test_live_stream import LIVE, OFFLINE, Decoder, Pipeline
from tests.standin import standin_gateway

RATE_HZ = 16000


@dataclass(frozen=True)
class Say:
    """Audio of so many samples."""

    num_samples: int


@dataclass(frozen=True)
class Wait:
    """A gap between two messages."""

    seconds: float


@dataclass(frozen=True)
class Delays:
    """Seconds that a level takes for a block, the decoder for a block, and the client for a message."""

    level_s: float = 0.0
    decoder_s: float = 0.0
    client_s: float = 0.0


Step = Say | Wait | api.StreamAvatarRequest
SAY = st.builds(Say, st.one_of(st.sampled_from([1, 7680, 15360]), st.integers(1, 40000)))
WAIT = st.builds(Wait, st.sampled_from([0.0, 0.05, 0.3, 0.6, 2.0]))
STEPS = st.lists(st.one_of(SAY, SAY, WAIT, st.just(END_TURN), st.just(END_TURN), st.just(INTERRUPT)), max_size=14)
DELAY = st.sampled_from([0.0, 0.02, 0.2, 0.9])
DELAYS = st.builds(Delays, DELAY, DELAY, st.sampled_from([0.0, 0.01, 0.5]))


class Gate:
    """Opens after a delay."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def acquire(self) -> None:
        await asyncio.sleep(self._seconds)


class FrameDecoder(Decoder):
    """A decoder that answers a block with all its frames, one after another."""

    async def __call__(self, items: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        async with aclosing(super().__call__(items)) as blocks:
            async for answer in blocks:
                last = 11 if answer.block else 8
                for index in range(last + 1):
                    yield types_pb2.Frame(block=answer.block, is_last=index == last)
                    await asyncio.sleep(0.001)


class Conversation(Pipeline):
    """A pipeline that takes its time, and what the client of it sends and receives.

    turns: samples that were sent in each turn.
    """

    def __init__(self, options: StreamOptions, delays: Delays) -> None:
        super().__init__(options=options, now=asyncio.get_running_loop().time)
        self.turns = [0]
        self.decoder = FrameDecoder("vae")
        self.stream._stages.vae = cast(Any, self.decoder)
        self._client_s = delays.client_s
        for stage in self.denoisers:
            stage.gate = Gate(delays.level_s)  # type: ignore[assignment]
        self.decoder.gate = Gate(delays.decoder_s)  # type: ignore[assignment]

    async def hold(self, steps: list[Step]) -> None:
        """Take the steps, close, and read to the end."""
        async with self.running() as task:
            for step in steps:
                await self._take(step)
            await self.stream.receive(CLOSE)
            await task
            self.stream.outbox.finish()
            await self.stream.outbox.is_drained.wait()

    async def _take(self, step: Step) -> None:
        match step:
            case Wait():
                await asyncio.sleep(step.seconds)
            case Say():
                audio = api.AudioPiece(data=bytes(2 * step.num_samples))
                await self.stream.receive(api.StreamAvatarRequest(audio=audio))
                self.turns[-1] += step.num_samples
            case _:
                await self.stream.receive(step)
                answer = self.stream.outbox._waiting[-1].messages[0].interrupted if step == INTERRUPT else None
                if answer is None or answer.was_speaking:
                    self.turns.append(0)

    async def _write(self, response: api.StreamAvatarResponse) -> None:
        await asyncio.sleep(self._client_s)
        await super()._write(response)


def received(options: StreamOptions, steps: list[Step], delays: Delays) -> Conversation:
    async def run() -> Conversation:
        conversation = Conversation(options, delays)
        await conversation.hold(steps)
        return conversation

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(run())


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([LIVE, OFFLINE, replace(LIVE, is_per_block=True)]), STEPS, DELAYS)
@example(LIVE, [END_TURN, END_TURN], Delays(decoder_s=0.9))
@example(OFFLINE, [END_TURN, INTERRUPT, Say(1), END_TURN, INTERRUPT, END_TURN], Delays(decoder_s=0.9))
def test_events_come_in_the_order_of_turns_and_every_turn_is_finished_once(
    options: StreamOptions, steps: list[Step], delays: Delays
) -> None:
    conversation = received(options, [Say(10000), *steps], delays)
    turns, playing = conversation.turns, None
    finished: list[int] = []
    started: list[int] = []
    for response in conversation.sent:
        event: Any = response.event
        match event.WhichOneof("kind") or response.WhichOneof("part"):
            case "playback_started":
                playing = event.playback_started.turn
                assert playing == len(finished), "the turns before it are finished"
                started.append(playing)
            case "playback_finished":
                end = event.playback_finished
                assert end.turn == len(finished)
                assert end.interrupted or end.position_us == turns[end.turn] * 1_000_000 // RATE_HZ
                assert end.position_us == 0 or end.turn in started
                finished.append(end.turn)
                playing = None
            case "frame" | "chunk":
                shown = [response.frame] if response.HasField("frame") else response.chunk.frames
                assert shown[0].is_idle or playing is not None
    assert len(finished) == len(turns) - (turns[-1] == 0)
    assert started == sorted(set(started))


async def test_a_gateway_finishes_turns_in_order(store: SessionStore, picture: bytes) -> None:
    async with standin_gateway(store) as gateway, connected(gateway.target) as stub:
        session = await new_session(stub, picture)
        call, _ = await open_stream(stub, session.id, mode=api.OpenAvatar.MODE_LIVE)
        await send(call, [*pieces(speech(0.6)), END_TURN, END_TURN, *pieces(speech(0.3)), END_TURN, END_TURN, CLOSE])
        events = (await finish(call, ())).events
    turns = [(kind := event.WhichOneof("kind"), getattr(event, str(kind)).turn) for event in events]
    start, end = "playback_started", "playback_finished"
    assert turns == [(start, 0), (end, 0), (end, 1), (start, 2), (end, 2), (end, 3)]
