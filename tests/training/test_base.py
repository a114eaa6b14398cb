"""The first steps of the 14B recipes: small networks of the public kind, LoRA, two processes with FSDP2."""

from pathlib import Path
from typing import Any

import pytest
import torch

from avatar.checkpoints.lora import LoraAdapter, merge
from avatar.checkpoints.part import Part
from avatar.denoiser.model import load
from tests.training import two_processes
from tests.training.small import network_of, small_base
from training.data import StoredClip
from training.strategy import Strategy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="module")
def both(folder: Path, latents: Path) -> list[dict[str, Any]]:
    return two_processes.run_on_two(two_processes.start_base, "fsdp2", latents, folder)


@pytest.fixture(scope="module")
def alone(folder: Path, prepared: list[StoredClip]) -> dict[str, Any]:
    """Results of one process without the measures that save memory."""
    strategy = Strategy(precision=torch.float32)
    return two_processes.start_base(strategy, prepared, folder / "alone", saves_memory=False)


def test_two_processes_take_the_first_steps_of_one(both: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for stage in ("stage 1", "stage 2"):
        assert max(each.abs().max() for each in alone[stage]) > 1e-4
        for mine in both:
            for ours, theirs in zip(mine[stage], alone[stage], strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    assert both[0]["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_the_generator_takes_every_fifth_step(both: list[dict[str, Any]]) -> None:
    assert ["gradient" in metrics for metrics in both[0]["metrics"]] == [False] * 4 + [True]


def test_only_the_adapter_is_trained(both: list[dict[str, Any]]) -> None:
    before = network_of(small_base()).state_dict()
    after = both[0]["network"]
    frozen = {name.replace(".base_layer.", "."): each for name, each in after.items() if ".lora_" not in name}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(each, before[name]) for name, each in frozen.items())
    moved = [name for name, each in after.items() if ".lora_B." in name and each.any()]
    # Queries, keys, values and outputs of two attentions and two maps in each of two layers, and of one injector.
    assert len(moved) == 2 * (4 + 4 + 2) + 4
    for ours, theirs in zip(both[0]["teacher"], network_of(small_base()).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_serving_loads_the_export_merged_or_as_an_adapter(both: list[dict[str, Any]], folder: Path) -> None:
    network = load(Part.read(folder / "fsdp2" / "stage1"))
    assert network.config == small_base()
    state, name = both[0]["network"], "blocks.0.ffn.2"
    b, a = (state[f"{name}.lora_{side}.default.weight"] for side in "BA")
    expected = state[f"{name}.base_layer.weight"] + 0.5 * b @ a
    torch.testing.assert_close(network.get_parameter(f"{name}.weight"), expected.bfloat16().float())
    adapter = LoraAdapter(folder / "fsdp2" / "stage1" / "adapter.safetensors", alpha=2.0)
    base = network_of(small_base()).state_dict()
    adapter.check(base)
    pair = adapter.pairs()[f"{name}.weight"]
    merged = merge(base[f"{name}.weight"], pair, adapter.scale(f"{name}.weight", len(pair["A"])))
    assert torch.equal(merged.bfloat16().float(), network.get_parameter(f"{name}.weight"))
    assert load(Part.read(folder / "fsdp2" / "stage2")).config == network.config
