"""The avatar of a LiveKit agent.

    avatar = AvatarSession("127.0.0.1:7000", "face.png")
    await avatar.start(session, room=ctx.room)
    await session.start(agent, room=ctx.room)

The agent itself publishes the avatar's tracks: LiveKit's AvatarRunner runs in its process, between the agent's speech
and the room. The runner passes speech and the end of each segment to `push_audio`, and interrupts with `clear_buffer`.
It derives playback events from the generator's output: playback starts with a segment's first audio frame, the position
is the amount of audio so far, and playback finishes with the AudioSegmentEnd. With its first frame the runner publishes
the tracks, and takes no other before somebody has subscribed: until then speech waits, as LiveKit's own output lets it,
and idle frames are dropped.

`video_generator` alone makes a session the avatar of a runner in another process:

    async with video_generator(session, rate_hz=24000) as generator:
        options = avatar_options(session, rate_hz=24000)
        runner = AvatarRunner(room, audio_recv=DataStreamAudioReceiver(room), video_gen=generator, options=options)
        await runner.start()
        await runner.wait_for_complete()
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from os import PathLike
from typing import Any, Literal

from livekit import rtc
from livekit.agents import AgentSession
from livekit.agents.voice import avatar
from livekit.agents.voice.avatar import AudioSegmentEnd, AvatarOptions, AvatarRunner, QueueAudioOutput, VideoGenerator

from avatar.client import AvatarError, Frame, Session
from avatar.integrations.frames import NO_ARGUMENTS, SAMPLE_BYTES, LiveFrames, created_session, live_frames

logger = logging.getLogger(__name__)


class AvatarSession(avatar.AvatarSession[Literal["error"]]):
    """The avatar that speaks for an agent.

    `metrics_collected` reports the time until the avatar's video is published, and the playback latency of each answer:
    from its first audio to its first frame. `error` has the AvatarError by which the avatar was lost; the agent then
    goes on without speech, as text.
    """

    def __init__(
        self,
        target: str,
        portrait: bytes | str | PathLike[str],
        *,
        rate_hz: int = 24000,
        connection: Mapping[str, Any] = NO_ARGUMENTS,
        options: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> None:
        """Prepare an avatar; `start` connects.

        target: HOST:PORT of the gateway. portrait: bytes or path of a picture. rate_hz: of the speech, which LiveKit
        resamples. connection, options: further arguments of `connect` and of `Avatar.create`.
        """
        super().__init__()
        self._open = created_session(target, portrait, connection, options)
        self._rate_hz = rate_hz
        self._stack = AsyncExitStack()

    @property
    def avatar_identity(self) -> str:
        """Name of the participant that publishes the video: the agent's own."""
        assert self._room
        return str(self._room.local_participant.identity)

    @property
    def provider(self) -> str:
        """Name of the provider in metrics."""
        return "avatar-suite"

    async def start(self, agent_session: AgentSession[Any], room: rtc.Room) -> None:
        """Open the avatar's stream, publish its tracks and make it the agent's audio output.

        Call it before `agent_session.start`, once. Raises the AvatarError of a gateway that refuses.
        """
        await super().start(agent_session, room)
        try:
            session = await self._stack.enter_async_context(self._open)
            generator = await self._stack.enter_async_context(video_generator(session, rate_hz=self._rate_hz))
            output = QueueAudioOutput(sample_rate=self._rate_hz, wait_playback_start=True)
            options = avatar_options(session, rate_hz=self._rate_hz)
            runner = AvatarRunner(room, audio_recv=output, video_gen=generator, options=options)
            await runner.start()
            self._stack.push_async_callback(runner.aclose)
        except BaseException:
            await self.aclose()
            raise
        agent_session.output.audio = output
        self._stack.callback(agent_session.output.set_audio_enabled, False)
        watching = asyncio.create_task(self._watch(runner, output, agent_session))
        self._stack.callback(watching.cancel)

    async def aclose(self) -> None:
        """Delete the avatar's session. The agent goes on without speech."""
        if self._room:
            # The base class would remove the avatar's participant, which is the agent itself.
            self._room.off("connection_state_changed", self._on_connection_state_changed)
        if self._wait_avatar_join_task:
            self._wait_avatar_join_task.cancel()
        self._room = None
        await self._stack.aclose()
        await super().aclose()

    async def _watch(self, runner: AvatarRunner, output: QueueAudioOutput, agent_session: AgentSession[Any]) -> None:
        """Report the loss of the avatar, and stop waiting for its playback."""
        try:
            await runner.wait_for_complete()
        except AvatarError as error:
            logger.error("avatar lost, the agent goes on as text", extra={"reason": error.reason})
            agent_session.output.set_audio_enabled(False)
            output.clear_buffer()  # finishes the segment that is played
            self.emit("error", error)


def avatar_options(session: Session, *, rate_hz: int) -> AvatarOptions:
    """Return the formats of a session's frames and of the audio that is pushed to it, for AvatarRunner."""
    video = session.video
    return AvatarOptions(video.width, video.height, video.frame_rate_hz, rate_hz, audio_channels=1)


@asynccontextmanager
async def video_generator(session: Session, *, rate_hz: int) -> AsyncGenerator["AvatarGenerator", None]:
    """Open a session's live stream as a video generator while the body runs; the session is deleted afterwards."""
    async with live_frames(session, rate_hz=rate_hz) as frames:
        yield AvatarGenerator(frames, session, rate_hz)


class AvatarGenerator(VideoGenerator):
    """A live stream as a video generator. Created by `video_generator`; the runner iterates it once."""

    def __init__(self, frames: LiveFrames, session: Session, rate_hz: int) -> None:
        self._frames = frames
        self._video = session.video
        self._rate_hz = rate_hz
        self._num_cleared = 0

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """Push speech, or end the turn, once the runner takes frames: somebody has subscribed then.

        Speech that is cleared meanwhile is dropped. Raises ValueError if the format differs from the stream's.
        """
        if isinstance(frame, rtc.AudioFrame):
            self._check_format(frame)
        num_cleared = self._num_cleared
        await self._frames.until_taken()
        if self._num_cleared > num_cleared:
            return
        if isinstance(frame, AudioSegmentEnd):
            await self._frames.stream.end_turn()
        else:
            await self._frames.stream.push(bytes(frame.data.cast("b")))

    def _check_format(self, frame: rtc.AudioFrame) -> None:
        if (frame.sample_rate, frame.num_channels) != (self._rate_hz, 1):
            raise ValueError(
                f"audio must have {self._rate_hz} Hz and 1 channels, got {frame.sample_rate} Hz and"
                f" {frame.num_channels}"
            )

    async def clear_buffer(self) -> None:
        """Interrupt the speech. No earlier item is yielded any more, since the runner has stopped counting it."""
        self._num_cleared += 1
        with suppress(AvatarError):  # the stream has ended, and so has the speech; iterating raises the error
            await self._frames.interrupt()

    async def __aiter__(self) -> AsyncGenerator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd, None]:
        async for item, audio in self._frames:
            if not isinstance(item, Frame):
                yield AudioSegmentEnd()
                continue
            yield rtc.VideoFrame(self._video.width, self._video.height, rtc.VideoBufferType.RGB24, bytearray(item.data))
            if audio and not self._frames.is_dropped(item):
                yield rtc.AudioFrame(audio, self._rate_hz, 1, len(audio) // SAMPLE_BYTES)
