"""The LiveKit integration in livekit-agents' own AvatarRunner; only the room is a fake."""

import asyncio
import inspect
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("livekit.agents", reason="tests/integrations/requirements-livekit.txt is not installed")

from livekit import rtc
from livekit.agents.voice.avatar import AudioSegmentEnd, AvatarRunner, QueueAudioOutput, VideoGenerator
from livekit.agents.voice.io import PlaybackFinishedEvent

from avatar.client import connect
from avatar.integrations.livekit import AvatarGenerator, avatar_options, video_generator
from avatar.store.sessions import SessionStore
from tests.conftest import RATE_HZ, speech
from tests.standin import standin_gateway

PIECE_BYTES = 640 * 2


class Publication:
    async def wait_for_subscription(self) -> None:
        pass


class Room:
    """The part of a room that the runner uses: connected, and anybody may publish."""

    def __init__(self) -> None:
        self.local_participant = self
        self.tracks: list[str] = []

    def isconnected(self) -> bool:
        return True

    def on(self, *_: Any) -> None:
        pass

    def off(self, *_: Any) -> None:
        pass

    async def publish_track(self, track: Any, _: Any) -> Publication:
        self.tracks.append(track.name)
        return Publication()


@asynccontextmanager
async def generating(store: SessionStore) -> AsyncGenerator[tuple[AvatarGenerator, Any], None]:
    """A generator over the stand-in gateway, and the runner's options."""
    async with standin_gateway(store) as gateway, connect(gateway.target) as avatar:
        session = await avatar.create(b"face")
        async with video_generator(session, rate_hz=RATE_HZ) as generator:
            yield generator, avatar_options(session, rate_hz=RATE_HZ)


def frames_of(data: bytes) -> list[rtc.AudioFrame]:
    pieces = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
    return [rtc.AudioFrame(piece, RATE_HZ, 1, len(piece) // 2) for piece in pieces]


async def test_the_generator_has_livekits_interface() -> None:
    assert issubclass(AvatarGenerator, VideoGenerator)
    for name in ("push_audio", "clear_buffer", "__aiter__"):
        expected, actual = getattr(VideoGenerator, name), getattr(AvatarGenerator, name)
        assert list(inspect.signature(actual).parameters) == list(inspect.signature(expected).parameters)


async def test_speech_comes_out_with_its_frames_and_ends_with_its_segment(store: SessionStore) -> None:
    audio, num_video, num_audio = b"", 0, 0
    async with generating(store) as (generator, _):
        for frame in frames_of(speech(1.2)):
            await generator.push_audio(frame)
        await generator.push_audio(AudioSegmentEnd())
        async for item in generator:
            match item:
                case rtc.VideoFrame():
                    assert item.convert(rtc.VideoBufferType.I420).width == 64
                    num_video += 1
                case rtc.AudioFrame():
                    audio += bytes(item.data.cast("b"))
                    num_audio += 1
                case _:
                    break
    assert audio.startswith(speech(1.2))
    assert not any(audio[len(speech(1.2)) :])
    assert num_audio in (30 + 6, 30 + 3, 30)  # padded to whole blocks of 9 or 12 frames
    assert num_video >= num_audio


async def test_no_audio_of_a_cleared_frame_follows_it(store: SessionStore) -> None:
    async with generating(store) as (generator, _), asyncio.TaskGroup() as tasks:
        for frame in frames_of(speech(2.0)):
            await generator.push_audio(frame)
        items = aiter(generator)
        while not isinstance(await anext(items), rtc.AudioFrame):
            pass
        assert isinstance(await anext(items), rtc.VideoFrame)
        tasks.create_task(generator.clear_buffer())
        await asyncio.sleep(0)  # it has been called and not been answered
        assert [type(await anext(items)) for _ in range(5)] == [rtc.VideoFrame] * 5


async def test_audio_of_another_format_is_refused(store: SessionStore) -> None:
    async with generating(store) as (generator, _):
        with pytest.raises(ValueError, match="16000 Hz and 1 channels, got 24000 Hz and 1"):
            await generator.push_audio(rtc.AudioFrame(bytes(480), 24000, 1, 240))


async def test_the_runner_reports_what_was_played_and_what_was_cut_off(store: SessionStore) -> None:
    output, room = QueueAudioOutput(sample_rate=RATE_HZ, wait_playback_start=True), Room()
    started: asyncio.Queue[Any] = asyncio.Queue()
    finished: asyncio.Queue[PlaybackFinishedEvent] = asyncio.Queue()
    output.on("playback_started", started.put_nowait)
    output.on("playback_finished", finished.put_nowait)
    async with generating(store) as (generator, options):
        runner = AvatarRunner(room, audio_recv=output, video_gen=generator, options=options)  # type: ignore[arg-type]
        await runner.start()
        try:
            for frame in frames_of(speech(1.2)):
                await output.capture_frame(frame)
            output.flush()
            whole = await asyncio.wait_for(finished.get(), 20)
            for frame in frames_of(speech(8.0)):
                await output.capture_frame(frame)
            output.flush()
            for _ in range(2):
                await asyncio.wait_for(started.get(), 20)
            await asyncio.sleep(0.5)
            output.clear_buffer()
            cut = await asyncio.wait_for(finished.get(), 20)
            for frame in frames_of(speech(0.5)):
                await output.capture_frame(frame)
            output.flush()
            after = await asyncio.wait_for(finished.get(), 20)
        finally:
            await runner.aclose()
    assert room.tracks == ["avatar_audio", "avatar_video"]
    assert started.qsize() == 1
    assert (whole.interrupted, cut.interrupted, after.interrupted) == (False, True, False)
    padding_s = 2 * 0.48  # of the last block, and of one more if speech arrives late
    assert 1.2 <= whole.playback_position <= 1.2 + padding_s
    assert 0 < cut.playback_position < 4
    assert 0.5 <= after.playback_position <= 0.5 + padding_s
