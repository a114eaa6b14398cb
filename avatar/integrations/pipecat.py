"""The avatar of a Pipecat bot: a video service between its speech and its output.

    pipeline = Pipeline([..., tts, AvatarVideoService("127.0.0.1:7000", "face.png"), transport.output(), ...])

Speech of the TTS service goes in; the same speech comes out with the frames that show it: each frame's audio, then its
image, which the transport shows when that audio has been played (`sync_with_audio`). So the transport's audio is the
one clock while the avatar speaks; idle frames have no audio and are paced here. Both have the time on the session's
media clock as their `pts`.

Other frames that follow speech, such as its text and `TTSStoppedFrame`, are held until as much speech has been played.
"""

import asyncio
import math
from bisect import insort
from collections import deque
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from typing import Any

from pipecat.audio.utils import create_stream_resampler
from pipecat.frames import frames as pipe
from pipecat.processors.frame_processor import FrameDirection, FrameProcessorSetup
from pipecat.services.ai_service import AIService
from pipecat.services.settings import ServiceSettings

from avatar.client import AvatarError, Frame
from avatar.integrations.frames import NO_ARGUMENTS, SAMPLE_BYTES, LiveFrames, created_session, live_frames

# Speech is passed on earlier than it is due, so that the transport does not run dry. It plays at its own pace.
AHEAD_S = 0.1
# Frames become due this much earlier one by one, until they are no longer there in time: so a delay does not last.
RECOVERY_S = 0.001


@dataclass
class SpokenTurn:
    """Speech between two ends of turns. first, end: samples of all speech before it and up to its end."""

    context_id: str | None
    first: int
    pushed_at: int  # on the pipeline's clock, in nanoseconds
    end: int | None = None


class AvatarVideoService(AIService):
    """A video service that shows an avatar. An interruption drops the speech and its frames.

    If the avatar is lost, an ErrorFrame says so, the service is no longer usable, and speech passes through unchanged.
    """

    def __init__(
        self,
        target: str,
        portrait: bytes | str | PathLike[str],
        *,
        connection: Mapping[str, Any] = NO_ARGUMENTS,
        options: Mapping[str, Any] = NO_ARGUMENTS,
        **kwargs: Any,
    ) -> None:
        """Prepare an avatar; the pipeline's setup connects.

        target: HOST:PORT of the gateway. portrait: bytes or path of a picture. connection, options: further arguments
        of `connect` and of `Avatar.create`. kwargs: of AIService.
        """
        super().__init__(settings=ServiceSettings(model=None), **kwargs)
        self._session = created_session(target, portrait, connection, options)
        self._resampler = create_stream_resampler(clear_after_secs=None)
        self._frames: LiveFrames | None = None
        self._task: asyncio.Task[None] | None = None
        self._interrupting: asyncio.Task[None] | None = None
        self._has_started = False
        self._due_offset_s = -math.inf  # from media time to the loop's time
        # Samples of speech: pushed, and played as far as is known. Turns that are not played to their end.
        self._num_pushed = self._num_played = 0
        self._turns: deque[SpokenTurn] = deque()
        self._delay_ns = 0  # of the turn that is played
        # Frames that wait until so many samples have been played.
        self._held: list[tuple[int, pipe.Frame]] = []
        self._releasing = asyncio.Lock()
        self._is_quiet = asyncio.Event()
        self._is_quiet.set()

    def can_generate_metrics(self) -> bool:
        """Return True: the time from a turn's first audio to its first frame is the service's time to first byte."""
        return True

    async def setup(self, setup: FrameProcessorSetup) -> None:
        """Open the avatar's stream."""
        await super().setup(setup)
        self._rate_hz = setup.audio_out_sample_rate
        is_open = asyncio.Event()
        self._task = self.create_task(self._run(is_open))
        await is_open.wait()

    async def stop(self, frame: pipe.EndFrame) -> None:
        """Delete the avatar's session when all speech has been played."""
        await super().stop(frame)
        await self._end_turn()
        await self._is_quiet.wait()
        await self._close()

    async def cancel(self, frame: pipe.CancelFrame) -> None:
        """Delete the avatar's session."""
        await super().cancel(frame)
        await self._close()

    async def cleanup(self) -> None:
        """Delete the avatar's session, unless that has been done."""
        await super().cleanup()
        await self._close()

    async def process_frame(self, frame: pipe.Frame, direction: FrameDirection) -> None:
        """Send speech to the avatar; pass other frames on, in order with the speech."""
        await super().process_frame(frame, direction)
        if self._frames is None or direction == FrameDirection.UPSTREAM:
            await self.push_frame(frame, direction)
        elif isinstance(frame, pipe.InterruptionFrame):
            await self._interrupt(frame)
        elif isinstance(frame, pipe.TTSAudioRawFrame):
            await self._speak(frame)
        elif isinstance(frame, pipe.SystemFrame):
            await self.push_frame(frame)
        else:
            if isinstance(frame, pipe.TTSStoppedFrame):
                await self._end_turn()
            # The time of a word counts from its turn's first audio: it waits for that alone, and is delayed as that.
            after = self._turns[-1].first + 1 if frame.pts and self._turns else self._num_pushed
            insort(self._held, (after, frame), key=lambda held: held[0])
            await self._release()
        self._has_started = self._has_started or isinstance(frame, pipe.StartFrame)

    async def _run(self, is_open: asyncio.Event) -> None:
        """Show the avatar until its stream ends."""
        try:
            async with self._session as session, live_frames(session, rate_hz=self._rate_hz) as self._frames:
                is_open.set()
                size = session.video.width, session.video.height
                async for item, audio in self._frames:
                    if isinstance(item, Frame):
                        await self._show(item, audio, size)
                    elif self._turns:
                        turn = self._turns.popleft()
                        await self._release(self._num_pushed if turn.end is None else turn.end)
        except (AvatarError, OSError, ValueError) as error:
            await self.push_error(f"avatar lost: {error}", exception=error, force_treat_as_permanent=True)
        finally:
            self._frames = None
            self._forget_speech()
            is_open.set()
        await self._release()

    async def _show(self, frame: Frame, audio: bytes, size: tuple[int, int]) -> None:
        """Push a frame's audio and image when they are due."""
        assert self._frames
        now_s = asyncio.get_running_loop().time()
        self._due_offset_s = max(self._due_offset_s - RECOVERY_S, now_s - frame.pts_s)
        await asyncio.sleep(frame.pts_s + self._due_offset_s - now_s - (AHEAD_S if audio else 0))
        if self._frames.is_dropped(frame) or not self._has_started:
            return
        pts = round(frame.pts_s * 1e9)
        if audio and self._turns:
            turn = self._turns[0]
            if self._num_played <= turn.first:
                self._delay_ns = self.get_clock().get_time() - turn.pushed_at
                await self.stop_ttfb_metrics()
            speech = pipe.TTSAudioRawFrame(audio, self._rate_hz, 1, context_id=turn.context_id)
            speech.pts = pts
            await self.push_frame(speech)
            # Silence that the gateway inserts counts as well, so the end is known by the end of the turn alone.
            last = self._num_pushed if turn.end is None else turn.end - 1
            await self._release(min(self._num_played + len(audio) // SAMPLE_BYTES, last))
        image = pipe.OutputImageRawFrame(frame.data, size, "RGB")
        image.sync_with_audio, image.pts = True, pts
        await self.push_frame(image)

    async def _speak(self, frame: pipe.TTSAudioRawFrame) -> None:
        """Send speech to the avatar. Waits while the avatar is far behind. Raises ValueError unless it is mono."""
        if frame.num_channels != 1:
            raise ValueError(f"speech must have one channel, got {frame.num_channels}")
        if not self._turns or self._turns[-1].end is not None:
            self._turns.append(SpokenTurn(frame.context_id, self._num_pushed, self.get_clock().get_time()))
            await self.start_ttfb_metrics()
        await self._push(await self._resampler.resample(frame.audio, frame.sample_rate, self._rate_hz))

    async def _push(self, audio: bytes) -> None:
        self._is_quiet.clear()
        self._num_pushed += len(audio) // SAMPLE_BYTES
        if self._frames:
            with suppress(AvatarError):  # the stream has ended, which its iteration reports
                await self._frames.stream.push(audio)

    async def _end_turn(self) -> None:
        """End the turn, if there is one."""
        if not self._frames or not self._turns or self._turns[-1].end is not None:
            return
        await self._push(await self._resampler.flush())
        # One more than there are samples: what follows the turn waits for its end, not for its last sample.
        self._num_pushed += 1
        self._turns[-1].end = self._num_pushed
        with suppress(AvatarError):
            await self._frames.stream.end_turn()

    async def _interrupt(self, frame: pipe.InterruptionFrame) -> None:
        """Drop speech, its frames, and what waits for it, but frames that must not be interrupted."""
        if self._frames and not self._is_quiet.is_set():
            self._interrupting = self.create_task(self._await_answer(self._frames.interrupt()))
            self._held = [(after, held) for after, held in self._held if not held.interruptible]
            self._forget_speech()
            await self._resampler.reset()
        await self.push_frame(frame)
        await self._release()

    async def _await_answer(self, interrupt: Coroutine[Any, Any, None]) -> None:
        with suppress(AvatarError):
            await interrupt

    def _forget_speech(self) -> None:
        """Take all speech as played."""
        self._turns.clear()
        self._num_played = self._num_pushed

    async def _release(self, num_played: int | None = None) -> None:
        """Record that so many samples have been played, and push the frames that waited for them."""
        self._num_played = max(self._num_played, num_played or 0)
        async with self._releasing:
            while self._held and self._held[0][0] <= self._num_played:
                _, frame = self._held.pop(0)
                if frame.pts and self._turns:
                    frame.pts += self._delay_ns
                await self.push_frame(frame)
        if self._num_played == self._num_pushed:
            self._is_quiet.set()

    async def _close(self) -> None:
        """End the tasks, which deletes the avatar's session."""
        for task in (self._interrupting, self._task):
            if task:
                await self.cancel_task(task)
        self._task = self._interrupting = None
