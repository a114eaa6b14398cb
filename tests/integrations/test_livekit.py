"""The LiveKit adapter in livekit-agents' own AvatarRunner: everything is theirs but the room and the gateway."""

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
from tests.client.gateway import Gateway, scripted
from tests.conftest import RATE_HZ, sound

PIECE_BYTES = 640 * 2


class Publication:
    async def wait_for_subscription(self) -> None:
        pass


class Room:
    """As much of a room as the runner asks for: connected, and anybody may publish."""

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
async def generating(gateway: Gateway) -> AsyncGenerator[tuple[AvatarGenerator, Any], None]:
    async with scripted(gateway) as target, connect(target) as avatar:
        session = await avatar.create(b"face")
        async with video_generator(session, rate_hz=RATE_HZ) as generator:
            yield generator, avatar_options(session, rate_hz=RATE_HZ)


def frames_of(data: bytes) -> list[rtc.AudioFrame]:
    pieces = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
    return [rtc.AudioFrame(piece, RATE_HZ, 1, len(piece) // 2) for piece in pieces]


@pytest.fixture
def gateway() -> Gateway:
    """Frames hold pixels here, of the size that the runner is told."""
    return Gateway(tick_s=0.1, frame_bytes=64 * 64 * 3)


async def test_it_is_what_livekit_asks_for() -> None:
    assert issubclass(AvatarGenerator, VideoGenerator)
    for name in ("push_audio", "clear_buffer", "__aiter__"):
        theirs, ours = getattr(VideoGenerator, name), getattr(AvatarGenerator, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


async def test_speech_comes_out_beside_its_frames_and_ends_with_its_segment(gateway: Gateway) -> None:
    heard, num_pictures, num_sounds = b"", 0, 0
    async with generating(gateway) as (generator, _):
        for frame in frames_of(sound(1.2)):
            await generator.push_audio(frame)
        await generator.push_audio(AudioSegmentEnd())
        async for item in generator:
            match item:
                case rtc.VideoFrame():
                    assert item.convert(rtc.VideoBufferType.I420).width == 64
                    num_pictures += 1
                case rtc.AudioFrame():
                    heard += bytes(item.data.cast("b"))
                    num_sounds += 1
                case _:
                    break
    assert heard.startswith(sound(1.2))
    assert not any(heard[len(sound(1.2)) :])
    assert num_sounds in (30 + 6, 30 + 3, 30)  # what is left of the last block, of 9 or 12 frames
    assert num_pictures >= num_sounds


async def test_sound_of_another_format_is_refused(gateway: Gateway) -> None:
    async with generating(gateway) as (generator, _):
        with pytest.raises(ValueError, match="16000 Hz and 1 channels, got 24000 Hz and 1"):
            await generator.push_audio(rtc.AudioFrame(bytes(480), 24000, 1, 240))


async def test_the_runner_tells_the_agent_what_was_played_and_what_was_cut_off(gateway: Gateway) -> None:
    gateway.tick_s = 0.4
    output, room = QueueAudioOutput(sample_rate=RATE_HZ, wait_playback_start=True), Room()
    started: asyncio.Queue[Any] = asyncio.Queue()
    finished: asyncio.Queue[PlaybackFinishedEvent] = asyncio.Queue()
    output.on("playback_started", started.put_nowait)
    output.on("playback_finished", finished.put_nowait)
    async with generating(gateway) as (generator, options):
        runner = AvatarRunner(room, audio_recv=output, video_gen=generator, options=options)  # type: ignore[arg-type]
        await runner.start()
        try:
            for frame in frames_of(sound(1.2)):
                await output.capture_frame(frame)
            output.flush()
            whole = await asyncio.wait_for(finished.get(), 20)
            for frame in frames_of(sound(8.0)):
                await output.capture_frame(frame)
            output.flush()
            for _ in range(2):
                await asyncio.wait_for(started.get(), 20)
            await asyncio.sleep(0.5)
            output.clear_buffer()
            cut = await asyncio.wait_for(finished.get(), 20)
            for frame in frames_of(sound(0.5)):
                await output.capture_frame(frame)
            output.flush()
            after = await asyncio.wait_for(finished.get(), 20)
        finally:
            await runner.aclose()
    assert room.tracks == ["avatar_audio", "avatar_video"]
    assert started.qsize() == 1
    assert (whole.interrupted, cut.interrupted, after.interrupted) == (False, True, False)
    assert whole.playback_position == pytest.approx(1.2, abs=0.48)
    assert 0 < cut.playback_position < 4
    assert after.playback_position == pytest.approx(0.5, abs=0.48)
