"""Tests of avatar.client.wav: formats as PyAV writes and reads them, headers as programs write them, and damage."""

import random
import struct
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from avatar.client import read_wav

RATE_HZ = 16000
CODECS = ["u8", "s16le", "s24le", "s32le", "f32le", "f64le", "alaw", "mulaw"]
LIST = b"LIST\x07\0\0\0INFOabc"


def tone(seconds: float = 0.25, hz: float = 440.0, rate_hz: int = RATE_HZ) -> NDArray[np.float64]:
    """A tone whose loudness rises to 0.8 of full scale."""
    num_samples = round(seconds * rate_hz)
    return np.sin(2 * np.pi * hz * np.arange(num_samples) / rate_hz) * np.linspace(0, 0.8, num_samples)


def chunk(kind: bytes, data: bytes, size: int | None = None) -> bytes:
    return kind + struct.pack("<I", len(data) if size is None else size) + data


def riff(*chunks: bytes, size: int | None = None, kind: bytes = b"RIFF") -> bytes:
    return chunk(kind, body := b"WAVE" + b"".join(chunks), len(body) if size is None else size)


def fmt(tag: int = 1, channels: int = 1, rate_hz: int = RATE_HZ, bits: int = 16, more: bytes = b"") -> bytes:
    frame_bytes = channels * bits // 8
    values = struct.pack("<HHIIHH", tag, channels, rate_hz, rate_hz * frame_bytes, frame_bytes, bits)
    return chunk(b"fmt ", values + more)


def pcm16(*channels: NDArray[np.float64]) -> bytes:
    return (np.stack(channels, 1) * 32767).round().astype("<i2").tobytes()


def wav(*channels: NDArray[np.float64], rate_hz: int = RATE_HZ) -> bytes:
    return riff(fmt(channels=len(channels), rate_hz=rate_hz), chunk(b"data", pcm16(*channels)))


def encoded(codec: str, num_channels: int) -> bytes:
    """A file as FFmpeg writes it, with the tone in all channels."""
    layout = "mono" if num_channels == 1 else "stereo" if num_channels == 2 else "5.1"
    with av.open(file := BytesIO(), "w", "wav") as out:
        stream = out.add_stream(f"pcm_{codec}", rate=RATE_HZ, layout=layout)
        assert isinstance(stream, av.AudioStream)
        data = np.tile(tone().astype("f4"), (num_channels, 1))
        frame = av.AudioFrame.from_ndarray(data, format="fltp", layout=layout)
        frame.rate = RATE_HZ
        resampler = av.AudioResampler(format=stream.format.name, layout=layout, rate=RATE_HZ)
        for each in resampler.resample(frame):
            out.mux(stream.encode(each))
        out.mux(stream.encode(None))
    return file.getvalue()


def decoded(data: bytes) -> NDArray[np.float64]:
    """The samples of the first channel as FFmpeg reads them."""
    resampler = av.AudioResampler(format="dblp", rate=RATE_HZ)
    with av.open(BytesIO(data), "r") as file:
        frames = [each for frame in file.decode(audio=0) for each in resampler.resample(frame)]
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


def samples(data: bytes) -> NDArray[np.float64]:
    return np.frombuffer(read_wav(data)[0], "<i2") / 32768


@pytest.mark.parametrize("num_channels", [1, 2, 6])
@pytest.mark.parametrize("codec", CODECS)
def test_every_format_is_read_as_others_read_it(codec: str, num_channels: int) -> None:
    data = encoded(codec, num_channels)
    assert read_wav(data)[1] == RATE_HZ
    np.testing.assert_allclose(samples(data), decoded(data), rtol=1e-4, atol=1.1 / 32768)


def test_pcm16_comes_back_as_it_is() -> None:
    assert read_wav(wav(tone())) == (pcm16(tone()), RATE_HZ)


@pytest.mark.parametrize(
    "header",
    [
        riff(fmt(), chunk(b"data", pcm16(tone()), 0xFFFFFFFF), size=0xFFFFFFFF),
        riff(fmt(), chunk(b"data", pcm16(tone()), 0), size=0),
        riff(fmt(), chunk(b"data", pcm16(tone()), 0), size=36),
        riff(fmt(), chunk(b"data", pcm16(tone()), 0)),
        riff(fmt(), chunk(b"data", pcm16(tone()), 0x7FFFF000), size=0x7FFFF024),
        riff(LIST + b"\0", fmt(), LIST + b"\0", chunk(b"data", pcm16(tone())), LIST),
        riff(fmt(), LIST, chunk(b"data", pcm16(tone()))),
        riff(fmt(), chunk(b"data", pcm16(tone())), LIST),
        riff(chunk(b"data", pcm16(tone())), fmt()),
        riff(fmt(), chunk(b"data", pcm16(tone()) + b"\x01")),
        riff(
            chunk(b"ds64", struct.pack("<QQQI", 2**33, 2 * len(tone()), len(tone()), 0)),
            fmt(),
            chunk(b"data", pcm16(tone()), 0xFFFFFFFF),
            LIST,
            size=0xFFFFFFFF,
            kind=b"RF64",
        ),
        b"ID3\x03\0\0\0\0\x02\0" + bytes(256) + wav(tone()),
        riff(
            fmt(0xFFFE, more=struct.pack("<HHIH", 22, 16, 4, 1) + bytes.fromhex("000000001000800000aa00389b71")),
            chunk(b"data", pcm16(tone())),
        ),
    ],
)
def test_headers_of_streaming_and_tagging_programs_are_read(header: bytes) -> None:
    assert read_wav(header) == (pcm16(tone()), RATE_HZ)


def test_a_file_that_is_cut_short_gives_what_it_has() -> None:
    assert read_wav(wav(tone())[:-101]) == (pcm16(tone())[:-102], RATE_HZ)


def test_channels_are_mixed_unless_they_cancel() -> None:
    left, right = tone(hz=440) / 2, tone(hz=700)
    np.testing.assert_allclose(samples(wav(left, right)), (left + right) / 2, atol=2 / 32768)
    np.testing.assert_allclose(samples(wav(right, -0.9 * right)), right, atol=2 / 32768)
    np.testing.assert_allclose(samples(wav(right, 0 * right)), right / 2, atol=2 / 32768)
    np.testing.assert_allclose(samples(wav(right, -0.3 * right)), right * 0.35, atol=2 / 32768)


@pytest.mark.parametrize("halvings", [1, 2])
def test_high_rates_are_halved_without_aliases(halvings: int) -> None:
    rate_hz = 48000 << halvings
    data, halved_hz = read_wav(wav(tone(hz=300, rate_hz=rate_hz), tone(hz=47_000, rate_hz=rate_hz), rate_hz=rate_hz))
    assert halved_hz == 48000
    np.testing.assert_allclose(np.frombuffer(data, "<i2") / 32768, tone(hz=300, rate_hz=48000) / 2, atol=0.01)


def test_floats_are_clipped_and_silent_where_they_are_no_numbers() -> None:
    values = np.array([0.5, 2.0, -2.0, np.nan, np.inf, -1.0, 0.0], "<f4")
    data = riff(fmt(3, bits=32), chunk(b"data", values.tobytes()))
    np.testing.assert_allclose(samples(data), [0.5, 1, -1, 0, 0, -1, 0], atol=2 / 32768)


def test_a_path_is_read_and_named_in_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "speech.wav"
    path.write_bytes(wav(tone()))
    assert read_wav(path) == read_wav(str(path)) == read_wav(wav(tone()))
    path.write_bytes(b"fLaC")
    with pytest.raises(ValueError, match=r"speech.wav is no WAV file, but FLAC; convert it"):
        read_wav(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty: it has no bytes"),
        (b"\x00" * 100, "an unknown format; if it has audio, convert it"),
        (b"\x00\x00\x00\x20ftypM4A ", "but MP4 or M4A; convert it"),
        (b"\xff\xf1\x50", "but AAC; convert it"),
        (b"#!AMR\n", "but AMR; convert it"),
        (b".snd", "but AU; convert it"),
        (b"\x89PNG\r\n", "but a PNG picture; pass a file of speech"),
        (b"OggS", "but Ogg"),
        (b"ID3\x03" + bytes(100), "but MP3"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
        (riff(fmt(0x55), chunk(b"data", bytes(100))), r"compressed \(MP3\)"),
        (riff(fmt(0x11, bits=4), chunk(b"data", bytes(100))), r"compressed \(IMA ADPCM\)"),
        (riff(fmt(0x7777), chunk(b"data", bytes(100))), "0x7777"),
        (riff(fmt(0xFFFE, more=bytes(24)), chunk(b"data", bytes(100))), "unknown extensible"),
        (riff(fmt(channels=0), chunk(b"data", bytes(100))), "no channels"),
        (riff(fmt(rate_hz=4000), chunk(b"data", bytes(100))), "4000 Hz"),
        (riff(fmt(rate_hz=2**30), chunk(b"data", bytes(100))), "Hz"),
        (riff(fmt(3, bits=16), chunk(b"data", bytes(100))), "16 bits"),
        (riff(fmt(bits=0), chunk(b"data", bytes(100))), "0 bits"),
        (riff(chunk(b"fmt ", bytes(8)), chunk(b"data", bytes(100))), "8 bytes instead of 16"),
        (riff(fmt()), "no `data` chunk"),
        (riff(chunk(b"data", bytes(100))), "no `fmt `"),
        (riff(fmt(), chunk(b"data", b"")), "no audio"),
        (riff(fmt(), chunk(b"data", b""), LIST), "no audio"),
        (riff(fmt(channels=2), chunk(b"data", bytes(3))), "no audio"),
    ],
)
def test_other_files_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_wav(data)


def test_damaged_files_raise_nothing_but_value_errors() -> None:
    draw = random.Random(0)
    originals = [encoded(codec, 2)[:400] for codec in CODECS]
    num_refused = 0
    for _ in range(300):
        data = bytearray(draw.choice(originals))
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(60)] = draw.choice((0, 1, 255, draw.randrange(256)))
        try:
            audio, rate_hz = read_wav(bytes(data[: draw.choice((len(data), draw.randrange(len(data))))]))
            assert audio
            assert 8000 <= rate_hz <= 48000
        except ValueError:
            num_refused += 1
    assert 0 < num_refused < 300
