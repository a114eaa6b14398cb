"""Decoding of the audio in files as people have them: joined, cut short, damaged, of changing formats.

    file --joined files--> spans --FFmpeg's packets--> pieces --runs of one format--> samples of one rate

What cannot be decoded is left out and reported. Files are read through Python, so a name is never a protocol, and a
playlist opens nothing.

Axes: a audio channels, s samples.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, BinaryIO

import av
import numpy as np
import soxr
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from avatar.audio.alignment import MAX_RATE_HZ, MIN_RATE_HZ
from avatar.audio.file_header import FRAMES, MP4, RIFX, Span, begins, declared_end, joined_files

MAX_FILE_RATE_HZ = 768_000
"""No recorder has a higher rate; rates above MAX_RATE_HZ are resampled."""

MAX_NUMBERS = 2 * 48_000 * 3600
"""Samples of all channels of a file, an hour of stereo at 48 kHz: 1.4 GB as float32. Decoding takes twice that."""

# PyAV reads past the end of its pointers to the channels if there are more, in frames with a plane for each.
MAX_PLANES = 8
MAX_CHANNELS = 64
MAX_RUNS = 1000
# Demuxers report at most so many errors in a row before the rest of a file counts as damaged.
MAX_DEMUX_ERRORS = 100
# A hole in the audio as packets' times show it, and the difference of a header's duration that is no rounding.
HOLE_S, CUT_S = 0.02, 0.05
# The longest silence put in the place of a packet that cannot be decoded.
MAX_PACKET_S = 1.0
# Demuxers whose duration is declared by the file. Others estimate it from a bit rate.
DECLARES_DURATION = ("flac", "ogg", "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# A mix that keeps less than this share of the loudest channel's energy (-12 dB) is replaced by that channel.
MIN_MIX_SHARE = 1 / 16
# Full scale of integer samples, and the value of silence.
INTEGERS = {"u8": (128, 128), "s16": (1 << 15, 0), "s32": (1 << 31, 0), "s64": (1 << 63, 0)}
# Packets of MP3 that players skip: the first one, with the file's length and gain, and tags between joined files.
NO_AUDIO = re.compile(rb"^(?:ID3|TAG|APETAGEX)|Xing|Info|VBRI")
MAX_XING_BYTES = 64
MAX_NOTES = 5
# Offsets in damaged headers may be ones to which no file can seek.
READ_ERRORS = (av.FFmpegError, OSError, OverflowError)
CONVERT = "convert it, such as by `ffmpeg -i FILE -ar 16000 -c:a pcm_s16le OUT.wav`"


@dataclass
class DecodedAudio:
    """The audio of a file.

    samples: (1 or 2, s) float32; integers are scaled by their full range. rate_hz: 8000 to 48000.
    notes: sentences without a subject on what is missing or changed, for the file's owner; empty if all is well.
    """

    samples: NDArray[np.float32]
    rate_hz: int
    notes: list[str]


@contextmanager
def open_container(file: BinaryIO | Span, kind: str | None = None) -> Iterator[InputContainer]:
    """Open a media file with FFmpeg, which opens no other file. FFmpegError if no demuxer recognises it.

    kind: FFmpeg's name of a format, instead of the one that it recognises.
    """
    # Tags need not be UTF-8. Playlists name other files; no protocol is allowed for these.
    with av.open(file, "r", kind, metadata_errors="replace", options={"protocol_whitelist": "none"}) as container:
        yield container


def decode_audio(file: BinaryIO) -> DecodedAudio:
    """Decode the first audio stream of a file. ValueError, without a subject, if there is nothing in it to decode."""
    reading = _Reading()
    spans = joined_files(file)
    if not spans[0].size:
        raise ValueError("is empty: it has no bytes")
    for span in spans:
        reading.read(span)
    return reading.finish()


@dataclass
class _Reading:
    """A file's audio as far as it is decoded.

    pieces: (rate, samples (a, s)) in order. seconds: their length. num_numbers: samples in them, of all channels.
    num_runs: changes of their format. byte_hz: bytes a second of an MP3 file that is read on behind damage, else 0.
    damage: sentences on what is missing. errors: why nothing can be read.
    """

    pieces: list[tuple[int, NDArray[np.float32]]] = field(default_factory=list)
    seconds: float = 0.0
    num_numbers: int = 0
    num_runs: int = 0
    byte_hz: float = 0.0
    damage: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def read(self, span: Span) -> None:
        """Append the audio of a file that may be one of several joined ones."""
        start_s = self.seconds
        if error := self._error_of(span):
            self.errors.append(error)
            if self.seconds > start_s:
                self.damage.append(f"is damaged at {self.seconds:.2f} s: what follows cannot be read")
            else:
                self.damage.append(f"consists of joined files: the one at {start_s:.2f} s {error}")

    def _error_of(self, span: Span) -> str | None:
        """Append a file's audio. Return why it cannot be read, None if it can."""
        if begins(span, RIFX):
            return f"is a big-endian WAV file (RIFX), which cannot be read; {CONVERT}"
        self.byte_hz = 0.0
        try:
            for _ in range(MAX_DEMUX_ERRORS):
                with open_container(span, "mp3" if self.byte_hz else None) as container:
                    if not container.streams.audio:
                        return "is not an audio file: it has no audio stream"
                    if container.streams.audio[0].codec_context is None:
                        return "has audio that FFmpeg cannot decode"
                    damage_end = self._read_stream(container, container.streams.audio[0], span)
                if damage_end is None:
                    return None
                span = span.part(damage_end, span.size)
        except READ_ERRORS as error:
            cut = "; an MP4 file that is cut short has lost its index" if begins(span, MP4) else ""
            reason = error.strerror if isinstance(error, OSError | av.FFmpegError) else error
            return f"is not an audio file, or is damaged: {reason}{cut}"
        return f"is damaged in more than {MAX_DEMUX_ERRORS} places"

    def _read_stream(self, container: InputContainer, stream: AudioStream, span: Span) -> int | None:
        """Append a stream's audio. Return the offset of damage in an MP3 file behind which it is opened again, or None.

        FFmpeg's parser leaves frames that follow damage in its packet, at the end of a file all of them.
        """
        if stream.codec_context.name == "flac":
            # Frames whose checksum is wrong would be decoded to noise.
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
        start_s, failed_s, pending_s = self.seconds, 0.0, 0.0
        end_s: float | None = None  # of the last frame, by the file's times
        failures = [self.seconds] if self.byte_hz else []
        holes: list[float] = []
        damage_end: int | None = None
        sound: Any = None  # the last packet that was decoded
        for packet in _packets(container, stream):
            if self.byte_hz and packet:
                failed_s = (packet.pos or 0) / self.byte_hz
                pending_s, self.byte_hz = min(failed_s, MAX_PACKET_S), 0.0
            try:
                frames = packet.decode() if packet else []
            except av.FFmpegError:
                frames = []
                start = bytes(packet)[:MAX_XING_BYTES]
                if NO_AUDIO.search(start):
                    continue
                if sound and packet.pos is not None and container.format.name == "mp3" and not FRAMES.match(start):
                    self.byte_hz = sound.size / _seconds(sound)
                    damage_end = int(packet.pos) + 1
                    break
                length_s = min(_seconds(packet), MAX_PACKET_S)
                failed_s, pending_s, end_s = failed_s + length_s, pending_s + length_s, None
                failures.append(self.seconds)
            if packet is None:
                failures.append(self.seconds)
            sound = packet if frames and _seconds(packet) else sound
            for frame in frames:
                time_s = end_s if frame.time is None else frame.time
                if end_s is not None and time_s is not None and time_s - end_s > HOLE_S:
                    holes.append(self.seconds)
                end_s = None if time_s is None else time_s + frame.samples / (frame.rate or 1)
                if self._append(frame, pending_s):
                    pending_s = 0.0
                else:
                    failures.append(self.seconds)
            if len(frames) > 1 and container.format.name == "flac":
                # FFmpeg's parser leaves a damaged frame in one packet with sound ones; the decoder stops at it.
                holes.append(self.seconds)
        if container.format.name == "ogg" and (declared_end(span) or 0) > span.size:
            failures.append(self.seconds)  # FFmpeg drops an incomplete page
        if damage_end is not None:
            if failures:
                self._report(failures, failed_s)
            return damage_end
        missing_s = max(failed_s, _missing_s(container, stream, span, self.seconds - start_s - (failed_s - pending_s)))
        places = sorted({*failures, *holes})
        if failures or missing_s > (HOLE_S if places else CUT_S):
            self._report(places or [self.seconds], missing_s)
        return None

    def _append(self, frame: AudioFrame, silence_s: float) -> bool:
        """Append a frame, after silence in the place of what failed. False if its format is not possible."""
        rate_hz, num_channels = frame.rate, frame.layout.nb_channels
        most_channels = MAX_PLANES if frame.format.is_planar else MAX_CHANNELS
        if not MIN_RATE_HZ <= rate_hz <= MAX_FILE_RATE_HZ or not 1 <= num_channels <= most_channels:
            limits = f"{MIN_RATE_HZ} to {MAX_FILE_RATE_HZ} Hz and 1 to {most_channels} channels"
            self.errors.append(f"has {rate_hz} Hz and {num_channels} channels, expected {limits}")
            return False
        samples = to_float(frame)
        if silence_s and self.pieces:
            samples = np.pad(samples, ((0, 0), (round(silence_s * rate_hz), 0)))
        self.num_numbers += samples.size
        if self.num_numbers > MAX_NUMBERS:
            minutes = MAX_NUMBERS / (rate_hz * num_channels * 60)
            raise ValueError(f"is longer than {minutes:.0f} minutes, the most that is read of its format; cut it")
        if not self.pieces or (self.pieces[-1][0], len(self.pieces[-1][1])) != (rate_hz, num_channels):
            self.num_runs += 1
            if self.num_runs > MAX_RUNS:
                raise ValueError(f"changes its format more than {MAX_RUNS} times; convert it to WAV")
        self.pieces.append((rate_hz, samples))
        self.seconds += samples.shape[1] / rate_hz
        return True

    def _report(self, places: list[float], missing_s: float) -> None:
        what = "cut short" if places[0] > self.seconds - HOLE_S else "damaged"
        where = f"at {places[0]:.2f} s" + (f" and at {len(places) - 1} later places" if len(places) > 1 else "")
        how_much = f"at least {missing_s:.2f} s are missing" if missing_s >= 0.01 else "an unknown part is missing"
        self.damage.append(f"is {what} {where}: {how_much}")

    def finish(self) -> DecodedAudio:
        """Return all samples at one rate: the highest in the file, at most MAX_RATE_HZ."""
        if not any(samples.size for _, samples in self.pieces):
            nothing = "is damaged: nothing in it can be decoded" if self.damage else "is empty: no samples"
            raise ValueError(self.errors[0] if self.errors else nothing)
        notes = self.damage[:MAX_NOTES]
        target_hz = min(MAX_RATE_HZ, max(rate_hz for rate_hz, _ in self.pieces))
        runs: list[NDArray[np.float32]] = []
        pieces, self.pieces = self.pieces, []
        for (rate_hz, num_channels), run in groupby(pieces, lambda piece: (piece[0], len(piece[1]))):
            mixed = mix_down(np.concatenate([samples for _, samples in run], axis=1))
            if num_channels == 2 and len(mixed) == 1:
                notes.append("has channels that cancel each other: the louder one is used")
            runs.append(_resample(mixed, rate_hz, target_hz))
        if len(runs) == 1:
            return DecodedAudio(runs[0], target_hz, notes)
        channels = max(map(len, runs))
        together = [np.broadcast_to(run, (channels, run.shape[1])) if len(run) == 1 else run for run in runs]
        return DecodedAudio(np.concatenate(together, axis=1), target_hz, notes)


def _packets(container: InputContainer, stream: AudioStream) -> Iterator[Any]:
    """Yield a stream's packets, and None where the demuxer failed and went on."""
    for _ in range(MAX_DEMUX_ERRORS):
        try:
            yield from container.demux(stream)
            return
        except av.EOFError:
            return
        except READ_ERRORS:
            yield None


def _seconds(packet: Any) -> float:
    return float((packet.duration or 0) * (packet.time_base or 0))


def _missing_s(container: InputContainer, stream: AudioStream, span: Span, decoded_s: float) -> float:
    """Return the seconds that a file declares beyond those that were decoded; 0 if it declares nothing."""
    missing_s = 0.0
    if container.format.name in DECLARES_DURATION:
        if stream.duration is not None and stream.time_base is not None:
            missing_s = float(stream.duration * stream.time_base) - decoded_s
        elif container.duration is not None and len(container.streams) == 1:
            missing_s = container.duration / av.time_base - decoded_s
    if (end := declared_end(span)) is not None:
        missing_s = max(missing_s, decoded_s * (end / span.size - 1))
    return missing_s


def to_float(frame: AudioFrame) -> NDArray[np.float32]:
    """Return a frame's samples (a, s), integers scaled by their full range; numbers that are not finite are 0."""
    name, num_channels = frame.format.name.removesuffix("p"), frame.layout.nb_channels
    if frame.format.name == "s64":  # PyAV converts all but these
        values: NDArray[Any] = np.frombuffer(bytes(frame.planes[0]), np.int64)[: frame.samples * num_channels]
    else:
        values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, num_channels).T
    if name in INTEGERS:
        scale, silence = INTEGERS[name]
        return np.ascontiguousarray(values.astype(np.float32) - silence) / np.float32(scale)
    with np.errstate(over="ignore"):
        samples = np.array(values, np.float32, order="C")
    return np.nan_to_num(samples, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def mix_down(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return samples (a, s) with at most two channels: more are averaged to one.

    Where the average is over 12 dB quieter than the loudest channel, as of stereo in opposite phases or of a film's
    centre channel, this channel is returned alone.
    """
    if len(samples) == 1:
        return samples
    mix = samples.mean(0)
    energies = [float(channel @ channel) for channel in samples]
    loudest = int(np.argmax(energies))
    if float(mix @ mix) < MIN_MIX_SHARE * energies[loudest]:
        return np.ascontiguousarray(samples[loudest : loudest + 1])
    return samples if len(samples) == 2 else mix[None]


def _resample(samples: NDArray[np.float32], rate_hz: int, target_hz: int) -> NDArray[np.float32]:
    if rate_hz == target_hz:
        return samples
    resampled: NDArray[np.float32] = soxr.resample(samples.T, rate_hz, target_hz).T
    return np.ascontiguousarray(resampled)
