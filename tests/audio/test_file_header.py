"""Tests of avatar.audio.file_header: files of different formats that are joined."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from tests.audio.recordings import RATE_HZ, encode, voice
from tests.audio.test_decode import ID3, decoded, rms, seconds, to_pcm


@pytest.mark.parametrize("first", ["wav", "mp3", "flac", "aac", "ogg", "m4a"])
def test_files_of_any_kind_are_joined(files: dict[str, bytes], first: str) -> None:
    for second in ("wav", "mp3", "flac", "ogg", "webm"):
        audio = decoded(files[first] + files[second] + files["wav"])
        assert audio.notes == []
        assert seconds(audio) == pytest.approx(3.0, abs=0.2), second
        levels = [rms(part) for part in np.array_split(audio.samples, 6, axis=1)]
        np.testing.assert_allclose(levels, rms(voice(1.0)), rtol=0.2)


@pytest.mark.parametrize("tags", [b"", ID3], ids=["none", "ID3"])
@pytest.mark.parametrize("first", ["wav", "aiff", "ogg", "m4a"])
def test_frames_without_a_header_are_joined_to_a_file_that_declares_its_end(
    files: dict[str, bytes], first: str, tags: bytes
) -> None:
    audio = decoded(files[first] + tags + files["aac"])
    assert audio.notes == []
    assert seconds(audio) == pytest.approx(2.0, abs=0.15)


def test_files_in_an_ogg_chain_may_differ() -> None:
    first, second = encode(voice(1.0), "ogg"), encode(voice(1.0, 2), "ogg", codec="flac")
    audio = decoded(first + second + first)
    assert audio.notes == []
    assert len(audio.samples) == 2
    assert seconds(audio) == pytest.approx(3.0, abs=0.05)


def test_an_ogg_file_of_two_streams_is_one_file() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="ogg") as container:
        streams = [container.add_stream("flac", rate=RATE_HZ, layout="mono") for _ in range(2)]
        for stream in streams:
            for start in range(0, RATE_HZ, 4000):
                pcm = np.ascontiguousarray(to_pcm(voice(1.0))[:, start : start + 4000])
                frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
                frame.rate, frame.pts, frame.time_base = RATE_HZ, start, Fraction(1, RATE_HZ)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    audio = decoded(file.getvalue())
    assert audio.notes == []
    assert seconds(audio) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("first", [True, False])
def test_a_joined_file_that_cannot_be_read_is_named(files: dict[str, bytes], first: bool) -> None:
    broken = files["tta"][:14] + bytes(100)
    audio = decoded(broken + files["wav"] if first else files["wav"] + broken)
    [note] = audio.notes
    assert note.startswith(f"consists of joined files: the one at {0 if first else 1:.2f} s is not an audio file")
    np.testing.assert_array_equal(audio.samples, decoded(files["wav"]).samples)
