"""The Pipecat integration in pipecat-ai's own pipelines, runner and output transport."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from loguru import logger
from pipecat.frames.frames import (
    BotStoppedSpeakingFrame,
    EndFrame,
    ErrorFrame,
    Frame,
    InterruptionFrame,
    LLMTextFrame,
    MetricsFrame,
    OutputAudioRawFrame,
    OutputImageRawFrame,
    StartFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSTextFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.tests.utils import run_test
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import TransportParams
from pipecat.workers.runner import WorkerRunner

from avatar.client import stream as client_stream
from avatar.integrations import frames as integration
from avatar.integrations.pipecat import AvatarVideoService
from avatar.store.sessions import SessionStore
from tests.conftest import speech
from tests.integrations.waiting import until
from tests.standin import standin_gateway

logger.remove()  # Pipecat logs every step
RATE_HZ = 24000
SIZE = 64, 64


def spoken(seconds: float, level: int = 1000, rate_hz: int = RATE_HZ) -> list[Frame]:
    """Return speech of one level as a TTS service pushes it: far faster than real time."""
    piece = level.to_bytes(2, "little", signed=True) * (rate_hz // 10)
    return [TTSAudioRawFrame(piece, rate_hz, 1, context_id=str(level)) for _ in range(round(seconds * 10))]


def answer(seconds: float, level: int = 1000) -> list[Frame]:
    """Return a whole answer of a TTS service."""
    return [TTSStartedFrame(), *spoken(seconds, level), TTSStoppedFrame()]


def samples(frames: Sequence[Frame]) -> list[int]:
    """Return the samples of all speech in frames."""
    data = b"".join(frame.audio for frame in frames if isinstance(frame, TTSAudioRawFrame))
    return list(memoryview(data).cast("h"))


async def through(service: AvatarVideoService, *frames: Frame, **settings: Any) -> tuple[list[Frame], list[Frame]]:
    """Return the frames that leave a pipeline of the service downstream and upstream."""
    params = PipelineParams(audio_out_sample_rate=RATE_HZ, enable_metrics=True)
    down, up = await run_test(service, frames_to_send=frames, pipeline_params=params, start_timeout=30, **settings)
    return list(down), list(up)


class Output(BaseOutputTransport):
    """Pipecat's output, which plays in real time and records what it plays and pushes on."""

    def __init__(self) -> None:
        params = TransportParams(
            audio_out_enabled=True, video_out_enabled=True, video_out_width=SIZE[0], video_out_height=SIZE[1]
        )
        super().__init__(params)
        self.played: list[int] = []
        self.num_images = 0

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_audio_frame(self, frame: OutputAudioRawFrame) -> bool:
        self.played += memoryview(frame.audio).cast("h")
        await asyncio.sleep(frame.num_frames / frame.sample_rate)
        return True

    async def write_video_frame(self, frame: OutputImageRawFrame) -> bool:
        assert (frame.size, len(frame.image)) == (SIZE, SIZE[0] * SIZE[1] * 3)
        self.num_images += 1
        return True

    async def played_s(self, seconds: float) -> None:
        """Wait until so much has been played."""
        await until(lambda: len(self.played) >= seconds * RATE_HZ)


class Sink(FrameProcessor):
    """Records the frames after the output."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Frame] = []

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        self.frames.append(frame)
        await self.push_frame(frame, direction)

    def of(self, kind: type[Frame]) -> list[Frame]:
        return [frame for frame in self.frames if isinstance(frame, kind)]


class Gate(FrameProcessor):
    """Takes no second image before it is opened, and lets whoever pushes frames wait."""

    def __init__(self) -> None:
        super().__init__(enable_direct_mode=True)
        self.opened = asyncio.Event()
        self.pts: list[int] = []

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, OutputImageRawFrame):
            assert frame.pts
            self.pts.append(frame.pts)
            await self.opened.wait()
        await self.push_frame(frame, direction)


@asynccontextmanager
async def bot(target: str, *between: FrameProcessor) -> AsyncGenerator[tuple[PipelineWorker, Output, Sink], None]:
    """Run a bot of the service and an output while the body runs, which ends with an EndFrame.

    between: processors between the two.
    """
    output, sink = Output(), Sink()
    pipeline = Pipeline([AvatarVideoService(target, b"face"), *between, output, sink])
    params = PipelineParams(audio_out_sample_rate=RATE_HZ)
    worker = PipelineWorker(pipeline, params=params, cancel_on_idle_timeout=False, enable_rtvi=False)
    has_started = asyncio.Event()
    worker.add_event_handler("on_pipeline_started", lambda *_: has_started.set())
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(runner.run())
        await has_started.wait()
        yield worker, output, sink
        await worker.queue_frame(EndFrame())


async def test_speech_comes_out_with_its_frames_on_one_clock(store: SessionStore) -> None:
    async with standin_gateway(store) as gateway:
        down, _ = await through(AvatarVideoService(gateway.target, b"face"), *answer(1.2))
    media = [frame for frame in down if isinstance(frame, TTSAudioRawFrame | OutputImageRawFrame)]
    images = [frame for frame in media if isinstance(frame, OutputImageRawFrame)]
    pts = [image.pts for image in images]
    assert pts == [round((pts[0] + number * 40_000_000) / 1e6) * 1_000_000 for number in range(len(pts))]
    assert all(image.sync_with_audio and image.size == SIZE for image in images)
    for before, after in pairwise(media):
        if isinstance(before, TTSAudioRawFrame):
            assert isinstance(after, OutputImageRawFrame)
            assert (before.pts, before.num_frames, before.context_id) == (after.pts, RATE_HZ // 25, "1000")
    audio = samples(down)
    assert audio[: round(1.2 * RATE_HZ)] == [1000] * round(1.2 * RATE_HZ)
    assert not any(audio[round(1.2 * RATE_HZ) :]), "silence up to the end of the last block"


async def test_frames_after_speech_wait_until_it_has_been_played(store: SessionStore) -> None:
    text = [TTSTextFrame(word, "word") for word in ("one", "two")]
    async with standin_gateway(store) as gateway:
        down, _ = await through(
            AvatarVideoService(gateway.target, b"face"),
            *[TTSStartedFrame(), *spoken(0.5), text[0], *spoken(0.5), text[1], TTSStoppedFrame()],
            *answer(0.3, level=-2000),
        )
    first, second = map(down.index, text)
    stopped, _ = [index for index, frame in enumerate(down) if isinstance(frame, TTSStoppedFrame)]
    assert RATE_HZ * 0.5 <= len(samples(down[:first])) < RATE_HZ * 0.6
    assert len(samples(down[:second])) >= RATE_HZ * 1.0
    assert second < stopped
    assert set(samples(down[:stopped])) == {1000, 0}, "the silence of the last block, too"
    assert set(samples(down[stopped:])) == {-2000, 0}
    [next_start] = [index for index, frame in enumerate(down) if isinstance(frame, TTSStartedFrame)][1:]
    assert stopped < next_start


async def test_word_times_are_those_of_the_played_speech(store: SessionStore) -> None:
    word = TTSTextFrame("one", "word")
    word.pts = 5_000_000_000
    async with standin_gateway(store) as gateway:
        down, _ = await through(
            AvatarVideoService(gateway.target, b"face"), TTSStartedFrame(), *spoken(1.0), word, TTSStoppedFrame()
        )
    assert 0 < len(samples(down[: down.index(word)])) < RATE_HZ * 0.5, "it waits for the first frame alone"
    assert word.pts > 5_000_000_000
    latencies = [data.value for frame in down if isinstance(frame, MetricsFrame) for data in frame.data]
    assert any(latency > 0 for latency in latencies)


async def test_speech_of_another_rate_is_resampled(store: SessionStore) -> None:
    async with standin_gateway(store) as gateway:
        down, _ = await through(
            AvatarVideoService(gateway.target, b"face"),
            *[TTSStartedFrame(), *spoken(1.0, rate_hz=16000), TTSStoppedFrame()],
        )
    num_loud = sum(abs(sample) > 500 for sample in samples(down))
    assert abs(num_loud - RATE_HZ) < 50


async def test_an_interruption_drops_speech_and_what_waits_for_it(store: SessionStore) -> None:
    kept = LLMTextFrame("kept")
    kept.interruptible = False
    dropped = LLMTextFrame("dropped")
    async with standin_gateway(store) as gateway:
        async with bot(gateway.target) as (worker, output, sink):
            await worker.queue_frames([*answer(8.0), kept, dropped])
            await output.played_s(1.0)
            await worker.queue_frame(InterruptionFrame())
            await until(lambda: sink.of(InterruptionFrame))
            num_before = len(output.played)
            await worker.queue_frames(answer(0.5, level=-2000))
        await until(lambda: not gateway.num_streams)
    before, after = output.played[:num_before], output.played[num_before:]
    assert set(before) == {1000}
    assert len(before) < 4 * RATE_HZ
    chunk = RATE_HZ // 25  # was being written
    assert 1000 not in after[2 * chunk :]
    assert after.count(-2000) == RATE_HZ // 2
    assert [frame for frame in sink.frames if isinstance(frame, LLMTextFrame)] == [kept]
    assert len(sink.of(TTSStoppedFrame)) == 1
    assert len(sink.of(BotStoppedSpeakingFrame)) == 2
    assert output.num_images


async def test_a_pipeline_that_takes_no_frames_for_long_goes_on_with_the_newest(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_stream, "MAX_QUEUED_ITEMS", 4)
    monkeypatch.setattr(integration, "HELD_S", 1.0)
    gate = Gate()
    async with standin_gateway(store, max_unread_s=0.5) as gateway:
        async with bot(gateway.target, gate) as (worker, output, _):
            await until(lambda: gate.pts)
            frames = gate.previous._frames
            await until(lambda: frames.stream._next_frame > 40)
            gate.opened.set()
            await until(lambda: len(gate.pts) > 2)
            await worker.queue_frames(answer(0.5))
        assert output.played.count(1000) == RATE_HZ // 2
    assert gate.pts[1] - gate.pts[0] >= 1e9, "what is older has been dropped"
    assert gate.pts[2] - gate.pts[1] == 40_000_000


async def test_an_end_waits_for_the_speech_and_a_cancel_does_not(store: SessionStore) -> None:
    async with standin_gateway(store) as gateway:
        async with bot(gateway.target) as (worker, output, _):
            await worker.queue_frames(answer(1.0))
        assert output.played.count(1000) == RATE_HZ
        await until(lambda: not gateway.num_streams)
        async with bot(gateway.target) as (worker, output, _):
            await worker.queue_frames(answer(8.0))
            await output.played_s(0.1)
            await worker.cancel()
        assert output.played.count(1000) < 8 * RATE_HZ
        await until(lambda: not gateway.num_streams)


async def test_speech_passes_through_without_an_avatar() -> None:
    down, up = await through(AvatarVideoService("127.0.0.1:1", b"face"), *answer(0.3))
    assert samples(down) == [1000] * round(0.3 * RATE_HZ)
    assert not any(isinstance(frame, OutputImageRawFrame) for frame in down)
    [error] = [frame for frame in up if isinstance(frame, ErrorFrame)]
    assert error.error.startswith("avatar lost: ")


async def test_stereo_is_refused(store: SessionStore) -> None:
    async with standin_gateway(store) as gateway:
        stereo = TTSAudioRawFrame(speech(0.1), RATE_HZ, 2)
        _, up = await through(AvatarVideoService(gateway.target, b"face"), stereo)
    [error] = [frame for frame in up if isinstance(frame, ErrorFrame)]
    assert "speech must have one channel, got 2" in error.error
