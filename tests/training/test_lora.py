import torch

from training.lora import LoraConfig, lora_state, merge_lora

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
