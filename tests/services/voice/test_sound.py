"""Tests of services.voice.sound."""

import struct

import numpy as np
import pytest

from avatar.errors import VoiceFailed
from services.voice.sound import PcmReader, Samples, SentenceResampler, StreamFormat, trailing_silence_s


def wav(data: bytes, rate_hz: int = 22050, channels: int = 1, bits: int = 16, size: int | None = None) -> bytes:
    """A WAV file with a chunk before its samples. size: of the samples, as the header says."""
    fmt = struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * channels * bits // 8, channels * bits // 8, bits)
    chunks = b"LIST" + struct.pack("<I", 3) + b"abc\0" + b"fmt " + struct.pack("<I", 16) + fmt
    return b"RIFF\xff\xff\xff\xffWAVE" + chunks + b"data" + struct.pack("<I", size or len(data)) + data


def read(reader: PcmReader, data: bytes, size: int) -> Samples:
    return np.concatenate([reader.read(data[start : start + size]) for start in range(0, len(data), size)])


PCM = struct.pack("<6h", 0, 16384, -32768, 32767, 1, -1)
SAMPLES = [0, 0.5, -1, 32767 / 32768, 1 / 32768, -1 / 32768]


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_wav_file_is_read_in_pieces_of_any_size(size: int, is_stream: bool) -> None:
    reader = PcmReader()
    assert read(reader, wav(PCM, size=0xFFFFFFFF if is_stream else None), size).tolist() == pytest.approx(SAMPLES)
    assert reader.rate_hz == 22050


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_what_follows_the_samples_of_a_wav_file_is_not_heard(size: int) -> None:
    file = wav(PCM) + b"LIST" + struct.pack("<I", 4) + b"\xff\x7f\xff\x7f"
    assert read(PcmReader(), file, size).tolist() == pytest.approx(SAMPLES)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_samples_without_a_header_have_the_given_rate(size: int) -> None:
    reader = PcmReader(24000)
    assert read(reader, PCM * 3, size).tolist() == pytest.approx(SAMPLES * 3)
    assert reader.rate_hz == 24000
    assert PcmReader(24000).read(wav(PCM)).tolist() == pytest.approx(SAMPLES)  # unless there is one


def test_channels_are_averaged() -> None:
    assert PcmReader().read(wav(PCM, channels=2)).tolist() == pytest.approx([0.25, -1 / 65536, 0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>not found</html>", "no WAV file"),
        (wav(PCM, bits=8), "channels of 8 bits"),
        (wav(PCM, channels=3), "3 channels"),
        (wav(PCM, rate_hz=5), "5 Hz"),
        (b"RIFF\0\0\0\0WAVEdata\0\0\0\0", "no format"),
        (b"RIFF\0\0\0\0WAVEjunk\xff\xff\0\1" + bytes(70000), "no samples"),
        (b"RIFF\0\0\0\0WAVEfmt \2\0\0\0\1\0data\0\0\0\0", "broken format"),
    ],
)
def test_what_is_no_such_sound_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(VoiceFailed, match=message):
        PcmReader().read(data)


@pytest.mark.parametrize("encoding", ["pcm16", "float32"])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_are_encoded_for_a_stream(encoding: str, channels: int) -> None:
    stream = StreamFormat(encoding, 16000, channels)
    data = stream.encode(np.array([0, 0.5, 3], np.float32))
    assert len(data) == 3 * stream.sample_bytes
    values = np.frombuffer(data, "<i2" if encoding == "pcm16" else "<f4").reshape(3, channels)
    scale = 32767 if encoding == "pcm16" else 1
    assert values.tolist() == [[round(each * scale) if scale > 1 else each] * channels for each in (0, 0.5, 1)]


def test_resampling_in_pieces_equals_the_whole() -> None:
    sound = np.sin(np.arange(24000) * 0.05).astype(np.float32)
    whole, parts = SentenceResampler(16000), SentenceResampler(16000)
    expected = np.concatenate([whole(sound, 24000), whole.finish()])
    streamed = [parts(sound[start : start + 777], 24000) for start in range(0, len(sound), 777)]
    assert len(expected) == 16000
    np.testing.assert_allclose(np.concatenate([*streamed, parts.finish()]), expected, atol=1e-6)
    with pytest.raises(VoiceFailed, match="changes from 24000 to 22050 Hz"):
        parts(sound, 22050)


def test_silence_at_the_end_is_measured() -> None:
    assert trailing_silence_s(np.array([0, 1, 0, 0], np.float32), 2) == 1.0
    assert trailing_silence_s(np.zeros(4, np.float32), 2) == 0.0
