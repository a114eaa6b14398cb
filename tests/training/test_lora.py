from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avatar.checkpoints.lora import LoraAdapter
from avatar.checkpoints.part import Part
from avatar.denoiser.model import Network, load
from tests.training.small import network_of, small_base
from training.checkpointing import export
from training.lora import LoraConfig, lora_state, make_trainable, merge_lora
from training.strategy import SINGLE

LORA = LoraConfig(rank=2, alpha=1.0)


def state_with_lora() -> dict[str, torch.Tensor]:
    """Return the bfloat16 state of a linear map with LoRA and of one without."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "ffn.0.base_layer.weight": (4, 3),
        "ffn.0.base_layer.bias": (4,),
        "ffn.0.lora_A.default.weight": (2, 3),
        "ffn.0.lora_B.default.weight": (4, 2),
        "head.weight": (3, 4),
    }
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def test_an_adapter_is_merged_with_one_rounding() -> None:
    state = state_with_lora()
    plain = merge_lora(state, LORA)
    assert plain.keys() == {"ffn.0.weight", "ffn.0.bias", "head.weight"}
    b, a = (state[f"ffn.0.lora_{side}.default.weight"].double() for side in "BA")
    exact = state["ffn.0.base_layer.weight"].double() + 0.5 * b @ a
    assert torch.equal(plain["ffn.0.weight"], exact.float().bfloat16())
    assert torch.equal(plain["head.weight"], state["head.weight"])


def test_an_adapter_is_written_in_the_public_spelling() -> None:
    adapter = lora_state(state_with_lora())
    assert adapter.keys() == {f"base_model.model.ffn.0.lora_{side}.default.weight" for side in "AB"}
    assert all(matrix.dtype == torch.float32 for matrix in adapter.values())


def trained(folder: Path, start: Path | None) -> None:
    """Export a network with an adapter that was trained from a folder, or from the public weights."""
    network: Network = load(Part.read(start)) if start else network_of(small_base())
    adapted = make_trainable(network, LORA, 0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
    export(adapted, small_base(), LORA, folder, SINGLE, start)


def test_an_adapter_fits_only_the_weights_that_it_was_trained_on(tmp_path: Path) -> None:
    public, first, second = (tmp_path / name for name in ("public", "first", "second"))
    export(network_of(small_base()), small_base(), None, public, SINGLE)
    trained(first, public)
    trained(second, first)

    def part(weights: Path, adapter: Path) -> Part:
        return replace(Part.read(weights), adapter=LoraAdapter(adapter / "adapter.safetensors", LORA.alpha))

    part(public, first).meta_tensors()
    part(first, second).meta_tensors()
    with pytest.raises(
        ValueError, match=r"was trained on weights merged with adapter .*; those in .* merged with none"
    ):
        part(public, second).meta_tensors()
    with pytest.raises(ValueError, match=r"are merged with adapter .* already, cannot add"):
        part(first, first).meta_tensors()
    with pytest.raises(ValueError, match="was trained on weights merged with adapter"):
        part(second, second).meta_tensors()
