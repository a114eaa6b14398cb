"""Tests of avatar.checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar import checkpoint
from avatar.checkpoint import digest, load_weights, read_config, save
from tests.conftest import Exploit

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Part(nn.Module):
    """A little of everything: nested parameters, and a buffer of whole numbers."""

    counts: Tensor

    def __init__(self, seed: int = 0, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2, bias=False))
        self.register_buffer("counts", torch.randint(-(2**40), 2**40, (3,)))


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def write_shards(folder: Path, part: Part) -> dict[str, str]:
    """The weights in two files with an index; which file each tensor is in."""
    where: dict[str, str] = {}
    names = sorted(part.state_dict())
    for number, shard in enumerate((names[:1], names[1:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: part.state_dict()[name].contiguous() for name in shard}, folder / file)
        where.update(dict.fromkeys(shard, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def test_what_was_saved_is_loaded_exactly(tmp_path: Path) -> None:
    save(tmp_path / "new" / "part", {"dim": 3, "name": "ä"}, Part(seed=1))
    loaded = Part(seed=2)
    load_weights(loaded, tmp_path / "new" / "part")
    assert_equal(loaded, Part(seed=1))
    assert read_config(tmp_path / "new" / "part") == {"dim": 3, "name": "ä"}


def test_weights_are_cast_to_the_modules_own_types(tmp_path: Path) -> None:
    save(tmp_path, {}, Part(seed=1))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        loaded = Part(seed=2).to(dtype)
        load_weights(loaded, tmp_path)
        assert_equal(loaded, Part(seed=1).to(dtype))
        assert loaded.counts.dtype == torch.int64


def test_saving_as_half_precision_leaves_whole_numbers_alone(tmp_path: Path) -> None:
    save(tmp_path, {}, Part(seed=1), torch.float16)
    tensors = dict(checkpoint.read_tensors(tmp_path / WEIGHTS))
    assert {name: tensor.dtype for name, tensor in tensors.items() if name != "counts"} == {
        "inner.0.weight": torch.float16,
        "inner.0.bias": torch.float16,
        "inner.1.weight": torch.float16,
    }
    torch.testing.assert_close(tensors["counts"], Part(seed=1).counts, rtol=0, atol=0)
    loaded = Part(seed=2)
    load_weights(loaded, tmp_path)
    assert_equal(loaded, Part(seed=1).half().float())


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    where = write_shards(tmp_path, Part(seed=1))
    assert len(set(where.values())) == 2
    loaded = Part(seed=2)
    load_weights(loaded, tmp_path)
    assert_equal(loaded, Part(seed=1))


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    where = write_shards(tmp_path, Part())
    missing = where["inner.1.weight"]
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"{INDEX} names files that are not there: {missing}"):
        load_weights(Part(), tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": ["a"]}'])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    write_shards(tmp_path, Part())
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=INDEX):
        load_weights(Part(), tmp_path)


def test_missing_surplus_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in Part(width=5).state_dict().items() if name != "counts"}
    save_file({**tensors, "extra": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="do not fit Part") as caught:
        load_weights(Part(width=4), tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    for problem in (
        "missing counts",
        "unexpected extra",
        "inner.0.weight has shape (5, 3), expected (4, 3)",
        "inner.0.bias has shape (5,), expected (4,)",
        "inner.1.weight has shape (2, 5), expected (2, 4)",
    ):
        assert problem in message


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    save_file({f"extra{i}": torch.zeros(1) for i in range(20)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="and 19 more") as caught:
        load_weights(Part(), tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "older than torch 1.6"])
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_what_torch_saved_is_read(tmp_path: Path, suffix: str, zipped: bool) -> None:
    tensors = Part(seed=1).bfloat16().state_dict()
    path = tmp_path / f"part{suffix}"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    torch.testing.assert_close(dict(checkpoint.read_tensors(path)), dict(tensors), rtol=0, atol=0)


def test_what_torch_saved_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "part.pth"
    torch.save({"weight": torch.zeros(1000)}, path)
    data = path.read_bytes()
    (_, tensor) = next(checkpoint.read_tensors(path))
    with path.open("r+b") as file:
        file.seek(data.index(bytes(4000)))
        file.write(torch.ones(1000).numpy().tobytes())
    assert tensor.eq(1).all()


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_a_file_that_would_run_code_is_refused(tmp_path: Path, suffix: str, exploit: Exploit) -> None:
    """As torch.save writes it, where `pickled` is a bare pickle."""
    path = tmp_path / f"part{suffix}"
    torch.save({"weight": torch.zeros(1), "code": exploit}, path)
    with pytest.raises(ValueError, match=f"{path.name} is not a file of tensors"):
        list(checkpoint.read_tensors(path))
    assert not exploit.path.exists()
    torch.load(path, weights_only=False)
    assert exploit.path.exists()  # it would have


@pytest.mark.parametrize("length", [0, 7, 40, -1, -1000])
def test_a_torch_file_cut_short_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "part.pth"
    torch.save(Part().state_dict(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"part\.pth is not a file of tensors"):
        list(checkpoint.read_tensors(path))


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], torch.zeros(1), {"weight": 3}, {1: torch.zeros(1)}, {"model": {"w": torch.zeros(1)}}]
)
def test_a_torch_file_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth holds"):
        list(checkpoint.read_tensors(tmp_path / "part.pth"))


@pytest.mark.parametrize("length", [0, 7, 40, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, length: int) -> None:
    save(tmp_path, {}, Part())
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:length])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not a safetensors file, or is cut short"):
        load_weights(Part(), tmp_path)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no checkpoint at {tmp_path}: expected a file {tmp_path / 'config.json'}"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=f"no weights in {tmp_path}: expected {WEIGHTS}"):
        load_weights(Part(), tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not JSON"),
        (b'{"dim": 3', "is not JSON"),
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
    with pytest.raises(ValueError, match=WEIGHTS):
        load_weights(Part(), tmp_path)
    assert not unpickled.exists()


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"version": 1}, Part(seed=1))

    def full_disk(_: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(bytes(100))
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, {"version": 2}, Part(seed=2))
    loaded = Part()
    load_weights(loaded, tmp_path)
    assert_equal(loaded, Part(seed=1))
    assert read_config(tmp_path) == {"version": 1}


def test_saving_leaves_nothing_but_the_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, {}, Part(seed=1))
    save(tmp_path, {}, Part(seed=2))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", WEIGHTS}
    loaded = Part()
    load_weights(loaded, tmp_path)
    assert_equal(loaded, Part(seed=2))


def test_a_digest_stands_for_config_and_weights(tmp_path: Path) -> None:
    def digest_of(name: str, config: dict[str, Any], seed: int) -> str:
        save(tmp_path / name, config, Part(seed))
        return digest(tmp_path / name)

    first = digest_of("a", {"dim": 3}, 1)
    assert len(first) == 16
    assert set(first) <= set("0123456789abcdef")
    assert digest_of("b", {"dim": 3}, 1) == first
    assert digest_of("c", {"dim": 4}, 1) != first
    assert digest_of("d", {"dim": 3}, 2) != first


def test_every_shard_counts_in_the_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    where = write_shards(tmp_path, Part(seed=1))
    before = digest(tmp_path)
    for file in sorted(set(where.values())):
        tensors = dict(checkpoint.read_tensors(tmp_path / file))
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / file)
        after = digest(tmp_path)
        assert after != before
        before = after


def test_a_saved_checkpoint_can_be_read_by_others(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {}, nn.Linear(2, 2))
    assert (tmp_path / checkpoint.WEIGHTS).stat().st_mode & 0o777 == 0o644
