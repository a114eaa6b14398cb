import torch

from training.lora import AdapterRule, adapter_of, merged

RULE = AdapterRule(rank=2, alpha=1.0)


def adapted_state() -> dict[str, torch.Tensor]:
    """The state of a map with an adapter, and of one without, in bfloat16."""
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
    state = adapted_state()
    plain = merged(state, RULE)
    assert plain.keys() == {"ffn.0.weight", "ffn.0.bias", "head.weight"}
    b, a = (state[f"ffn.0.lora_{side}.default.weight"].double() for side in "BA")
    exact = state["ffn.0.base_layer.weight"].double() + 0.5 * b @ a
    assert torch.equal(plain["ffn.0.weight"], exact.float().bfloat16())
    assert torch.equal(plain["head.weight"], state["head.weight"])


def test_an_adapter_is_written_in_the_public_spelling() -> None:
    adapter = adapter_of(adapted_state())
    assert adapter.keys() == {f"base_model.model.ffn.0.lora_{side}.default.weight" for side in "AB"}
    assert all(matrix.dtype == torch.float32 for matrix in adapter.values())
