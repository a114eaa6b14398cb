"""A session as the avatar of a LiveKit agent: a video generator for livekit-agents' AvatarRunner.

    async with video_generator(session, rate_hz=24000) as generator:
        options = avatar_options(session, rate_hz=24000)
        runner = AvatarRunner(room, audio_recv=DataStreamAudioReceiver(room), video_gen=generator, options=options)
        await runner.start()
        await runner.wait_for_complete()

The runner passes speech and the end of each segment to `push_audio`, and interrupts with `clear_buffer`. It derives
playback events from the generator's output: playback starts with a segment's first audio frame, the position is the
amount of audio so far, and playback finishes with the AudioSegmentEnd.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Literal

from livekit import rtc
from livekit.agents.voice.avatar import AudioSegmentEnd, AvatarOptions, VideoGenerator

from avatar.client import Audio, Frame, Item, PlaybackFinished, Session, Stream

SAMPLE_BYTES = 2


def avatar_options(session: Session, *, rate_hz: int, channels: Literal[1, 2] = 1) -> AvatarOptions:
    """Return the formats of a session's frames and of the audio that is pushed to it, for AvatarRunner."""
    video = session.video
    return AvatarOptions(video.width, video.height, video.frame_rate_hz, rate_hz, channels)


@asynccontextmanager
async def video_generator(
    session: Session, *, rate_hz: int, channels: Literal[1, 2] = 1
) -> AsyncGenerator["AvatarGenerator", None]:
    """Open a session's live stream as a video generator while the body runs; the session is deleted afterwards."""
    async with session.stream(rate_hz=rate_hz, channels=channels, live=True, return_audio=True) as stream:
        yield AvatarGenerator(stream, session, rate_hz, channels)


class AvatarGenerator(VideoGenerator):
    """A live stream as a video generator. Created by `video_generator`; the runner iterates it once."""

    def __init__(self, stream: Stream, session: Session, rate_hz: int, channels: int) -> None:
        self._stream = stream
        self._video = session.video
        self._rate_hz = rate_hz
        self._channels = channels
        self._audio = b""  # of the frames that follow
        self._first_frame = 0  # earlier frames are cleared
        self._num_clearing = 0

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """Push speech, or end the turn. Raises ValueError if the format differs from the stream's."""
        if isinstance(frame, AudioSegmentEnd):
            await self._stream.end_turn()
            return
        if (frame.sample_rate, frame.num_channels) != (self._rate_hz, self._channels):
            raise ValueError(
                f"audio must have {self._rate_hz} Hz and {self._channels} channels, got {frame.sample_rate} Hz and"
                f" {frame.num_channels}"
            )
        await self._stream.push(bytes(frame.data.cast("b")))

    async def clear_buffer(self) -> None:
        """Interrupt the speech. No earlier item is yielded any more, since the runner has stopped counting it."""
        self._num_clearing += 1
        try:
            self._first_frame = (await self._stream.interrupt()).next_frame
            self._audio = b""
        finally:
            self._num_clearing -= 1

    async def __aiter__(self) -> AsyncGenerator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd, None]:
        async for item in self._stream:
            if self._is_cleared(item):
                continue
            match item:
                case Audio():
                    self._audio += item.data
                case Frame():
                    yield rtc.VideoFrame(
                        self._video.width, self._video.height, rtc.VideoBufferType.RGB24, bytearray(item.data)
                    )
                    # A frame at a time: the synchroniser's queues hold less than a block. Idle frames have no audio.
                    audio = self._audio_of(item)
                    if audio and not item.is_idle and not self._is_cleared(item):
                        num_samples = len(audio) // SAMPLE_BYTES // self._channels
                        yield rtc.AudioFrame(audio, self._rate_hz, self._channels, num_samples)
                case PlaybackFinished():
                    yield AudioSegmentEnd()

    def _is_cleared(self, item: Item) -> bool:
        """Return whether an item precedes the last interrupt, or reports it."""
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

    def _audio_of(self, frame: Frame) -> bytes:
        """Remove and return a frame's audio. Frames differ by a sample where the rates do not divide evenly."""
        rate_hz, frame_rate_hz = self._rate_hz, self._video.frame_rate_hz
        num_samples = (frame.index + 1) * rate_hz // frame_rate_hz - frame.index * rate_hz // frame_rate_hz
        num_bytes = num_samples * SAMPLE_BYTES * self._channels
        audio, self._audio = self._audio[:num_bytes], self._audio[num_bytes:]
        return audio
