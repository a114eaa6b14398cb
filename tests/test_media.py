import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from avatar.media import Film, film_signer, read_audio, read_video, write_mp4
from tests.readers import GENERATED, marks_of_film

RNG = np.random.default_rng(0)


def write_wav(path: Path, pcm: NDArray[np.integer], rate_hz: int = 16000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(pcm.shape[0])
        file.setsampwidth(pcm.itemsize)
        file.setframerate(rate_hz)
        file.writeframes(pcm.T.tobytes())
    return path


def frames_of(size: int, num_frames: int, flash: int | None = None) -> NDArray[np.uint8]:
    frames = np.full((num_frames, size, size, 3), (200, 60, 30), np.uint8)
    if flash is not None:
        frames[flash] = 255
    return frames


def pictures(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(container.streams.video[0]))


def audio_of(path: Path) -> tuple[float, NDArray[np.float32], int]:
    """Return the start of the audio in seconds, its first channel, and its rate."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        frames = list(container.decode(stream))
        assert frames[0].time is not None
        return frames[0].time, np.concatenate([frame.to_ndarray() for frame in frames], axis=1)[0], stream.rate


@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("rate_hz", [8000, 44100])
def test_16_bit_samples_are_read_exactly(num_channels: int, rate_hz: int, tmp_path: Path) -> None:
    pcm = RNG.integers(-32768, 32768, (num_channels, 5001)).astype(np.int16)
    pcm[:, :2] = [-32768, 32767]
    samples, read_hz = read_audio(write_wav(tmp_path / "a.wav", pcm, rate_hz))
    assert samples.dtype == np.float32
    assert read_hz == rate_hz
    np.testing.assert_array_equal(samples, pcm.astype(np.float32) / 32768)


def test_other_formats_are_scaled_by_their_full_range(tmp_path: Path) -> None:
    pcm = np.array([[-(2**31), 0, 2**30]], np.int32)
    np.testing.assert_allclose(read_audio(write_wav(tmp_path / "a.wav", pcm))[0], [[-1, 0, 0.5]])
    low = np.array([[0, 128, 192]], np.uint8)
    np.testing.assert_allclose(read_audio(write_wav(tmp_path / "b.wav", low))[0], [[-1, 0, 0.5]])


def test_audio_is_read_from_a_video(tmp_path: Path) -> None:
    tone = np.sin(np.arange(16000) * 0.2, dtype=np.float32)[None] / 2
    write_mp4(tmp_path / "a.mp4", [frames_of(64, 22)], 25, 3, tone, 16000)
    samples, rate_hz = read_audio(tmp_path / "a.mp4")
    assert rate_hz == 48000
    assert 0.3 < samples[0, 12000:36000].std() < 0.4


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.wav", b"RIFF but not really a wav", "not an audio file"),
        ("a.txt", b"hello " * 100, "not an audio file"),
        ("a.wav", b"", "is empty"),
        ("b.wav", None, "no audio file at"),
    ],
)
def test_invalid_audio_files_are_refused(name: str, data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_audio(tmp_path / name)


def test_a_picture_has_no_audio() -> None:
    with pytest.raises(ValueError, match="has no audio stream"):
        read_audio(Path(__file__).parents[1] / "assets" / "portrait.png")


@pytest.mark.parametrize(
    ("shape", "rate_hz", "message"),
    [((1, 0), 16000, "a.wav is empty"), ((1, 99), 3000, "a.wav has 3000 Hz and 1 channels, expected 8000 to")],
)
def test_unsupported_audio_is_refused(shape: tuple[int, int], rate_hz: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_audio(write_wav(tmp_path / "a.wav", np.zeros(shape, np.int16), rate_hz))


def test_what_is_missing_is_logged_with_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_wav(tmp_path / "a.wav", np.ones((1, 16000), np.int16))
    path.write_bytes(path.read_bytes()[: 44 + 2 * 12000])
    samples, _ = read_audio(path)
    assert samples.shape == (1, 12000)
    assert caplog.messages == [f"{path} is cut short at 0.75 s: at least 0.25 s are missing"]


NAMES = ["take:1.mp4", "concat:a|b.mp4", "pipe:1.mov", "-x.m4v", "file:ünicode 数.MP4", "http://x.mp4", "%d.mp4"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_a_file_to_write_and_to_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)  # of http://, a folder `http:`
    path.parent.mkdir(exist_ok=True)
    film = write_mp4(path, [frames_of(64, 12)], 25, 3, np.zeros((1, 9600), np.float32), 16000)
    assert film == Film(num_frames=12, width=64, height=64, duration_s=0.6)
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [tmp_path / path]
    assert len(list(read_video(path, 25))) == 12
    samples, rate_hz = read_audio(path)
    assert samples.shape[1] / rate_hz == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("name", ["a.wav", "a.mkv", "a", ".mp4", "mp4"])
def test_a_name_that_is_no_films_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not the name of a film: expected one that ends in \.mp4, \.m4v, \.mov"):
        write_mp4(tmp_path / name, [frames_of(64, 2)], 25, 0, np.zeros((1, 99), np.float32), 16000)


def test_a_film_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*missing/a\.mp4: No such file or directory"):
        write_mp4(tmp_path / "missing" / "a.mp4", [frames_of(64, 2)], 25, 0, np.zeros((1, 99), np.float32), 16000)


def test_audio_ends_with_the_last_frame(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", [frames_of(64, 9), frames_of(64, 12)], 25, 3, np.ones((1, 64000), np.float32), 16000)
    samples, rate_hz = read_audio(tmp_path / "a.mp4")
    assert samples.shape[1] / rate_hz == pytest.approx(24 / 25, abs=0.03)


@pytest.mark.parametrize("rate_hz", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("first_frame", [0, 3])
def test_audio_and_video_are_in_sync(rate_hz: int, first_frame: int, tmp_path: Path) -> None:
    """A click in the audio and a flash in the video, both at 2 s, stay together."""
    samples = np.zeros((1, rate_hz * 4), np.float32)
    samples[0, rate_hz * 2 : rate_hz * 2 + rate_hz // 100] = 0.9
    frames = frames_of(64, 100 - first_frame, flash=50 - first_frame)
    path = tmp_path / "a.mp4"
    write_mp4(path, np.array_split(frames, 8), 25, first_frame, samples, rate_hz)

    shown = pictures(path)
    times = [frame.time for frame in shown]
    np.testing.assert_allclose(times, np.arange(first_frame, 100) / 25, atol=1e-6)
    brightness = [frame.to_ndarray(format="gray").mean() for frame in shown]
    flash_s = times[int(np.argmax(brightness))]
    start_s, audio, audio_hz = audio_of(path)
    click_s = start_s + float(np.abs(audio).argmax()) / audio_hz
    assert start_s == 0
    assert flash_s == 2.0
    assert abs(click_s - flash_s) < 0.02
    with av.open(str(path)) as container:
        picture = container.streams.video[0]
        assert (picture.codec_context.name, container.streams.audio[0].codec_context.name) == ("h264", "aac")
        assert picture.average_rate == 25
        assert picture.frames == 100 - first_frame
        assert container.duration is not None
        assert abs(container.duration / av.time_base - 4) < 0.03


def test_a_late_video_track_has_an_empty_edit(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", [frames_of(64, 22)], 25, 3, np.zeros((1, 16000), np.float32), 16000)
    data = (tmp_path / "a.mp4").read_bytes()
    # The picture's edit list: duration and media time of each edit; -1 stands for nothing to show.
    at = data.index(b"elst") + 8
    count = int.from_bytes(data[at : at + 4])
    duration = int.from_bytes(data[at + 4 : at + 8])
    media_time = int.from_bytes(data[at + 8 : at + 12], signed=True)
    scale = int.from_bytes(data[data.index(b"mvhd") + 16 :][:4])
    assert count == 2
    assert media_time == -1
    assert duration / scale == 0.12


def test_colours_survive(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", [frames_of(64, 5)], 25, 3, np.zeros((2, 3200), np.float32), 16000)
    np.testing.assert_allclose(
        pictures(tmp_path / "a.mp4")[2].to_ndarray(format="rgb24")[32, 32], (200, 60, 30), atol=3
    )


@pytest.mark.parametrize("name", ["a.mp4", "a.m4v", "a.mov"])
def test_a_film_says_that_a_machine_made_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_mp4(path, [frames_of(64, 300)], 25, 3, np.zeros((1, 3200), np.float32), 16000)
    assert marks_of_film(path) == (GENERATED, [GENERATED] * 2)
    with av.open(str(path)) as container:
        assert container.metadata["comment"] == f"made by a machine: {GENERATED}"


def test_the_film_in_the_documentation_is_marked() -> None:
    metadata, key_frames = marks_of_film(Path(__file__).parents[1] / "docs" / "demo.mp4")
    assert {metadata, *key_frames} == {GENERATED}


def test_marks_of_a_film_can_be_left_out_and_change_no_pixel(tmp_path: Path) -> None:
    marked, plain = tmp_path / "marked.mp4", tmp_path / "plain.mp4"
    frames = RNG.integers(0, 255, (30, 64, 64, 3), np.uint8)
    for path in (marked, plain):
        write_mp4(path, [frames], 25, 3, np.zeros((1, 3200), np.float32), 16000, is_marked=path == marked)
    assert marks_of_film(plain) == (None, [None])
    with av.open(str(plain)) as container:
        assert "comment" not in container.metadata
    shown = [[frame.to_ndarray(format="rgb24").tobytes() for frame in pictures(path)] for path in (marked, plain)]
    assert shown[0] == shown[1]


def test_films_are_signed_only_with_the_package_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """tests/vae/marks/test_tools.py signs them."""
    monkeypatch.setitem(sys.modules, "c2pa", None)
    monkeypatch.delitem(sys.modules, "avatar.vae.marks.credentials", raising=False)
    assert film_signer(None) is None
    with pytest.raises(ValueError, match="install it: pip install c2pa-python"):
        film_signer([tmp_path / "films.crt", tmp_path / "films.key"])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"the old one")

    def failing() -> Iterator[NDArray[np.uint8]]:
        yield frames_of(64, 12)
        raise RuntimeError("the renderer died")

    with pytest.raises(RuntimeError, match="renderer died"):
        write_mp4(path, failing(), 25, 3, np.zeros((1, 3200), np.float32), 16000)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("frames", "num_samples", "message"),
    [
        ([], 100, "no frames"),
        ([frames_of(64, 2)], 0, "no samples"),
        ([frames_of(63, 2)], 100, "even sides, got 63 x 63"),
    ],
)
def test_a_video_without_frames_or_audio_is_refused(
    frames: list[NDArray[np.uint8]], num_samples: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_mp4(tmp_path / "a.mp4", frames, 25, 3, np.zeros((1, num_samples), np.float32), 16000)
    assert not list(tmp_path.iterdir())


def test_media_needs_no_torch() -> None:
    code = "import avatar.media, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
