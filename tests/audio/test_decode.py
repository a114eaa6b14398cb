"""Tests of avatar.audio.decode: files as people have them."""

import io
import re
import resource
import time
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from avatar.audio import decode
from avatar.audio.decode import DecodedAudio, decode_audio
from tests.audio.recordings import KINDS, RATE_HZ, encode, voice

ID3 = b"ID3\x04\x00\x00\x00\x00\x08\x00" + bytes(1024)
APE = b"APETAGEX" + (2000).to_bytes(4, "little") + (100).to_bytes(4, "little") + bytes(16) + bytes(100)


def decoded(data: bytes) -> DecodedAudio:
    return decode_audio(io.BytesIO(data))


def seconds(audio: DecodedAudio) -> float:
    return float(audio.samples.shape[1] / audio.rate_hz)


def pcm_wave(pcm: NDArray[np.int16], rate_hz: int = RATE_HZ) -> bytes:
    """Return a WAV file of (a, s) 16-bit samples, without a layout of its channels."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(len(pcm))
        out.setsampwidth(2)
        out.setframerate(rate_hz)
        out.writeframes(pcm.T.tobytes())
    return file.getvalue()


def to_pcm(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    return np.round(samples * 32767).astype(np.int16)


def rms(samples: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(samples).mean()))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_read_without_a_word(files: dict[str, bytes], kind: str) -> None:
    audio = decoded(files[kind])
    assert audio.notes == []
    assert seconds(audio) == pytest.approx(1.0, abs=0.1)
    assert rms(audio.samples) == pytest.approx(rms(voice(1.0)), rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_joined_files_are_read_to_the_end_without_a_word(files: dict[str, bytes], kind: str) -> None:
    audio = decoded(files[kind] * 3)
    assert audio.notes == []
    assert seconds(audio) == pytest.approx(3.0, abs=0.3)
    assert rms(audio.samples[:, -audio.rate_hz // 2 :]) > 0.1


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF])
def test_wave_files_of_unknown_length_are_read_and_joined(files: dict[str, bytes], size: int) -> None:
    streamed = files["wav"].replace((2 * RATE_HZ).to_bytes(4, "little"), size.to_bytes(4, "little"))
    assert streamed != files["wav"]
    audio = decoded(streamed * 2)
    assert audio.notes == []
    np.testing.assert_array_equal(audio.samples, np.tile(decoded(files["wav"]).samples, 2))


def test_files_of_different_formats_are_joined_at_the_highest_rate() -> None:
    first, second = encode(voice(1.0), "mp3"), encode(voice(1.0, 2, 44100), "mp3", 44100)
    audio = decoded(first + second)
    assert (audio.rate_hz, len(audio.samples)) == (44100, 2)
    assert seconds(audio) == pytest.approx(2.0, abs=0.2)
    levels = [rms(part) for part in np.array_split(audio.samples, 4, axis=1)]
    np.testing.assert_allclose(levels, rms(voice(1.0)), rtol=0.15)


def test_sample_formats_of_joined_files_may_differ(files: dict[str, bytes]) -> None:
    audio = decoded(files["wav"] + encode(voice(1.0), "wav", codec="pcm_f32le"))
    assert audio.samples.shape == (1, 2 * RATE_HZ)
    np.testing.assert_allclose(audio.samples[:, RATE_HZ:], voice(1.0), atol=1e-6)
    np.testing.assert_allclose(audio.samples[:, :RATE_HZ], voice(1.0), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [("wav", 0.4), ("aiff", 0.4), ("flac", 0.4), ("mp3", 0.4), ("webm", 0.4), ("ogg", 0.0), ("aac", 0.0)],
)
def test_what_a_file_cut_short_has_is_kept_and_the_rest_is_named(
    files: dict[str, bytes], kind: str, missing: float
) -> None:
    """Ogg and AAC files do not say how long they are."""
    data = files[kind] if kind != "ogg" else encode(voice(3.0), "ogg")
    audio = decoded(data[: int(len(data) * 0.6)])
    [note] = audio.notes
    assert seconds(audio) > 0.4
    assert note.startswith(f"is cut short at {seconds(audio):.2f} s: at least ")
    assert float(note.split()[-4]) == pytest.approx(missing, abs=0.2)


@pytest.mark.parametrize("kind", ["flac", "mp3", "aac"])
def test_a_damaged_frame_costs_no_more_than_itself(files: dict[str, bytes], kind: str) -> None:
    data = bytearray(files[kind])
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(range(40))
    audio = decoded(bytes(data))
    [note] = audio.notes
    words = note.split()
    assert words[:3] == ["is", "damaged", "at"]
    assert float(words[3]) == pytest.approx(0.5, abs=0.3)  # FLAC's frames have 0.29 s
    assert 0.02 < float(words[-4]) < 0.3
    assert seconds(audio) == pytest.approx(seconds(decoded(files[kind])), abs=0.3)
    assert rms(audio.samples[:, -audio.rate_hz // 4 :]) > 0.1


def test_damage_in_a_flac_file_is_named_where_it_is(files: dict[str, bytes]) -> None:
    """Also where it hits the header of the next frame, so that FFmpeg's parser leaves several frames together."""
    data = bytearray(files["flac"])
    first = data.index(b"\xff\xf8")
    fourth = [each.start() for each in re.finditer(re.escape(bytes(data[first : first + 4])), data)][3]
    data[fourth - 50 : fourth + 10] = bytes(range(60))
    [note] = decoded(bytes(data)).notes
    assert note.startswith("is damaged at 0.14 s: at least 0.14 s")  # frames have 0.072 s


@pytest.mark.parametrize("filling", [b"\x00", b"\xff", b"hello"])
@pytest.mark.parametrize("length", [200, 1000])
def test_an_mp3_is_read_on_behind_damage(files: dict[str, bytes], filling: bytes, length: int) -> None:
    """Also close to its end, where too few frames follow for FFmpeg's parser."""
    data = bytearray(files["mp3"])
    at = len(data) // 2
    data[at : at + length] = (filling * length)[:length]
    audio = decoded(bytes(data))
    [note] = audio.notes
    assert note.startswith("is damaged at 0.")
    assert seconds(audio) == pytest.approx(1.0, abs=0.15)
    assert rms(audio.samples[:, -RATE_HZ // 8 :]) > 0.1


def test_damage_does_not_hide_what_is_joined_behind_it(files: dict[str, bytes]) -> None:
    broken = files["mp3"][:2000] + bytes(1000)
    audio = decoded(broken + files["flac"])
    assert audio.notes[0].startswith("is damaged at 0.")
    np.testing.assert_array_equal(audio.samples[:, -RATE_HZ:], decoded(files["flac"]).samples)


def test_a_hole_is_silent_so_that_what_follows_keeps_its_time(files: dict[str, bytes]) -> None:
    data = bytearray(files["aac"])
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(range(40))
    whole, damaged = (decoded(bytes(each)).samples for each in (files["aac"], data))
    assert whole.shape == damaged.shape
    np.testing.assert_allclose(whole[:, -4000:], damaged[:, -4000:], atol=1e-3)


@pytest.mark.parametrize("tags", [ID3, ID3 * 2, APE, ID3 + APE], ids=["ID3", "two", "APE", "both"])
@pytest.mark.parametrize("kind", ["wav", "mp3", "flac"])
def test_tags_in_front_of_a_file_are_skipped(files: dict[str, bytes], kind: str, tags: bytes) -> None:
    audio = decoded(tags + files[kind])
    assert audio.notes == []
    np.testing.assert_array_equal(audio.samples, decoded(files[kind]).samples)


def test_64_bit_integers_are_read() -> None:
    audio = decoded(encode(voice(0.2), "wav", codec="pcm_s64le"))
    np.testing.assert_allclose(audio.samples, voice(0.2), atol=1e-6)


def test_a_big_endian_wave_file_is_refused_and_not_read_as_noise(files: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match=r"is a big-endian WAV file \(RIFX\), which cannot be read; convert it"):
        decoded(b"RIFX" + files["wav"][4:])


def test_a_header_may_lead_to_an_offset_to_which_no_file_can_seek(files: dict[str, bytes], tmp_path: Path) -> None:
    """Chunks of CAF files have sizes of 64 bits. BytesIO seeks to any offset, a file does not."""
    path = tmp_path / "speech.caf"
    path.write_bytes(files["caf"] + b"junk" + (2**63 - 33_000).to_bytes(8, "big"))
    with path.open("rb") as file:
        assert seconds(decode_audio(file)) == 1.0


def test_text_in_a_tag_need_not_be_utf_8(files: dict[str, bytes]) -> None:
    title = b"LIST" + (18).to_bytes(4, "little") + b"INFOINAM" + (6).to_bytes(4, "little") + b"\xe4\xf6\xfc\xdf\xe9\x00"
    at = files["wav"].index(b"data")
    data = files["wav"][:at] + title + files["wav"][at:]
    np.testing.assert_array_equal(decoded(data).samples, decoded(files["wav"]).samples)


@pytest.mark.parametrize("channels", [3, 6, 7])
def test_more_than_two_channels_are_averaged(channels: int) -> None:
    one = voice(0.2)
    audio = decoded(pcm_wave(to_pcm(np.repeat(one, channels, axis=0))))
    assert audio.samples.shape == one.shape
    np.testing.assert_allclose(audio.samples, one, atol=1e-4)


def test_a_films_centre_channel_is_not_lost_among_silent_ones() -> None:
    surround = np.zeros((6, 3200), np.float32)
    surround[2] = voice(0.2)
    np.testing.assert_allclose(decoded(pcm_wave(to_pcm(surround))).samples, voice(0.2), atol=1e-4)


@pytest.mark.parametrize("gain", [1.0, 0.7])
def test_channels_that_cancel_each_other_give_the_louder_one(gain: float) -> None:
    one = voice(0.2)
    audio = decoded(pcm_wave(to_pcm(np.concatenate([-gain * one, one]))))
    assert audio.notes == ["has channels that cancel each other: the louder one is used"]
    assert len(audio.samples) == 1
    np.testing.assert_allclose(np.abs(audio.samples), np.abs(one), atol=1e-4)


def test_other_stereo_stays_stereo() -> None:
    """Also where one channel is silent (-6 dB), and where much of the mix is cancelled (-10 dB)."""
    one = voice(0.2)
    for other in (one, np.zeros_like(one), -0.4 * one):
        audio = decoded(pcm_wave(to_pcm(np.concatenate([one, other]))))
        assert audio.samples.shape == (2, 3200)
        assert audio.notes == []


@pytest.mark.parametrize("rate_hz", [88200, 96000, 192000])
def test_high_rates_are_resampled(rate_hz: int) -> None:
    audio = decoded(pcm_wave(to_pcm(voice(0.5, 2, rate_hz)), rate_hz))
    assert audio.rate_hz == 48000
    assert audio.samples.shape == (2, 24000)
    spectrum = np.abs(np.fft.rfft(audio.samples[0]))
    assert int(spectrum.argmax()) == 220  # 440 Hz


def test_a_rate_that_no_recorder_has_is_refused_at_once(files: dict[str, bytes]) -> None:
    at = files["wav"].index(b"fmt ") + 12
    data = files["wav"][:at] + (10**9).to_bytes(4, "little") + files["wav"][at + 4 :]
    with pytest.raises(ValueError, match="has 1000000000 Hz and 1 channels, expected 8000 to 768000 Hz"):
        decoded(data)


def test_a_number_of_channels_that_crashes_the_library_is_refused() -> None:
    """PyAV crashes on more than 8 planes; interleaved channels have one."""
    file = io.BytesIO()
    with av.open(file, "w", format="nut") as container:
        stream = container.add_stream("pcm_s16le_planar", rate=RATE_HZ, layout="hexadecagonal")
        packet = av.Packet(bytes(16 * 2 * 1000))
        packet.stream, packet.pts, packet.time_base = stream, 0, Fraction(1, RATE_HZ)
        container.mux(packet)
    with pytest.raises(ValueError, match=r"16000 Hz and 16 channels, expected .* 1 to 8 channels"):
        decoded(file.getvalue())
    assert len(decoded(pcm_wave(to_pcm(np.repeat(voice(0.2), 16, axis=0)))).samples) == 1


def test_a_file_longer_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    monkeypatch.setattr(decode, "MAX_NUMBERS", RATE_HZ // 2)
    with pytest.raises(ValueError, match=r"is longer than .* minutes, the most that is read"):
        decoded(files["wav"])


def test_numbers_that_are_not_finite_are_silent() -> None:
    samples = voice(0.2)
    samples[0, 100:103] = np.nan, np.inf, -np.inf
    audio = decoded(encode(samples, "wav", codec="pcm_f32le"))
    assert audio.samples[0, 100:103].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(audio.samples[0, 103:], samples[0, 103:])


@pytest.mark.parametrize(
    "playlist",
    [
        b"ffconcat version 1.0\nfile secret.wav\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\nsecret.aac\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_playlist_opens_no_other_file(
    playlist: bytes, files: dict[str, bytes], tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    for kind in ("wav", "aac"):
        with open(f"secret.{kind}", "wb") as file:  # noqa: PTH123
            file.write(files[kind])
    with pytest.raises(ValueError, match="is not an audio file, or is damaged"):
        decoded(playlist)


def test_an_mp4_without_its_index_says_why_it_cannot_be_read(files: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="an MP4 file that is cut short has lost its index"):
        decoded(files["m4a"][: len(files["m4a"]) // 2])


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["change", "delete", "repeat", "cut", "insert"]),
        st.floats(0, 1),
        st.integers(1, 400),
        st.binary(min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=6,
)


def mutated(data: bytes, mutations: list[tuple[str, float, int, bytes]]) -> bytes:
    """Return a file with bytes changed at places from its beginning (0) to its end (1)."""
    for kind, place, length, new in mutations:
        at = int(place**3 * len(data))  # headers are hit more often than samples
        if kind == "change":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "delete":
            data = data[:at] + data[at + length :]
        elif kind == "repeat":
            data = data[: at + length] + data[at:]
        elif kind == "cut":
            data = data[: max(at, 1)]
        else:
            data = data[:at] + new + data[at:]
    return data


def most_memory_kb() -> int:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture(scope="module")
def memory_kb() -> int:
    """The most memory before the test, in kB."""
    return most_memory_kb()


def decoded_or_refused(data: bytes) -> DecodedAudio | None:
    """Return a file's audio, or None if a ValueError of our own refused it; subclasses are a library's."""
    try:
        return decoded(data)
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        return None


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(kind=st.sampled_from([*KINDS]), mutations=MUTATIONS)
def test_mutated_files_give_audio_or_a_refusal_within_limits(
    files: dict[str, bytes], memory_kb: int, kind: str, mutations: list[tuple[str, float, int, bytes]]
) -> None:
    start_s = time.process_time()
    audio = decoded_or_refused(mutated(files[kind], mutations))
    if audio is not None:
        assert len(audio.samples) in (1, 2)
        assert audio.samples.dtype == np.float32
        assert np.isfinite(audio.samples).all()
        assert 8000 <= audio.rate_hz <= 48000
        assert audio.samples.size
    assert time.process_time() - start_s < 10
    assert most_memory_kb() - memory_kb < 1 << 20
