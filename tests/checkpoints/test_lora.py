"""Tests of avatar.checkpoints.lora."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from avatar.checkpoints.lora import LoraAdapter
from avatar.checkpoints.part import Part

Q, FFN, OTHER = "blocks.0.self_attn.q.weight", "blocks.0.ffn.2.weight", "blocks.0.norm3.weight"


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {Q: (24, 16), FFN: (16, 40), OTHER: (16,)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def pairs(prefix: str = "", infix: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    out = {}
    for name in (Q, FFN):
        outputs, inputs = weights()[name].shape
        for side, shape in (("A", (8, inputs)), ("B", (outputs, 8))):
            key = f"{prefix}{name.removesuffix('.weight')}.lora_{side}{infix}.weight"
            out[key] = torch.randn(shape, generator=generator).bfloat16()
    return out


def adapted(folder: Path, adapter: dict[str, Tensor], alpha: float = 4.0) -> Part:
    save_file(weights(), folder / "model.safetensors")
    save_file(adapter, folder / "adapter.safetensors")
    return Part(folder, {}, (folder / "model.safetensors",), adapter=LoraAdapter(folder / "adapter.safetensors", alpha))


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("infix", ["", ".default"])
def test_four_spellings_of_keys_are_accepted(tmp_path: Path, prefix: str, infix: str) -> None:
    part = adapted(tmp_path, pairs(prefix, infix))
    part.meta_tensors()
    torch.testing.assert_close(dict(part.tensors()), dict(adapted(tmp_path, pairs()).tensors()), rtol=0, atol=0)


def test_a_merge_is_rounded_once(tmp_path: Path) -> None:
    merged = dict(adapted(tmp_path, pairs(), alpha=4.0).tensors())
    for name in (Q, FFN):
        a, b = (pairs()[f"{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
        exact = weights()[name].double() + 4 / 8 * (b.double() @ a.double())
        assert (merged[name].bfloat16() == exact.bfloat16()).double().mean() > 0.998
        rounded_twice = weights()[name] + 4 / 8 * (b @ a)
        assert (rounded_twice == exact.bfloat16()).double().mean() < 0.95  # so that this test can tell
    assert torch.equal(merged[OTHER], weights()[OTHER])
    assert merged[OTHER].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.0.self_attn.q.lora_A.weight": None}, f"{Q} of shape .* has .*'B'"),
        ({"blocks.0.self_attn.q.lora_B.weight": None}, f"{Q} of shape .* has .*'A'"),
        (dict.fromkeys((f"blocks.0.ffn.2.lora_{side}.weight" for side in "AB"), None), f"nothing for {FFN}"),
        ({"blocks.7.ffn.2.lora_A.weight": torch.zeros(8, 4)}, "a pair for blocks.7.ffn.2.weight, which it cannot"),
        ({"blocks.0.norm3.lora_A.weight": torch.zeros(8, 4)}, "a pair for blocks.0.norm3.weight, which it cannot"),
        ({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(8, 17)}, rf"{Q} of shape \(24, 16\) has"),
        ({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(7, 16)}, rf"{Q} of shape \(24, 16\) has"),
        (
            {"blocks.0.self_attn.q.lora_A.weight": torch.zeros(8, 16, dtype=torch.int8)},
            f"{Q} has A as int8, expected a floating-point dtype",
        ),
        (dict.fromkeys(pairs(), None), "nothing for .*; nothing for"),
    ],
)
def test_a_partly_matching_adapter_is_refused(tmp_path: Path, change: dict[str, Tensor | None], words: str) -> None:
    changed = {key: tensor for key, tensor in {**pairs(), **change}.items() if tensor is not None}
    part = adapted(tmp_path, changed)
    with pytest.raises(ValueError, match=rf"adapter\.safetensors does not match these weights: .*{words}"):
        part.meta_tensors()


@pytest.mark.parametrize("key", [Q, "blocks.0.self_attn.q.lora_C.weight", "blocks.0.self_attn.q.lora_A.bias"])
def test_keys_other_than_lora_matrices_are_refused(tmp_path: Path, key: str) -> None:
    part = adapted(tmp_path, {**pairs(), key: torch.zeros(24, 16)})
    with pytest.raises(ValueError, match=rf"adapter\.safetensors is no LoRA adapter: it holds {key}"):
        part.meta_tensors()


def test_a_matrix_in_two_spellings_is_refused(tmp_path: Path) -> None:
    part = adapted(tmp_path, {**pairs(), **pairs(infix=".default")})
    with pytest.raises(ValueError, match="is no LoRA adapter: it holds blocks"):
        part.meta_tensors()


def test_the_digest_depends_on_the_adapter(tmp_path: Path) -> None:
    part = adapted(tmp_path, pairs())
    assert part.adapter
    digests = {part.digest(), replace(part, adapter=None).digest()}
    digests.add(replace(part, adapter=replace(part.adapter, alpha=8.0)).digest())
    tensors = load_file(part.adapter.path)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, part.adapter.path)
    digests.add(part.digest())
    assert len(digests) == 4
