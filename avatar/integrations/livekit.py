"""A session as the avatar of a LiveKit agent: the video generator of livekit-agents' AvatarRunner.

    async with video_generator(session, rate_hz=24000) as generator:
        options = avatar_options(session, rate_hz=24000)
        runner = AvatarRunner(room, audio_recv=DataStreamAudioReceiver(room), video_gen=generator, options=options)
        await runner.start()
        await runner.wait_for_complete()

Five facts pass between the two. Speech and the end of its segment go in by `push_audio`, and `clear_buffer` interrupts;
that playback has started, and how far it came, the runner tells from the sound that comes out: it starts to play with
the first piece of a segment, its position is the sound so far, and it has finished when the segment's end comes out.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Literal

from livekit import rtc
from livekit.agents.voice.avatar import AudioSegmentEnd, AvatarOptions, VideoGenerator

from avatar.client import Audio, Frame, Item, PlaybackFinished, Session, Stream

SAMPLE_BYTES = 2


def avatar_options(session: Session, *, rate_hz: int, channels: Literal[1, 2] = 1) -> AvatarOptions:
    """What AvatarRunner must know of a session's frames and of the sound that is pushed to it."""
    video = session.video
    return AvatarOptions(video.width, video.height, video.frame_rate_hz, rate_hz, channels)


@asynccontextmanager
async def video_generator(
    session: Session, *, rate_hz: int, channels: Literal[1, 2] = 1
) -> AsyncGenerator["AvatarGenerator", None]:
    """A session's live stream as a video generator, while the body runs; the body's end gives the session up."""
    async with session.stream(rate_hz=rate_hz, channels=channels, live=True, return_audio=True) as stream:
        yield AvatarGenerator(stream, session, rate_hz, channels)


class AvatarGenerator(VideoGenerator):
    """Made by `video_generator`. Iterated once, by the runner."""

    def __init__(self, stream: Stream, session: Session, rate_hz: int, channels: int) -> None:
        self._stream = stream
        self._video = session.video
        self._rate_hz = rate_hz
        self._channels = channels
        self._sound = b""  # of the frames that follow
        self._first_frame = 0  # what is before it was cleared
        self._num_clearing = 0

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """Speak, or end the turn. ValueError for sound of another format than the stream's."""
        if isinstance(frame, AudioSegmentEnd):
            await self._stream.end_turn()
            return
        if (frame.sample_rate, frame.num_channels) != (self._rate_hz, self._channels):
            raise ValueError(
                f"sound must be of {self._rate_hz} Hz and {self._channels} channels, got {frame.sample_rate} Hz and"
                f" {frame.num_channels}"
            )
        await self._stream.push(bytes(frame.data.cast("b")))

    async def clear_buffer(self) -> None:
        """Fall silent. Nothing that was made before comes out any more: the runner has stopped to count it."""
        self._num_clearing += 1
        try:
            self._first_frame = (await self._stream.interrupt()).next_frame
            self._sound = b""
        finally:
            self._num_clearing -= 1

    async def __aiter__(self) -> AsyncGenerator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd, None]:
        async for item in self._stream:
            if self._is_cleared(item):
                continue
            match item:
                case Audio():
                    self._sound += item.data
                case Frame():
                    yield rtc.VideoFrame(
                        self._video.width, self._video.height, rtc.VideoBufferType.RGB24, bytearray(item.data)
                    )
                    # A frame at a time, as the synchroniser's queues are shorter than a block. Idle frames are silent.
                    sound = self._sound_of(item)
                    if sound and not item.is_idle:
                        num_samples = len(sound) // SAMPLE_BYTES // self._channels
                        yield rtc.AudioFrame(sound, self._rate_hz, self._channels, num_samples)
                case PlaybackFinished():
                    yield AudioSegmentEnd()

    def _is_cleared(self, item: Item) -> bool:
        """Whether an item is from before the last interrupt, or tells of it."""
        match item:
            case Frame():
                is_before = item.index < self._first_frame
            case Audio():
                is_before = round(item.pts_s * self._video.frame_rate_hz) < self._first_frame
            case PlaybackFinished():
                is_before = item.next_frame <= self._first_frame
            case _:
                return False
        return is_before or self._num_clearing > 0

    def _sound_of(self, frame: Frame) -> bytes:
        """The sound of the next frame, of samples' lengths that add up."""
        rate_hz, frame_rate_hz = self._rate_hz, self._video.frame_rate_hz
        num_samples = (frame.index + 1) * rate_hz // frame_rate_hz - frame.index * rate_hz // frame_rate_hz
        num_bytes = num_samples * SAMPLE_BYTES * self._channels
        sound, self._sound = self._sound[:num_bytes], self._sound[num_bytes:]
        return sound
