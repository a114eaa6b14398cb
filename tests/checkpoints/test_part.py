"""Tests of avatar.checkpoints.part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from avatar.checkpoints import files, part
from avatar.checkpoints.files import WEIGHTS, save
from avatar.checkpoints.part import Part, load_weights
from tests.toy import Toy, assert_equal, part_in, write_shards


def test_weights_are_cast_to_the_modules_own_types(tmp_path: Path) -> None:
    save(tmp_path, {}, Toy(seed=1))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        loaded = Toy(seed=2).to(dtype)
        load_weights(loaded, part_in(tmp_path))
        assert_equal(loaded, Toy(seed=1).to(dtype))
        assert loaded.counts.dtype == torch.int64


def test_missing_unexpected_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in Toy(width=5).state_dict().items() if name != "counts"}
    save_file({**tensors, "extra": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="do not fit Toy") as caught:
        load_weights(Toy(width=4), part_in(tmp_path))
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


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_integers_in_place_of_weights_are_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = Toy().state_dict()
    save_file({**tensors, "inner.1.weight": tensors["inner.1.weight"].to(dtype)}, tmp_path / WEIGHTS)
    kind = str(dtype).removeprefix("torch.")
    for module in (Toy(), Toy().to("meta")):
        with pytest.raises(ValueError, match=f"fit Toy: inner.1.weight is {kind}, expected a floating-point dtype"):
            load_weights(module, part_in(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float, tmp_path: Path) -> None:
    """Also those that a cast makes infinite."""
    tensors = {name: tensor.double() for name, tensor in Toy().state_dict().items()}
    tensors["inner.1.weight"][1, 2] = value
    tensors["counts"] = Toy().counts
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(
        ValueError, match=f"{WEIGHTS}: inner.1.weight holds NaN or infinity in float32, expected finite"
    ):
        load_weights(Toy(), part_in(tmp_path))


def test_large_numbers_whose_sum_is_infinite_are_loaded(tmp_path: Path) -> None:
    tensors = {**Toy().state_dict(), "inner.1.weight": torch.full_like(Toy().state_dict()["inner.1.weight"], 3e38)}
    save_file(tensors, tmp_path / WEIGHTS)
    loaded = Toy()
    load_weights(loaded, part_in(tmp_path))
    assert loaded.state_dict()["inner.1.weight"].max() > 2e38


def test_a_module_is_allocated_once_it_fits(tmp_path: Path) -> None:
    save(tmp_path, {}, Toy(width=4, seed=1))
    with torch.device("meta"):
        huge, loaded = Toy(width=1 << 40), Toy(width=4)
    with pytest.raises(ValueError, match=r"inner\.0\.weight has shape"):
        load_weights(huge, part_in(tmp_path), "cpu")
    load_weights(loaded, part_in(tmp_path), "cpu")
    assert_equal(loaded, Toy(width=4, seed=1))


def test_a_long_list_of_problems_is_shortened(tmp_path: Path) -> None:
    save_file({f"extra{i}": torch.zeros(1) for i in range(20)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="and 19 more") as caught:
        load_weights(Toy(), part_in(tmp_path))
    assert len(str(caught.value)) < 500


def test_the_digest_depends_on_config_and_weights(tmp_path: Path) -> None:
    def digest_of(name: str, config: dict[str, Any], seed: int) -> str:
        save(tmp_path / name, config, Toy(seed))
        return Part.read(tmp_path / name).digest()

    first = digest_of("a", {"dim": 3}, 1)
    assert len(first) == 16
    assert set(first) <= set("0123456789abcdef")
    assert digest_of("b", {"dim": 3}, 1) == first
    assert digest_of("c", {"dim": 4}, 1) != first
    assert digest_of("d", {"dim": 3}, 2) != first


def test_the_digest_depends_on_every_shard(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    where = write_shards(tmp_path, Toy(seed=1))
    before = part_in(tmp_path).digest()
    for file in sorted(set(where.values())):
        tensors = dict(files.read_tensors(tmp_path / file))
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / file)
        after = part_in(tmp_path).digest()
        assert after != before
        before = after


def test_a_refused_part_leaves_the_module_unchanged(tmp_path: Path) -> None:
    tensors = Toy(seed=1).state_dict()
    del tensors["counts"]
    save_file(tensors, tmp_path / WEIGHTS)
    module = Toy(seed=2)
    with pytest.raises(ValueError, match="missing counts"):
        load_weights(module, part_in(tmp_path))
    assert_equal(module, Toy(seed=2))


def test_a_wrong_tensor_is_named_with_its_shard(tmp_path: Path) -> None:
    where = write_shards(tmp_path, Toy(width=5))
    with pytest.raises(ValueError, match="do not fit Toy") as caught:
        load_weights(Toy(width=4), part_in(tmp_path))
    assert f"{tmp_path / where['inner.0.weight']}" in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    where = write_shards(tmp_path, Toy())
    for file in set(where.values()):
        save_file({"counts": torch.zeros(3)}, tmp_path / file)
    with pytest.raises(ValueError, match="holds counts, which an earlier file holds too"):
        part_in(tmp_path).meta_tensors()


def test_a_module_on_the_meta_device_is_only_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {}, Toy())
    monkeypatch.setattr(Part, "tensors", None)
    load_weights(Toy().to("meta"), part_in(tmp_path))
    with pytest.raises(ValueError, match="expected"):
        load_weights(Toy(width=5).to("meta"), part_in(tmp_path))


def test_large_files_are_sampled_for_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("WHOLE", 1000), ("BEGINNING", 300), ("STEP", 500), ("SAMPLE", 10)):
        monkeypatch.setattr(part, f"{name}_BYTES", size)
    file = tmp_path / WEIGHTS
    data = bytes(range(256)) * 8

    def digest_with(place: int | None = None, size: int = len(data)) -> str:
        changed = bytearray(data[:size])
        if place is not None:
            changed[place] ^= 1
        file.write_bytes(changed)
        return part_in(tmp_path).digest()

    whole = digest_with()
    for place in (0, 299, 500, 509, 1500, len(data) - 1):
        assert digest_with(place) != whole
    assert digest_with(size=len(data) - 1) != whole
    assert digest_with(400) == whole  # between the samples
