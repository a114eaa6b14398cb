"""Tests of avatar.render and of `python -m avatar`: every option with a tiny checkpoint."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from avatar import __main__ as command
from avatar.audio.model import AudioModel
from avatar.audio.wav2vec2 import Wav2Vec2
from avatar.audio.whole_file import file_blocks
from avatar.media import read_audio, read_video, write_mp4
from avatar.render import Models, RenderOptions, load, portrait_fit, render, render_film, with_clip_frames
from avatar.types import FrameChunk
from avatar.vae.marks.label import draw_label
from avatar.vae.out_of_distribution import GRID_CELLS, OutOfDistributionCheck
from avatar.vae.picture.rule import PictureRule
from avatar.vae.vae import Vae
from tests.audio.recordings import encode
from tests.conftest import ASSETS, RATE_HZ, speech, write_speech
from tests.readers import GENERATED, marks_of_film

SECONDS = 3.0  # seven blocks: past the sink's update at block 2 and once round the window


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> Models:
    """The tiny checkpoint with wav2vec2, which supports whole files, and with a free pose input."""
    torch.manual_seed(0)
    models = load(checkpoint)
    return replace(models, audio=AudioModel(Wav2Vec2.tiny()), config=replace(models.config, pose="zeros"))


def samples(seed: int, seconds: float = SECONDS) -> Tensor:
    return torch.frombuffer(bytearray(speech(seconds, seed)), dtype=torch.int16)[None] / 32768


def join(chunks: Iterator[FrameChunk]) -> Tensor:
    return torch.cat([chunk.frames for chunk in chunks]).int()


def rendered(models: Models, picture: bytes, options: RenderOptions, seed: int = 0) -> Tensor:
    return join(render(models, [samples(seed)], RATE_HZ, picture, options))


@pytest.fixture(scope="module")
def default(models: Models, picture: bytes) -> Tensor:
    """Frames of speech 0 with default options."""
    return rendered(models, picture, RenderOptions())


@pytest.fixture(scope="module")
def alone(models: Models, picture: bytes, default: Tensor) -> list[Tensor]:
    """Frames of speech 0 and of speech 1, each spoken by one actor."""
    return [default, rendered(models, picture, RenderOptions(), 1)]


def first_difference(one: Tensor, other: Tensor) -> int:
    """Return the first frame that differs."""
    return int((one != other).flatten(1).any(1).nonzero()[0])


def plain(shade: int, size: tuple[int, int] = (60, 80)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def poses(num_frames: int) -> Iterator[NDArray[np.uint8]]:
    generator = np.random.default_rng(0)
    return iter([generator.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(num_frames)])


@pytest.mark.parametrize("speaker", [0, 1])
def test_an_actors_speech_drives_the_white_part_of_its_mask(
    models: Models, picture: bytes, alone: list[Tensor], speaker: int
) -> None:
    masks = [plain(255 if actor == speaker else 0) for actor in (0, 1)]
    both = join(render(models, [samples(0), samples(1)], RATE_HZ, picture, RenderOptions(masks=masks)))
    assert (both - alone[speaker]).abs().max() <= 1
    assert (both - alone[1 - speaker]).abs().max() > 1


def test_an_actor_is_silent_after_its_speech(models: Models, picture: bytes) -> None:
    options = RenderOptions(masks=[plain(128), plain(128)])
    short, long = samples(0, seconds=1.0), samples(1)
    padded = torch.nn.functional.pad(short, (0, long.shape[1] - short.shape[1]))
    early, late = (join(render(models, [each, long], RATE_HZ, picture, options)) for each in (short, padded))
    assert torch.equal(early, late)


def test_several_actors_need_a_mask_each_of_the_portraits_size(models: Models, picture: bytes) -> None:
    for masks in (None, [plain(255)]):
        with pytest.raises(ValueError, match="several actors need a mask each"):
            next(render(models, [samples(0), samples(1)], RATE_HZ, picture, RenderOptions(masks=masks)))
    with pytest.raises(ValueError, match=r"portrait's size \(60, 80\), got \(64, 64\)"):
        next(render(models, [samples(0)], RATE_HZ, picture, RenderOptions(masks=[plain(255, (64, 64))])))


def test_a_pose_video_is_encoded_clip_by_clip(models: Models, picture: bytes, default: Tensor) -> None:
    longer, shorter = (rendered(models, picture, RenderOptions(pose=poses(frames))) for frames in (96, 48))
    assert first_difference(longer, default) == 0
    assert first_difference(longer, shorter) == 48 - 3


def test_a_pose_video_is_refused_if_the_pose_input_is_the_reference(models: Models, picture: bytes) -> None:
    taken = replace(models, config=replace(models.config, pose="reference"))
    with pytest.raises(ValueError, match="takes no pose video"):
        rendered(taken, picture, RenderOptions(pose=poses(48)))


def test_the_sink_is_updated_at_the_requested_block(models: Models, picture: bytes, default: Tensor) -> None:
    never, late = (rendered(models, picture, RenderOptions(sink_update_block=update)) for update in (0, 4))
    assert models.config.sink_update_block == 2
    assert first_difference(default, never) == 12 * 2 - 3
    assert first_difference(late, never) == 12 * 4 - 3


def test_clip_frames_set_window_and_sink_update(models: Models, picture: bytes) -> None:
    config = with_clip_frames(models.config, 36)
    assert (config.window_blocks, config.sink_update_block) == (3, 3)
    assert with_clip_frames(replace(models.config, sink_update_block=None), 36).sink_update_block is None
    clips = rendered(models, picture, RenderOptions(clip_frames=36, noise="clip"))
    as_config = rendered(replace(models, config=config), picture, RenderOptions(noise="clip"))
    assert torch.equal(clips, as_config)
    assert not torch.equal(clips, rendered(models, picture, RenderOptions(noise="clip")))


@pytest.mark.parametrize("frames", [12, 30, 0])
def test_a_clip_has_two_or_more_whole_blocks(models: Models, frames: int) -> None:
    with pytest.raises(ValueError, match="clip_frames must be a multiple of 12, at least 24"):
        with_clip_frames(models.config, frames)


def test_num_blocks_limits_the_clip(models: Models, picture: bytes, default: Tensor) -> None:
    assert torch.equal(rendered(models, picture, RenderOptions(num_blocks=2)), default[: 2 * 12 - 3])


def test_whole_file_features_are_the_references(models: Models, picture: bytes, default: Tensor) -> None:
    blocks = list(file_blocks(models.audio.encoder, samples(0), RATE_HZ, clip_frames=48))
    assert [block.index for block in blocks] == list(range(8))
    whole = rendered(models, picture, RenderOptions(audio="whole"))
    assert len(whole) == len(default) == 7 * 12 - 3
    assert not torch.equal(whole, default)


def test_a_whole_file_needs_wav2vec2(checkpoint: Path, picture: bytes) -> None:
    with pytest.raises(ValueError, match="need wav2vec2"):
        rendered(load(checkpoint), picture, RenderOptions(audio="whole"))


def test_right_context_changes_the_features(models: Models, picture: bytes, default: Tensor) -> None:
    same, more = (rendered(models, picture, RenderOptions(audio_right_frames=frames)) for frames in (4, 24))
    assert torch.equal(same, default)
    assert not torch.equal(more, default)


def test_offline_keeps_the_picture_as_sink_and_a_partial_clip_starts_a_whole_one(
    models: Models, picture: bytes
) -> None:
    options = RenderOptions(schedule="offline", clip_frames=24, num_blocks=3)
    chunks = list(render(models, [samples(0)], RATE_HZ, picture, options))
    assert [(chunk.block, chunk.first_frame, len(chunk.frames)) for chunk in chunks] == [(0, 3, 21), (2, 24, 12)]
    whole = rendered(models, picture, replace(options, num_blocks=4, sink_update_block=1))
    assert torch.equal(join(iter(chunks)), whole[: 21 + 12])


def test_a_size_is_exact_or_an_area(models: Models, picture: bytes) -> None:
    vae = replace(models.vae.config, picture=PictureRule("reference", area=128 * 128))
    free = replace(models, vae=type(models.vae)(models.vae.codec, vae))
    sizes = [
        next(render(free, [samples(0)], RATE_HZ, picture, RenderOptions(size=size))).frames.shape[1:3]
        for size in (None, (128, 64), 64 * 64)
    ]
    assert sizes == [(128, 64), (64, 128), (64, 64)]
    with pytest.raises(ValueError, match="area must be omitted"):
        rendered(models, picture, RenderOptions(size=64 * 64))


def test_half_precision_is_close(checkpoint: Path, picture: bytes) -> None:
    full, half = (
        rendered(load(checkpoint, dtype=dtype), picture, RenderOptions(num_blocks=2)).double()
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert not torch.equal(half, full)
    assert (half - full).square().mean().sqrt() / full.std() < 0.02


def test_a_film_is_rendered_from_files(models: Models, files: list[object]) -> None:
    speech, _, portrait, out, *_ = map(str, files)
    film = render_film(models, speech, portrait, out, RenderOptions(num_blocks=2))
    assert (film.num_frames, Path(out).stat().st_size > 0) == (2 * 12 - 3, True)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["avatar", *map(str, arguments)])
    command.main()


@pytest.fixture
def files(tmp_path: Path, picture: bytes, checkpoint: Path) -> list[object]:
    """Two speech files, a portrait, an output path, and the checkpoint."""
    (tmp_path / "face.png").write_bytes(picture)
    voices = [write_speech(tmp_path / f"{seed}.wav", 1.0, seed) for seed in (0, 1)]
    return [*voices, tmp_path / "face.png", tmp_path / "out.mp4", "--checkpoint", checkpoint]


def test_the_command_renders_two_actors(
    files: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = []
    for name in ("left", "right"):
        (tmp_path / f"{name}.png").write_bytes(plain(128))
        masks += ["--mask", tmp_path / f"{name}.png"]
    monkeypatch.chdir(tmp_path)
    files[3] = Path("new/take:1.mp4")
    chosen = ["--sink-distance", "4-6", "--sink-update-block", "never", "--noise", "clip", "--seed", "-1"]
    run(monkeypatch, *files, *masks, *chosen, "--num-clips", "1", "--clip-frames", "24", "--levels", "3")
    assert len(list(read_video(Path("new/take:1.mp4"), 25))) == 24 - 3
    made, wrote = capsys.readouterr().out.splitlines()
    assert made == "made the folder new"
    assert re.fullmatch(r"wrote new/take:1\.mp4: 0\.96 s, 21 frames of 64x64, [0-9.]+ kB", wrote)
    audio, rate_hz = read_audio(Path("new/take:1.mp4"))  # of 1 s of speech
    assert audio.shape[1] / rate_hz == pytest.approx(0.96, abs=0.03)


def test_the_command_says_that_it_runs_fewer_levels(
    files: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, *files[:1], *files[2:], "--levels", "2")
    assert capsys.readouterr().out.startswith("levels: 2 of the 3 trained: sigma 1, 0.5, 0\n")


def test_the_command_marks_its_film_and_shows_a_label_on_request(
    files: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def film(*flags: str) -> tuple[list[str | None], NDArray[np.uint8]]:
        run(monkeypatch, files[0], *files[2:], "--num-blocks", "1", *flags)
        out = tmp_path / "out.mp4"
        metadata, key_frames = marks_of_film(out)
        return [metadata, *key_frames], next(read_video(out, 25))

    marks, plain = film()
    assert set(marks) == {GENERATED}
    assert "machine-readable" not in capsys.readouterr().out
    marks, labelled = film("--label", "--no-marks")
    assert set(marks) == {None}
    assert "the film carries no machine-readable marks\n" in capsys.readouterr().out
    expected = plain[None].copy()
    draw_label(expected)
    assert np.abs(labelled.astype(int) - expected[0]).mean() < 3 < np.abs(labelled.astype(int) - plain).mean()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--levels", "4"], "the number of levels must be 1 to 3, got 4"),
        (["--prompt", "a person"], "has no text encoder"),
        (["--exact-size", "128x64"], "size must be 64x64"),
        (["--size", "720*400"], "area must be omitted"),
        (["--seed", "-2"], "seed must be"),
        (["--pose-video", "nowhere.mp4"], "no video file"),
        (["--right-context", "0.5"], "needs 4 frames after a block; no other number"),
        (["--clip-frames", "25"], "clip_frames must be a multiple"),
    ],
)
def test_the_command_names_unsupported_options(
    files: list[object], monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        run(monkeypatch, *files[:1], *files[2:], *flags)


def too_loud(path: Path) -> Path:
    """Write a WAV file of float32 samples with the range of 16-bit integers."""
    path.write_bytes(encode(np.full((1, 1600), 20000, np.float32), "wav", codec="pcm_f32le"))
    return path


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({2: "out.wav"}, r"out\.wav is not the name of a film"),
        ({0: "missing.wav"}, r"no audio file at .*missing\.wav"),
        ({0: "face.png"}, r"face\.png is not an audio file: it has no audio stream"),
        ({0: "loud.wav"}, r"loud\.wav: audio samples must be in \[-1, 1\], got 20000"),
        ({1: "0.wav"}, r"0\.wav: not a PNG"),
        ({2: "clip.mp4", 0: "clip.mp4"}, r"clip\.mp4 is one of the inputs"),
        ({2: "folder.mp4"}, r"folder\.mp4 is a folder"),
        ({1: "missing.png"}, r"no picture at .*missing\.png"),
        ({2: "0.wav/out.mp4"}, r"0\.wav is a file, expected a folder"),
    ],
)
def test_the_command_checks_its_files_before_it_loads_models(
    files: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[int, str],
    said: str,
) -> None:
    monkeypatch.setattr(command, "load", None)
    arguments = [files[0], *files[2:]]
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "clip.mp4").write_bytes(Path(str(files[0])).read_bytes())
    too_loud(tmp_path / "loud.wav")
    for position, name in changed.items():
        arguments[position] = tmp_path / name
    with pytest.raises(SystemExit, match=said):
        run(monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "cuda:99"], "argument --device: 'cuda:99' cannot be used on this machine, expected cpu"),
        (["--device", "klingon"], "argument --device: 'klingon' cannot be used"),
        (["--device", "meta"], "argument --device: 'meta' cannot be used"),
        (["--threads", "0"], "argument --threads: invalid positive value: '0'"),
        (["--prompt", "a person"], "has no text encoder"),
        (["--seed", "-2"], "seed must be"),
        (["--mask", "a.png", "--mask", "b.png"], "got 1 speech files and 2 masks"),
    ],
)
def test_the_command_checks_its_flags_before_it_reads_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path, flags: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "missing.wav", "missing.png", "out.mp4", "--checkpoint", checkpoint, *flags)
    assert said in f"{ended.value.code} {capsys.readouterr().err}"


def test_two_speeches_need_masks(files: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load", None)
    with pytest.raises(SystemExit, match="got 2 speech files and 0 masks"):
        run(monkeypatch, *files)


def test_frames_of_a_faster_video_are_skipped(tmp_path: Path) -> None:
    shades = np.arange(30, dtype=np.uint8)[:, None, None, None] * 8 * np.ones((1, 32, 32, 3), np.uint8)
    write_mp4(tmp_path / "fast.mp4", [shades], 50, 0, np.zeros((1, RATE_HZ), np.float32), RATE_HZ)
    seen = [frame.mean() for frame in read_video(tmp_path / "fast.mp4", 25)]
    np.testing.assert_allclose(seen, np.arange(0, 30, 2) * 8, atol=6)


def test_a_picture_without_a_face_is_logged_and_rendered(
    models: Models, picture: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    chunks = list(render(models, [samples(0)], RATE_HZ, picture, RenderOptions(num_blocks=1, fit="face")))
    assert [chunk.first_frame for chunk in chunks] == [3, 4, 8]
    (message,) = caplog.messages
    assert message.startswith("notice: No face was found in this picture")


def test_masks_need_a_fit_that_shows_all_actors(models: Models, picture: bytes) -> None:
    assert portrait_fit(None, "face", has_masks=False) == "face"
    assert portrait_fit(None, "face", has_masks=True) == portrait_fit("cover", "face", has_masks=True) == "cover"
    assert portrait_fit(None, "reference", has_masks=True) == "reference"
    with pytest.raises(ValueError, match="with masks, request `cover` or `reference`"):
        next(render(models, [samples(0)], RATE_HZ, picture, RenderOptions(masks=[plain(255)], fit="face")))


def test_an_out_of_distribution_picture_is_logged_and_rendered(
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    picture = (ASSETS / "portrait.png").read_bytes()
    codec, config = models.vae.codec, models.vae.config
    k = GRID_CELLS**2 + codec.channels
    nobody = OutOfDistributionCheck((0.0,) * k, (1.0,) * (k * (k + 1) // 2), 0.0, "unlike the training pictures")
    strict = replace(models, vae=Vae(codec, replace(config, familiar=nobody)))
    options = RenderOptions(num_blocks=1)
    plain = rendered(models, picture, options)
    assert not caplog.messages
    assert torch.equal(rendered(strict, picture, options), plain)
    assert caplog.messages == ["notice: unlike the training pictures"]
