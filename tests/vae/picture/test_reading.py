"""Tests of avatar.vae.picture.reading: the process that decodes, its limits, and what is said of its death."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from PIL import Image

from avatar.vae.picture import reading
from avatar.vae.picture.decoder import decode
from avatar.vae.picture.reading import read_mask, read_picture, to_pixels
from avatar.vae.picture.rule import Fit, PictureRule
from tests.vae.face.scenes import scene
from tests.vae.picture.files import file, photo, pixels_of, progressive_jpeg, with_packed_text

COVER = PictureRule("cover", width=64, height=48)
FREE = PictureRule("reference", area=128 * 64)


def test_pixels_are_numbers_from_minus_one_to_one() -> None:
    rgb = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8)
    torch.testing.assert_close(to_pixels(rgb), torch.tensor([-1, -0.6, 1]).view(3, 1, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rule", "size", "fit"), [(COVER, None, None), (FREE, None, "cover"), (FREE, (64, 128), None)])
def test_a_process_gives_the_same_pixels(rule: PictureRule, size: tuple[int, int] | None, fit: Fit | None) -> None:
    data = file(photo(300, 200), "WEBP")
    found, expected = read_picture(data, rule, size, fit), decode(data, rule, size, fit)
    assert torch.equal(found.rgb, pixels_of(expected.image))
    assert found.size == expected.size == (300, 200)


def test_a_process_finds_the_same_faces_within_its_limits() -> None:
    data = file(scene((800, 450), (650, 200, 90), (200, 200, 70)), "WEBP")
    found, expected = read_picture(data, COVER, fit="face"), decode(data, COVER, fit="face")
    assert torch.equal(found.rgb, pixels_of(expected.image))
    assert (found.num_faces, found.face_share) == (2, expected.framing.face_share)
    assert found.notice == expected.framing.notice
    assert found.notice.startswith("2 faces were found")


def test_refusals_of_the_process_are_the_callers() -> None:
    with pytest.raises(ValueError, match="not a PNG, JPEG, WebP, HEIC or AVIF picture"):
        read_picture(b"{}\n" * 3, COVER)
    with pytest.raises(ValueError, match="size must be 64x48"):
        read_picture(file(photo(300, 200)), COVER, size=(128, 128))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(progressive_jpeg(8192, 8192, 2500), "8192x8192 are 67.1 megapixels, at most 50", id="pixels"),
        pytest.param(progressive_jpeg(4096, 4096, 10_000), "more than 100 scans", id="scans"),
    ],
)
def test_small_files_that_unpack_to_much_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_picture(data, COVER)


def test_a_text_that_unpacks_to_much_is_passed_over() -> None:
    found = read_picture(with_packed_text(1 << 28), COVER)
    assert torch.equal(found.rgb, pixels_of(photo(64, 48)))


PROGRAMS = {
    "crash": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "time limit": "import os, signal; os.kill(os.getpid(), signal.SIGXCPU)",
    "busy": "while True: pass",
    "asleep": "import time; time.sleep(60)",
}


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("crash", r"damaged in a way that ends its decoder \(SIGSEGV\)"),
        ("killed", "too much memory"),
        ("time limit", "too long to decode"),
        ("busy", "too long to decode"),
    ],
)
def test_a_picture_that_ends_its_decoder_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, program: str, words: str
) -> None:
    monkeypatch.setattr(reading, "PROGRAM", (sys.executable, "-c", PROGRAMS[program]))
    monkeypatch.setattr(reading, "TIME_S", 0.1)
    with pytest.raises(ValueError, match=words):
        read_picture(file(photo(64, 48)), COVER)


def test_a_decoder_that_does_not_get_to_run_is_the_machines_fault_and_not_the_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "PROGRAM", (sys.executable, "-c", PROGRAMS["asleep"]))
    monkeypatch.setattr(reading, "TIME_S", 0.1)
    monkeypatch.setattr(reading, "LONGEST_S", 0.3)
    with pytest.raises(TimeoutError, match="too busy to decode a picture; try again"):
        read_picture(file(photo(64, 48)), COVER)


def test_where_processor_time_is_unknown_no_picture_counts_as_slow() -> None:
    assert reading.processor_s(pid=1 << 30) == 0


def test_a_decoder_that_fails_by_itself_is_a_defect_and_not_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PROGRAM", (sys.executable, "-c", "import no_such_module"))
    with pytest.raises(RuntimeError, match="no_such_module"):
        read_picture(file(photo(64, 48)), COVER)


LIMITED = """
import os, resource, tempfile
from avatar.vae.picture import decoder
file = tempfile.TemporaryFile()
decoder.set_limits()
try:
    bytearray(decoder.MEMORY_BYTES)
except MemoryError:
    print("memory")
try:
    os.write(file.fileno(), b"1")
except OSError:
    print("files")
print("secrets" if "AVATAR_REDIS_URL" in os.environ else "no secrets")
print(resource.getrlimit(resource.RLIMIT_CPU)[1] == decoder.CPU_S, resource.getrlimit(resource.RLIMIT_CORE)[1] == 0)
"""


def test_a_decoder_has_limits_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATAR_REDIS_URL", "redis://user:password@redis")
    done = subprocess.run([sys.executable, "-c", LIMITED], env=reading.ENVIRONMENT, capture_output=True, check=False)
    assert done.stdout.decode().split("\n") == ["memory", "files", "no secrets", "True True", ""], done.stderr


def test_a_decoder_loads_no_tensor_library() -> None:
    program = "import avatar.vae.picture.decoder, sys; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], env=reading.ENVIRONMENT, capture_output=True, check=True)
    packages = {name.partition(".")[0] for name in output.stdout.decode().split()}
    assert "PIL" in packages
    assert packages & {"torch", "numpy", "grpc", "einops"} == set()


def test_a_mask_must_have_the_portraits_size_as_it_is_shown() -> None:
    portrait, mask = file(photo(128, 96)), photo(128, 96).convert("L")
    assert read_mask(file(mask), portrait, (64, 48), "cover", 16).shape == (3, 4)
    with pytest.raises(ValueError, match=r"portrait's size \(128, 96\), got \(96, 128\)"):
        read_mask(file(mask.transpose(Image.Transpose.ROTATE_90)), portrait, (64, 48), "cover", 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {"compress_level": 1}), ("WEBP", {"method": 0})],
    ids=["jpeg", "progressive", "png", "webp"],
)
def test_the_48_megapixels_of_a_phone_are_taken(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "TIME_S", 3.8)  # a busy or slow machine takes more than the second of an idle one
    size = (8064, 6048)
    found = read_picture(file(photo(64, 48).resize(size), kind, **options), COVER)
    assert found.size == size
    assert (found.rgb.float() - pixels_of(photo(64, 48)).float()).abs()[..., :2].mean() < 8
