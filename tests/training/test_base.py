"""The 14B recipes begin: small networks of the public kind, an adapter, two processes that share them by FSDP2."""

from pathlib import Path
from typing import Any

import pytest
import torch

from avatar.checkpoints.lora import LoraAdapter, merge
from avatar.checkpoints.part import Part
from avatar.denoiser.model import load
from tests.training import pair
from tests.training.small import network_of, small_base, write_latents
from training.data import read_clips
from training.strategy import Strategy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_latents(folder / "latents")
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    return pair.of_two(pair.begins_base, "fsdp2", folder)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    clips = read_clips(folder / "latents", "train")
    # And with all the memory that it likes.
    return pair.begins_base(Strategy(precision=torch.float32), clips, folder / "alone", is_thrifty=False)


def test_two_processes_take_the_first_steps_of_one(both: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for stage in ("stage 1", "stage 2"):
        assert max(each.abs().max() for each in alone[stage]) > 1e-4
        for mine in both:
            for ours, theirs in zip(mine[stage], alone[stage], strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    assert both[0]["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_the_generator_moves_in_every_fifth_step(both: list[dict[str, Any]]) -> None:
    assert ["gradient" in figures for figures in both[0]["figures"]] == [False] * 4 + [True]


def test_only_the_adapter_is_trained(both: list[dict[str, Any]]) -> None:
    before = network_of(small_base()).state_dict()
    after = both[0]["network"]
    kept = {name.replace(".base_layer.", "."): each for name, each in after.items() if ".lora_" not in name}
    assert kept.keys() == before.keys()
    assert all(torch.equal(each, before[name]) for name, each in kept.items())
    moved = [name for name, each in after.items() if ".lora_B." in name and each.any()]
    # Queries, keys, values and outputs of two attentions and two maps in each of two layers, and of one injector.
    assert len(moved) == 2 * (4 + 4 + 2) + 4
    for ours, theirs in zip(both[0]["teacher"], network_of(small_base()).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_exported_is_served(both: list[dict[str, Any]], folder: Path) -> None:
    network, config = load(Part.read(folder / "fsdp2" / "stage1"))
    assert config == small_base()
    state, name = both[0]["network"], "blocks.0.ffn.2"
    pair_of = [state[f"{name}.lora_{side}.default.weight"] for side in "BA"]
    expected = state[f"{name}.base_layer.weight"] + 0.5 * pair_of[0] @ pair_of[1]
    torch.testing.assert_close(network.get_parameter(f"{name}.weight"), expected.bfloat16().float())
    # And the base as it was, with the adapter beside it, is the same network.
    adapter = LoraAdapter(folder / "fsdp2" / "stage1" / "adapter.safetensors", alpha=2.0)
    base = network_of(small_base()).state_dict()
    adapter.check(base)
    merged = merge(base[f"{name}.weight"], adapter.pairs()[f"{name}.weight"], adapter.alpha)
    assert torch.equal(merged.bfloat16().float(), network.get_parameter(f"{name}.weight"))
    assert load(Part.read(folder / "fsdp2" / "stage2"))[1] == config
