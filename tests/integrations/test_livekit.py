"""The LiveKit integration in livekit-agents' own AvatarRunner; only the room is a fake."""

import asyncio
import inspect
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import create_autospec

import pytest

pytest.importorskip("livekit.agents", reason="tests/integrations/requirements-livekit.txt is not installed")

from livekit import rtc
from livekit.agents import Agent, AgentSession, MetricsCollectedEvent
from livekit.agents.ipc.mock_room import create_mock_room
from livekit.agents.metrics.base import AvatarMetrics
from livekit.agents.voice import avatar as livekit_avatar
from livekit.agents.voice.avatar import AudioSegmentEnd, AvatarRunner, QueueAudioOutput, VideoGenerator
from livekit.agents.voice.io import PlaybackFinishedEvent

from avatar.client import connect
from avatar.client import stream as client_stream
from avatar.errors import AvatarError, ConnectionLost
from avatar.integrations.livekit import AvatarGenerator, AvatarSession, avatar_options, video_generator
from avatar.store.sessions import SessionStore
from tests.conftest import RATE_HZ, speech
from tests.integrations.waiting import until
from tests.standin import standin_gateway

PIECE_BYTES = 640 * 2


class Publication:
    def __init__(self, kind: int, subscribed: asyncio.Event) -> None:
        self.kind = kind
        self._subscribed = subscribed

    async def wait_for_subscription(self) -> None:
        await self._subscribed.wait()


class Participant:
    """The agent's participant: anybody may publish."""

    identity = "agent"
    kind = rtc.ParticipantKind.PARTICIPANT_KIND_AGENT

    def __init__(self, room: "Room") -> None:
        self._room = room
        self.track_publications: dict[str, Publication] = {}

    async def publish_track(self, track: Any, _: Any) -> Publication:
        publication = self.track_publications[track.name] = Publication(track.kind, self._room.subscribed)
        self._room.emit("local_track_published", publication, track)
        return publication


class Room(rtc.EventEmitter[str]):
    """The part of a room that the agent and the runner use; connected. subscribed: set once a person subscribes."""

    def __init__(self, *, has_person: bool = True) -> None:
        super().__init__()
        self.subscribed = asyncio.Event()
        if has_person:
            self.subscribed.set()
        self.local_participant = Participant(self)
        self.remote_participants: dict[str, Any] = {}

    def isconnected(self) -> bool:
        return True


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


async def push(generator: AvatarGenerator, *frames: rtc.AudioFrame | AudioSegmentEnd) -> None:
    for frame in frames:
        await generator.push_audio(frame)


async def test_the_generator_has_livekits_interface() -> None:
    assert issubclass(AvatarGenerator, VideoGenerator)
    for name in ("push_audio", "clear_buffer", "__aiter__"):
        expected, actual = getattr(VideoGenerator, name), getattr(AvatarGenerator, name)
        assert list(inspect.signature(actual).parameters) == list(inspect.signature(expected).parameters)


async def test_speech_comes_out_with_its_frames_and_ends_with_its_segment(store: SessionStore) -> None:
    audio, num_video, num_audio = b"", 0, 0
    async with generating(store) as (generator, _), asyncio.TaskGroup() as tasks:
        tasks.create_task(push(generator, *frames_of(speech(1.2)), AudioSegmentEnd()))
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
        tasks.create_task(push(generator, *frames_of(speech(2.0))))
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
    assert list(room.local_participant.track_publications) == ["avatar_audio", "avatar_video"]
    assert started.qsize() == 1
    assert (whole.interrupted, cut.interrupted, after.interrupted) == (False, True, False)
    padding_s = 2 * 0.48  # of the last block, and of one more if speech arrives late
    assert 1.2 <= whole.playback_position <= 1.2 + padding_s
    assert 0 < cut.playback_position < 4
    assert 0.5 <= after.playback_position <= 0.5 + padding_s


async def test_speech_waits_for_the_first_subscriber(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_stream, "MAX_QUEUED_ITEMS", 4)
    output, room = QueueAudioOutput(sample_rate=RATE_HZ, wait_playback_start=True), Room(has_person=False)
    finished: asyncio.Queue[PlaybackFinishedEvent] = asyncio.Queue()
    output.on("playback_finished", finished.put_nowait)
    async with standin_gateway(store, max_unread_s=0.5) as gateway, connect(gateway.target) as client:
        session = await client.create(b"face")
        async with video_generator(session, rate_hz=RATE_HZ) as generator:
            options = avatar_options(session, rate_hz=RATE_HZ)
            runner = AvatarRunner(room, audio_recv=output, video_gen=generator, options=options)  # type: ignore[arg-type]
            await runner.start()
            try:
                for frame in frames_of(speech(8.0)):
                    await output.capture_frame(frame)
                output.flush()
                await until(lambda: generator._frames.stream._next_frame > 40)
                output.clear_buffer()
                assert (await asyncio.wait_for(finished.get(), 20)).interrupted
                for frame in frames_of(speech(0.2, seed=1)):
                    await output.capture_frame(frame)
                output.flush()
                assert not gateway.audio.received.strip(b"\0")
                room.subscribed.set()
                whole = await asyncio.wait_for(finished.get(), 20)
            finally:
                await runner.aclose()
    assert not whole.interrupted
    assert whole.playback_position >= 0.2
    assert bytes(gateway.audio.received).lstrip(b"\0").startswith(speech(0.2, seed=1).lstrip(b"\0"))


@asynccontextmanager
async def agent(
    avatar: AvatarSession, room: Room
) -> AsyncGenerator[tuple[AgentSession[Any], list[AvatarMetrics]], None]:
    """LiveKit's agent with an avatar, and the avatar's metrics that it collects."""
    session: AgentSession[Any] = AgentSession()
    collected: list[AvatarMetrics] = []

    def collect(event: MetricsCollectedEvent) -> None:
        if isinstance(event.metrics, AvatarMetrics):
            collected.append(event.metrics)

    session.on("metrics_collected", collect)
    await avatar.start(session, room=room)  # type: ignore[arg-type]
    try:
        await session.start(Agent(instructions="none"))
        yield session, collected
    finally:
        await session.aclose()
        await avatar.aclose()


async def audio_of(data: bytes) -> AsyncGenerator[rtc.AudioFrame, None]:
    for frame in frames_of(data):
        yield frame


def test_the_session_has_livekits_interface() -> None:
    assert issubclass(AvatarSession, livekit_avatar.AvatarSession)
    expected, actual = livekit_avatar.AvatarSession.start, AvatarSession.start
    assert list(inspect.signature(actual).parameters) == list(inspect.signature(expected).parameters)
    assert not AvatarSession.__abstractmethods__


async def test_an_agent_speaks_through_its_avatar_and_can_be_interrupted(store: SessionStore) -> None:
    async with standin_gateway(store) as gateway:
        avatar, room = AvatarSession(gateway.target, b"face", rate_hz=RATE_HZ), Room()
        async with agent(avatar, room) as (session, metrics):
            await asyncio.wait_for(avatar.wait_for_join(), 20)
            assert avatar.avatar_identity == "agent"
            assert list(room.local_participant.track_publications) == ["avatar_audio", "avatar_video"]
            whole = session.say("A whole answer.", audio=audio_of(speech(0.4)))
            await asyncio.wait_for(whole.wait_for_playout(), 20)
            started = asyncio.Event()
            assert session.output.audio
            session.output.audio.on("playback_started", lambda _: started.set())
            cut = session.say("An answer that is cut off.", audio=audio_of(speech(8.0)))
            await asyncio.wait_for(started.wait(), 20)
            session.interrupt()
            await asyncio.wait_for(cut.wait_for_playout(), 20)
            assert (whole.interrupted, cut.interrupted) == (False, True)
            after = session.say("The next answer.", audio=audio_of(speech(0.5)))
            await asyncio.wait_for(after.wait_for_playout(), 20)
            assert gateway.num_streams == 1
        await until(lambda: not gateway.num_streams)
    joined, *played = metrics
    assert joined.avatar_joined_time
    assert joined.metadata
    assert joined.metadata.model_provider == "avatar-suite"
    assert len([each for each in played if each.playback_latency is not None]) >= 2


async def test_the_lines_of_the_readme_give_an_agent_in_a_room_an_avatar(store: SessionStore) -> None:
    room = create_mock_room()
    published: list[str] = []

    async def publish_track(track: Any, _: Any) -> Any:
        published.append(track.name)
        return create_autospec(rtc.LocalTrackPublication, instance=True)

    room.local_participant.publish_track = publish_track
    session: AgentSession[Any] = AgentSession()
    async with standin_gateway(store) as gateway:
        avatar = AvatarSession(gateway.target, b"face", rate_hz=RATE_HZ)
        try:
            await avatar.start(session, room=room)
            await session.start(Agent(instructions="none"), room=room)
            answer = session.say("An answer.", audio=audio_of(speech(0.4)))
            await asyncio.wait_for(answer.wait_for_playout(), 20)
        finally:
            await session.aclose()
            await avatar.aclose()
        assert speech(0.4) in gateway.audio.received
    assert published == ["avatar_audio", "avatar_video"], "the agent has no output of its own in the room"


async def test_an_agent_goes_on_as_text_when_its_avatar_is_lost(store: SessionStore) -> None:
    lost: asyncio.Queue[AvatarError] = asyncio.Queue()
    async with standin_gateway(store) as gateway:
        avatar = AvatarSession(gateway.target, b"face", rate_hz=RATE_HZ)
        avatar.on("error", lost.put_nowait)
        async with agent(avatar, Room()) as (session, _), connect(gateway.target) as client:
            started = asyncio.Event()
            assert session.output.audio
            session.output.audio.on("playback_started", lambda _: started.set())
            speaking = session.say("An answer that is cut off.", audio=audio_of(speech(8.0)))
            await asyncio.wait_for(started.wait(), 20)
            await (await client.session(gateway.audio.sessions[0])).delete()
            assert (await asyncio.wait_for(lost.get(), 20)).reason == "SESSION_NOT_FOUND"
            await asyncio.wait_for(speaking.wait_for_playout(), 20)
            assert not session.output.audio_enabled
            await asyncio.wait_for(session.say("Text.", audio=audio_of(speech(0.5))).wait_for_playout(), 20)


async def test_an_avatar_that_does_not_start_raises_its_error() -> None:
    session: AgentSession[Any] = AgentSession()
    with pytest.raises(ConnectionLost):
        await AvatarSession("127.0.0.1:1", b"face").start(session, room=Room())  # type: ignore[arg-type]
    assert session.output.audio is None
