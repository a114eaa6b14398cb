"""The voice worker's service: pieces of a turn's text in, speech out, a sentence at a time."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing

import grpc.aio

from avatar import telemetry
from avatar.aio import background
from avatar.errors import InvalidAudio, InvalidText, VoiceFailed
from avatar.rpc.interceptor import Context, max_active, parts, receive_open
from avatar.runtime.admission import AdmissionControl, DeviceLoad
from avatar.settings import MAX_TEXT_CHARS
from avatar.worker.v1 import voice_pb2 as pb
from avatar.worker.v1 import voice_pb2_grpc
from avatar.worker.v1.types_pb2 import Closed
from services.voice.engines import Engine
from services.voice.sentences import Sentence, Sentences
from services.voice.sound import SentenceResampler, StreamFormat, trailing_silence_s
from services.voice.word_times import Speed, TimedWord, WordTimes

logger = logging.getLogger(__name__)

PIECE_S = 0.25
ENCODINGS = ("pcm16", "float32")
MIN_RATE_HZ, MAX_RATE_HZ = 8000, 48000
LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")
# Seconds without text after which a stream ends, so that turns that are not ended leave their slots to others.
IDLE_S = 10.0
# The longest sound of a sentence, in seconds: so much, and for each character. An engine that does not stop is broken.
LONGEST_S, LONGEST_CHAR_S = 10.0, 0.5


class VoiceServicer(voice_pb2_grpc.VoiceServiceServicer):
    """Serves one speech engine to as many turns at a time as it has capacity for."""

    service_name = "avatar.worker.v1.VoiceService"
    stage = "voice"

    def __init__(self, engine: Engine, capacity: int, idle_s: float = IDLE_S) -> None:
        """idle_s: seconds without text after which a stream ends."""
        self._engine = engine
        self._idle_s = idle_s
        self._speed = Speed()
        # Without steps that are timed, the limit alone counts.
        self._admission = AdmissionControl(capacity, "voice", DeviceLoad(), PIECE_S)
        self.changed = asyncio.Event()
        self._admission.on_change = self.changed.set

    def add_to(self, server: grpc.aio.Server) -> None:
        voice_pb2_grpc.add_VoiceServiceServicer_to_server(self, server)

    def info(self) -> pb.VoiceServiceGetInfoResponse:
        """Describe the worker as it is now."""
        return pb.VoiceServiceGetInfoResponse(
            engine=self._engine.name,
            languages=self._engine.languages,
            max_chars=MAX_TEXT_CHARS,
            capacity=self._admission.capacity,
            active=self._admission.active,
        )

    async def GetInfo(self, request: pb.VoiceServiceGetInfoRequest, context: Context) -> pb.VoiceServiceGetInfoResponse:
        return self.info()

    async def Speak(
        self, requests: AsyncIterator[pb.SpeakRequest], context: Context
    ) -> AsyncGenerator[pb.SpeakResponse, None]:
        opened: pb.OpenSpeak = await receive_open(requests)
        stream_format = _stream_format(opened)
        language = self._language(opened.language)
        sentences: asyncio.Queue[Sentence | None] = asyncio.Queue()  # bounded by MAX_TEXT_CHARS
        turn, num_spoken, started_s = _Turn(stream_format), 0, time.monotonic()
        with self._admission.accept("", is_live=False, max_active=max_active(opened)):
            yield pb.SpeakResponse(opened=pb.SpeakOpened())
            async with background(_read(requests, sentences)) as reading:
                while sentence := await self._next(sentences, reading):
                    if sentence.spoken:
                        num_spoken += 1
                        async with aclosing(self._speak(sentence, language, turn)) as pieces:
                            async for piece in pieces:
                                yield pb.SpeakResponse(speech=piece)
                    turn.num_chars = sentence.end_char
                    yield pb.SpeakResponse(speech=pb.SpokenPiece(num_chars=turn.num_chars))
                await asyncio.wait({reading})
                if not reading.cancelled():
                    reading.result()
            if num_spoken and not turn.num_samples:
                raise self._failed("the speech engine made no sound: it may not speak the language or script")
            yield pb.SpeakResponse(closed=Closed(num_blocks=num_spoken, busy_s=time.monotonic() - started_s))

    async def _next(self, sentences: "asyncio.Queue[Sentence | None]", reading: asyncio.Task[None]) -> Sentence | None:
        """Return the next sentence; None at the end of the text, or after `idle_s`, which ends the reading of text."""
        try:
            async with asyncio.timeout(self._idle_s):
                return await sentences.get()
        except TimeoutError:
            reading.cancel()
            return None

    async def _speak(self, sentence: Sentence, language: str, turn: "_Turn") -> AsyncGenerator[pb.SpokenPiece, None]:
        """Yield a sentence's speech and words. Raises the engine's VoiceFailed."""
        started_s, is_first = time.monotonic(), True
        words, resample = WordTimes(sentence, self._speed), SentenceResampler(turn.format.rate_hz)
        start, sound_s, total_s = turn.num_samples, 0.0, None
        longest_s = LONGEST_S + LONGEST_CHAR_S * len(sentence.text)

        def pieces(samples: bytes) -> Iterator[pb.SpokenPiece]:
            for data in turn.cut(samples):
                end_s = (turn.num_samples - start) / turn.format.rate_hz
                yield turn.piece(data, start, words.until(end_s, total_s))

        try:
            async with aclosing(self._engine.speak(sentence.spoken, language)) as sounds:
                async for sound in sounds:
                    if is_first:
                        telemetry.VOICE_LATENCY.record(time.monotonic() - started_s)
                        is_first = False
                    sound_s += len(sound.samples) / sound.rate_hz
                    if sound_s > longest_s:
                        raise VoiceFailed(f"the speech of a sentence is longer than {longest_s:g} s")
                    words.know(sound.words_s)
                    if sound.is_last:
                        total_s = sound_s - trailing_silence_s(sound.samples, sound.rate_hz)
                    for piece in pieces(turn.format.encode(resample(sound.samples, sound.rate_hz))):
                        yield piece
            if is_first:
                raise VoiceFailed("the speech engine made no sound")
        except VoiceFailed as error:
            raise self._failed(error.message) from error
        for piece in pieces(turn.format.encode(resample.finish())):
            yield piece
        if turn.num_samples > start:
            yield turn.piece(b"", start, words.finish((turn.num_samples - start) / turn.format.rate_hz))

    def _failed(self, problem: str) -> VoiceFailed:
        """Return the engine's failure, and log it."""
        logger.warning("speech failed", extra={"engine": self._engine.name, "problem": problem})
        return VoiceFailed(problem)

    def _language(self, language: str) -> str:
        """Return the engine's tag of a language, or else of the same in another region. InvalidText if it has none."""
        if not language:
            return ""
        if not LANGUAGE.fullmatch(language):
            raise InvalidText.at("say.language", f"{language[:40]!r} is no BCP 47 tag, such as `en` or `pt-BR`")
        known = self._engine.languages
        if not known:
            return language
        wanted = language.lower()
        for found in known:
            if found.lower() == wanted:
                return found
        for found in known:
            if found.lower().partition("-")[0] == wanted.partition("-")[0]:
                return found
        raise InvalidText.at("say.language", f"{language} is not spoken here, only {', '.join(known)}")


class _Turn:
    """The speech of one stream. num_samples: of each channel so far. num_chars: of text that is spoken to its end."""

    def __init__(self, stream_format: StreamFormat) -> None:
        self.format = stream_format
        self.num_samples = self.num_chars = 0
        self._sample_bytes = stream_format.sample_bytes
        self._piece_bytes = round(PIECE_S * stream_format.rate_hz) * self._sample_bytes

    def cut(self, data: bytes) -> Iterator[bytes]:
        """Count speech, and yield it in pieces."""
        for start in range(0, len(data), self._piece_bytes):
            piece = data[start : start + self._piece_bytes]
            self.num_samples += len(piece) // self._sample_bytes
            yield piece

    def piece(self, data: bytes, start: int, words: list[TimedWord]) -> pb.SpokenPiece:
        """Return a piece with its words. start: sample at which their sentence begins."""
        timed = [
            pb.Word(
                first_char=each.word.first_char,
                num_chars=len(each.word.text),
                first_sample=start + round(each.start_s * self.format.rate_hz),
                is_estimated=each.is_estimated,
            )
            for each in words
        ]
        return pb.SpokenPiece(data=data, words=timed, num_chars=self.num_chars)


async def _read(requests: AsyncIterator[pb.SpeakRequest], sentences: "asyncio.Queue[Sentence | None]") -> None:
    """Split the stream's text into sentences; None is the end. InvalidText if it is too long."""
    text = Sentences()
    try:
        async with aclosing(parts(requests, "text")) as messages:
            async for message in messages:
                if text.num_chars + len(message.text) > MAX_TEXT_CHARS:
                    raise InvalidText.at("say.text", f"a turn has at most {MAX_TEXT_CHARS} characters")
                for sentence in text.add(message.text):
                    sentences.put_nowait(sentence)
        for sentence in text.finish():
            sentences.put_nowait(sentence)
    finally:
        sentences.put_nowait(None)


def _stream_format(opened: pb.OpenSpeak) -> StreamFormat:
    """Return the format of a stream. InvalidAudio if there is no such."""
    if opened.encoding not in ENCODINGS:
        raise InvalidAudio.at("open.encoding", f"{opened.encoding!r}, expected {' or '.join(ENCODINGS)}")
    if not MIN_RATE_HZ <= opened.rate_hz <= MAX_RATE_HZ:
        raise InvalidAudio.at("open.rate_hz", f"{opened.rate_hz} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    if opened.num_channels not in (1, 2):
        raise InvalidAudio.at("open.num_channels", f"{opened.num_channels}, expected 1 or 2")
    return StreamFormat(opened.encoding, opened.rate_hz, opened.num_channels)
