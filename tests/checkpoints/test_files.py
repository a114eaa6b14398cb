"""Tests of avatar.checkpoints.files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar.checkpoints import files
from avatar.checkpoints.files import read_config, save
from avatar.checkpoints.part import load_weights
from tests.conftest import Exploit
from tests.toy import Toy, assert_equal, part_in, write_shards

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def test_saved_weights_load_exactly(tmp_path: Path) -> None:
    save(tmp_path / "new" / "part", {"dim": 3, "name": "ä"}, Toy(seed=1))
    loaded = Toy(seed=2)
    load_weights(loaded, part_in(tmp_path / "new" / "part"))
    assert_equal(loaded, Toy(seed=1))
    assert read_config(tmp_path / "new" / "part") == {"dim": 3, "name": "ä"}


def test_saving_in_half_precision_keeps_integers(tmp_path: Path) -> None:
    save(tmp_path, {}, Toy(seed=1), torch.float16)
    tensors = dict(files.read_tensors(tmp_path / WEIGHTS))
    assert {name: tensor.dtype for name, tensor in tensors.items() if name != "counts"} == {
        "inner.0.weight": torch.float16,
        "inner.0.bias": torch.float16,
        "inner.1.weight": torch.float16,
    }
    torch.testing.assert_close(tensors["counts"], Toy(seed=1).counts, rtol=0, atol=0)
    loaded = Toy(seed=2)
    load_weights(loaded, part_in(tmp_path))
    assert_equal(loaded, Toy(seed=1).half().float())


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    where = write_shards(tmp_path, Toy(seed=1))
    assert len(set(where.values())) == 2
    loaded = Toy(seed=2)
    load_weights(loaded, part_in(tmp_path))
    assert_equal(loaded, Toy(seed=1))


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    where = write_shards(tmp_path, Toy())
    missing = where["inner.1.weight"]
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"{INDEX} names files that are not there: {missing}"):
        load_weights(Toy(), part_in(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": ["a"]}'])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    write_shards(tmp_path, Toy())
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=INDEX):
        load_weights(Toy(), part_in(tmp_path))


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "older than torch 1.6"])
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_torch_files_are_read(tmp_path: Path, suffix: str, zipped: bool) -> None:
    tensors = Toy(seed=1).bfloat16().state_dict()
    path = tmp_path / f"part{suffix}"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    torch.testing.assert_close(dict(files.read_tensors(path)), dict(tensors), rtol=0, atol=0)


def test_torch_files_are_memory_mapped(tmp_path: Path) -> None:
    path = tmp_path / "part.pth"
    torch.save({"weight": torch.zeros(1000)}, path)
    data = path.read_bytes()
    (_, tensor) = next(files.read_tensors(path))
    with path.open("r+b") as file:
        file.seek(data.index(bytes(4000)))
        file.write(torch.ones(1000).numpy().tobytes())
    assert tensor.eq(1).all()


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_a_file_that_would_run_code_is_refused(tmp_path: Path, suffix: str, exploit: Exploit) -> None:
    """A file from torch.save; the fixture `pickled` is a bare pickle."""
    path = tmp_path / f"part{suffix}"
    torch.save({"weight": torch.zeros(1), "code": exploit}, path)
    for read in (files.read_tensors, files.read_meta_tensors):
        with pytest.raises(ValueError, match=f"{path.name} is not a file of tensors"):
            list(read(path))
    assert not exploit.path.exists()
    torch.load(path, weights_only=False)
    assert exploit.path.exists()  # unsafe loading does run it


@pytest.mark.parametrize("length", [7, 40, -1, -1000])
def test_a_truncated_torch_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "part.pth"
    torch.save(Toy().state_dict(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"part\.pth is not a file of tensors"):
        list(files.read_tensors(path))


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], torch.zeros(1), {"weight": 3}, {1: torch.zeros(1)}, {"model": {"w": torch.zeros(1)}}]
)
def test_a_torch_file_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth holds"):
        list(files.read_tensors(tmp_path / "part.pth"))


@pytest.mark.parametrize("length", [7, 40, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, length: int) -> None:
    save(tmp_path, {}, Toy())
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:length])
    words = "is not a safetensors file" if length == 7 else rf"is cut short: it has \d+ of {len(whole)} bytes"
    if length == 40:  # in the header, which alone tells how long the rest is
        words = r"is cut short: it has 40 of \d+ bytes; copy or download it again"
    with pytest.raises(ValueError, match=f"{WEIGHTS} {words}"):
        load_weights(Toy(), part_in(tmp_path))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 13400542\n"
FOREIGN = [
    (b"", "is empty; copy or download it again"),
    (LFS, "is a Git LFS pointer and not the file of 13400542 bytes that it stands for; run `git lfs pull`"),
    (b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><title>Sign in</title>", "is a web page: .* download the file itself"),
    (b"<html>", "is a web page"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "is an XML document, .*AccessDenied"),
    (b'{"error": "Repository not found"}', "is text, which servers send as an error .*Repository not found"),
    (b"Entry not found", "is text, which servers send as an error .*Entry not found"),
    (b"\x1f\x8b\x08\x00", "is a compressed archive: unpack it"),
    (b"GGUF\x03\x00\x00\x00", "is a GGUF file, which is not supported"),
]


@pytest.mark.parametrize("name", [WEIGHTS, "part.pth", "adapter.bin"])
@pytest.mark.parametrize(("data", "words"), FOREIGN)
def test_what_lies_in_the_place_of_weights_is_named(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    for read in (files.read_tensors, files.read_meta_tensors):
        with pytest.raises(ValueError, match=f"{path} {words}"):
            list(read(path))


def test_weights_under_the_name_of_another_format_are_named(tmp_path: Path) -> None:
    zipped, plain = tmp_path / WEIGHTS, tmp_path / "part.bin"
    torch.save({"weight": torch.zeros(2)}, zipped)
    save_file({"weight": torch.zeros(2)}, plain)
    with pytest.raises(ValueError, match=f"{zipped} is a zip archive: .* rename it so that it ends in .bin"):
        list(files.read_tensors(zipped))
    with pytest.raises(ValueError, match=f"{plain} is a safetensors file: rename it"):
        list(files.read_tensors(plain))


@pytest.mark.parametrize("name", [WEIGHTS, "part.pth"])
def test_a_folder_or_nothing_in_the_place_of_weights_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for read in (files.read_tensors, files.read_meta_tensors):
        with pytest.raises(ValueError, match=f"no file of weights at {path}"):
            list(read(path))
    path.mkdir()
    for read in (files.read_tensors, files.read_meta_tensors):
        with pytest.raises(ValueError, match=f"{path} is a folder, expected a file of weights"):
            list(read(path))


@pytest.mark.parametrize("data", [LFS, b"<!doctype html>"])
def test_a_config_that_was_not_fetched_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"config\.json is a (Git LFS pointer|web page)"):
        read_config(tmp_path)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WEIGHTS", "missing/model.safetensors")
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}/missing/model\.safetensors\.partial: "):
        save(tmp_path, {}, Toy())


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no checkpoint at {tmp_path}: expected a file {tmp_path / 'config.json'}"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=f"no weights in {tmp_path}: expected {WEIGHTS}"):
        load_weights(Toy(), part_in(tmp_path))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b'{"dim": 3', "is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1, 2]", "holds a list, expected an object"),
    ],
)
def test_a_damaged_config_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ValueError, match=f"{tmp_path / 'config.json'} {words}"):
        read_config(tmp_path)


@pytest.mark.parametrize("file", [WEIGHTS, "pytorch_model.bin", "model.pt", "model.ckpt"])
def test_nothing_is_unpickled(tmp_path: Path, pickled: tuple[bytes, Path], file: str) -> None:
    value, unpickled = pickled
    (tmp_path / file).write_bytes(value)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a file of tensors|model\.safetensors"):
        load_weights(Toy(), part_in(tmp_path))
    assert not unpickled.exists()


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"version": 1}, Toy(seed=1))

    def full_disk(_: dict[str, Tensor], path: Path, __: object) -> None:
        path.write_bytes(bytes(100))
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, {"version": 2}, Toy(seed=2))
    loaded = Toy()
    load_weights(loaded, part_in(tmp_path))
    assert_equal(loaded, Toy(seed=1))
    assert read_config(tmp_path) == {"version": 1}


def test_saving_leaves_nothing_but_the_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, {}, Toy(seed=1))
    save(tmp_path, {}, Toy(seed=2))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", WEIGHTS}
    loaded = Toy()
    load_weights(loaded, part_in(tmp_path))
    assert_equal(loaded, Toy(seed=2))


def test_other_users_can_read_a_saved_checkpoint(tmp_path: Path) -> None:
    files.save(tmp_path, {}, nn.Linear(2, 2))
    assert (tmp_path / files.WEIGHTS).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("file", [WEIGHTS, "part.pth"])
@pytest.mark.parametrize("dtype", [*files.SAFETENSORS_DTYPES.values()], ids=str)
def test_meta_tensors_have_shape_and_dtype(tmp_path: Path, file: str, dtype: torch.dtype) -> None:
    tensors = {"weight": torch.zeros(3, 4, dtype=dtype), "scalar": torch.zeros((), dtype=dtype)}
    (save_file if file == WEIGHTS else torch.save)(tensors, tmp_path / file)
    meta_tensors = dict(files.read_meta_tensors(tmp_path / file))
    assert {name: (each.shape, each.dtype, each.device.type) for name, each in meta_tensors.items()} == {
        name: (each.shape, each.dtype, "meta") for name, each in tensors.items()
    }


def test_meta_tensors_of_a_file_larger_than_the_memory(tmp_path: Path) -> None:
    """A sparse file of a terabyte."""
    num_bytes = 1 << 40
    header = json.dumps({"weight": {"dtype": "BF16", "shape": [num_bytes // 2], "data_offsets": [0, num_bytes]}})
    with (tmp_path / WEIGHTS).open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header.encode())
        out.truncate(8 + len(header) + num_bytes)
    assert dict(files.read_meta_tensors(tmp_path / WEIGHTS))["weight"].nbytes == num_bytes
