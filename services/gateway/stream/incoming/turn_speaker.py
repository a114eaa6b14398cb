"""The text of a session's turns on its way to the voice workers, and their speech on its way to the turns.

    SayText -> TurnSpeaker.add -> Turn.text -> voice worker -> the turn's audio

Turns are spoken one after the other, each by a stream of its own at a worker, which gets the text as it arrives. The
worker gets no more of it while the turn has enough speech. If a worker is lost, or has ended the stream since no text
came for a while, another stream speaks the turn on from the sentence that was not complete.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias

from avatar import telemetry
from avatar.aio import WaitLimit, background
from avatar.errors import AvatarError, InvalidText, NoCapacity, ProtocolOrder, QuotaExceeded, StageLost, VoiceFailed
from avatar.failover.pool import Worker, WorkerPool
from avatar.rpc.client import RemoteStage, remote_voice
from avatar.settings import MAX_TEXT_CHARS
from avatar.v1 import avatar_service_pb2 as api
from avatar.worker.v1 import voice_pb2 as pb
from services.gateway.options import StreamOptions
from services.gateway.stream.in_flight import SpokenWord, Turn, TurnText
from services.gateway.stream.outbox import Outbox, notice
from services.gateway.stream.speech import SpeechQueue

logger = logging.getLogger(__name__)

SpeakStage: TypeAlias = RemoteStage[pb.TextPiece, pb.SpokenPiece]
# Text that a worker gets beyond the sentences whose speech is complete: more than a sentence, so that it is never idle,
# and little, since gRPC would keep minutes of speech on the way, and engines cost money.
AHEAD_CHARS = 300
# Words of a turn that another gateway began are repeated from so many seconds before the end of what it delivered.
WORDS_AGAIN_S = 2.0
# Attempts to go on with a turn that brought no new speech, and the pause before the second one, which doubles.
MAX_ATTEMPTS, PAUSE_S = 5, 0.2


class TurnSpeaker:
    """Speaks the text of one session."""

    def __init__(
        self,
        pool: WorkerPool[Any],
        options: StreamOptions,
        speech: SpeechQueue,
        outbox: Outbox,
        add_audio: Callable[[bytes, Turn], Awaitable[None]],
        finish_text: Callable[[Turn], None],
    ) -> None:
        """pool: of voice workers. add_audio: adds speech to a turn once there is room. finish_text: called when all
        speech of a turn has come.
        """
        self._pool, self._options, self._speech, self._outbox = pool, options, speech, outbox
        self._add_audio, self._finish_text = add_audio, finish_text
        self._changed = asyncio.Event()
        self._speaking: asyncio.Task[None] | None = None

    def add(self, say: api.SayText) -> bool:
        """Take text of the client; return whether it is to be spoken. A notice reports text that cannot be.

        ProtocolOrder if the turn has audio.
        """
        turn = self._speech.turn
        if say.HasField("turn") and say.turn < turn.number:
            return False
        if turn.has_audio:
            raise ProtocolOrder("the turn has audio; end it before text")
        try:
            self._check(say, turn)
        except InvalidText as error:
            self._report(error, turn.number)
            return False
        if not turn.text:
            # Of a turn that another gateway began, the client may lack the latest words.
            turn.text = TurnText(say.language, turn.num_samples - round(WORDS_AGAIN_S * self._options.rate_hz))
        if turn.text.is_over:  # the voice has failed
            return False
        turn.text.text += say.text
        self._changed.set()
        return True

    def _check(self, say: api.SayText, turn: Turn) -> None:
        """Raise InvalidText if text cannot be added to the current turn."""
        if say.HasField("turn") and say.turn > turn.number:
            raise InvalidText.at("say.turn", f"turn {say.turn} has not begun, the current one is {turn.number}")
        if not say.text:
            raise InvalidText.at("say.text", "it is empty")
        if turn.text and say.language and say.language != turn.text.language:
            raise InvalidText.at("say.language", "a turn has one language, that of its first text; end the turn before")
        num_chars = len(say.text) + sum(len(each.text.text) for each in self._speech.unfinished if each.text)
        if num_chars > MAX_TEXT_CHARS:
            message = f"{num_chars} characters in turns that are not over, at most {MAX_TEXT_CHARS} are accepted"
            raise InvalidText.at("say.text", message)

    def _report(self, error: AvatarError, turn: int) -> None:
        telemetry.TEXT_UNSPOKEN.add(1, {"reason": error.reason})
        message = error.message
        if isinstance(error, InvalidText | VoiceFailed):  # others are the worker's, and say so
            message = message.removeprefix("voice: ")
        self._outbox.put(notice(api.Notice.KIND_TEXT_UNSPOKEN, message, reason=error.reason, turn=turn))

    def end_turn(self) -> None:
        """Speak what is left of the text of turns that have ended."""
        self._changed.set()

    def interrupt(self) -> None:
        """Stop: all turns have been interrupted."""
        if self._speaking:
            self._speaking.cancel()

    async def run(self) -> None:
        """Speak turns, for ever. Raises QuotaExceeded if the tenant's audio is used up."""
        while True:
            turn = next((each for each in self._speech.unfinished if each.is_voiced), None)
            if turn is None:
                self._changed.clear()
                await self._changed.wait()
                continue
            async with background(self._speak(turn)) as self._speaking:
                await asyncio.wait({self._speaking})
            if not self._speaking.cancelled():
                self._speaking.result()

    async def _speak(self, turn: Turn) -> None:
        """Speak a turn to its end, or report why not."""
        assert turn.text
        attempt, num_samples = 0, 0
        try:
            while True:
                try:
                    await self._speak_all(turn, turn.text)
                    break
                except (NoCapacity, StageLost) as error:
                    attempt = 1 if turn.text.num_samples > num_samples else attempt + 1
                    num_samples = turn.text.num_samples
                    if attempt == MAX_ATTEMPTS:
                        raise
                    logger.warning("voice lost", extra={"reason": error.reason, "attempt": attempt})
                await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1))
        except QuotaExceeded:
            raise
        except AvatarError as error:
            turn.text.is_cut = True
            self._report(error, turn.number)
        self._finish_text(turn)

    async def _speak_all(self, turn: Turn, text: TurnText) -> None:
        """Speak the rest of a turn, by one stream after another: workers end those that get no text for a while."""
        before: tuple[int, int, bool] | None = None
        while (is_speakable := _is_speakable(text.text[text.num_spoken :])) or not turn.has_end:
            now = len(text.text), text.num_spoken, turn.has_end
            if is_speakable and now != before:
                before = now
                await self._speak_at_a_worker(turn, text)
            elif turn.has_end:
                raise StageLost("voice: a worker ended a turn early", metadata={"stage": "voice"}, retry_s=1.0)
            else:  # the text is spoken up to a sentence without an end
                self._changed.clear()
                await self._changed.wait()
        if not _is_speakable(text.text):
            raise InvalidText.at("say.text", "nothing to speak: it has no letter or digit")

    async def _speak_at_a_worker(self, turn: Turn, text: TurnText) -> None:
        """Speak a turn, from the first sentence whose speech is not complete, until the worker ends the stream."""
        first_char, base, last_sample = text.num_spoken, text.spoken_samples, text.num_samples - 1
        worker, stream = await self._pool.open(partial(self._open_at, text.language))
        limit, is_silent = WaitLimit(), False

        def give_up() -> None:
            """Stop waiting: the worker does not answer."""
            nonlocal is_silent
            is_silent = True
            limit.set(0.0)

        worker.on_silence.add(give_up)
        position = base
        try:
            async with aclosing(stream(self._pieces(turn, text, first_char))) as answers:
                while True:
                    with limit:
                        if is_silent:
                            limit.set(0.0)
                        piece = await anext(answers, None)
                    if piece is None:
                        return
                    self._add_words(text, piece, first_char, base, last_sample)
                    # Speech of the first sentence that another worker made before is not added again.
                    sample_bytes = self._options.sample_bytes
                    data = piece.data[max(0, text.num_samples - position) * sample_bytes :]
                    position += len(piece.data) // sample_bytes
                    text.num_samples = max(text.num_samples, position)
                    if data:
                        await self._add_audio(data, turn)
                    if first_char + piece.num_chars > text.num_spoken:
                        # Engines draw noise: the sentence may be shorter now than what was added of it before.
                        shorter = text.num_samples - position
                        base, position = base + shorter, position + shorter
                        text.num_spoken, text.spoken_samples = first_char + piece.num_chars, position
                        self._changed.set()
        except (StageLost, TimeoutError) as error:
            worker.mark_lost()
            telemetry.STREAMS_REBUILT.add(1, {"stage": "voice"})
            if isinstance(error, StageLost):
                raise
            raise StageLost("voice: a worker does not answer", metadata={"stage": "voice"}, retry_s=1.0) from error
        finally:
            worker.on_silence.discard(give_up)
            worker.load.num_own -= 1
            stream.cancel()

    async def _open_at(self, language: str, worker: Worker[Any], max_active: int | None) -> SpeakStage:
        stream, options = remote_voice(worker.channel), self._options
        await stream.open(
            pb.OpenSpeak(
                encoding=options.encoding,
                rate_hz=options.rate_hz,
                num_channels=options.num_channels,
                language=language,
                max_active=max_active,
            )
        )
        return stream

    async def _pieces(self, turn: Turn, text: TurnText, first_char: int) -> AsyncGenerator[pb.TextPiece, None]:
        """Yield a turn's text from a character on, as it arrives and speech is needed, until the turn ends."""
        while True:
            piece = text.text[first_char : text.num_spoken + AHEAD_CHARS]
            first_char += len(piece)
            if piece:
                yield pb.TextPiece(text=piece)
            elif turn.has_end and first_char == len(text.text):
                return
            else:
                self._changed.clear()
                await self._changed.wait()

    def _add_words(self, text: TurnText, piece: pb.SpokenPiece, first_char: int, base: int, last_sample: int) -> None:
        """Add the words of a piece, but none twice.

        first_char, base: where the stream's text and speech begin. last_sample: of the speech that came before the
        stream; words that begin there now, and had not before, begin with it.
        """
        end_char = text.words[-1].end_char if text.words else 0
        for word in piece.words:
            start = first_char + word.first_char
            if start >= end_char:
                end_char = start + word.num_chars
                first_sample = max(base + word.first_sample, last_sample)
                text.words.append(SpokenWord(first_sample, start, end_char, word.is_estimated))


def _is_speakable(text: str) -> bool:
    return any(map(str.isalnum, text))
