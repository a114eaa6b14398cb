"""Tests of LoRA adapters in the folders that PEFT saves. Names and fields are those that PEFT 0.21 writes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar.checkpoints.inspect import main
from avatar.checkpoints.lora import LoraAdapter
from avatar.checkpoints.part import Part

FIELDS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "auto_mapping": {"base_model_class": "Toy", "parent_library": "toys"},
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.1,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q", "head"],
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


class Toy(nn.Module):
    """Two layers with two matrices each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.ModuleDict({"q": nn.Linear(6, 10), "k": nn.Linear(6, 8)}) for _ in range(2)]
        self.blocks = nn.ModuleList(layers)
        self.head = nn.Linear(10, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        """Never called; PEFT asks for it."""
        return x


def write_weights(folder: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in Toy().state_dict().items()}, folder / "model.safetensors")


def write_adapter(folder: Path, ranks: dict[str, int], **changes: object) -> Path:
    """Write a folder as PEFT does, with random matrices of these ranks by module."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for module, rank in ranks.items():
        outputs, inputs = Toy().get_parameter(f"{module}.weight").shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**FIELDS, **changes}))
    return folder


RANKS = {"blocks.0.q": 4, "blocks.1.q": 4, "head": 4}


def merged(folder: Path, adapter: LoraAdapter) -> dict[str, Tensor]:
    write_weights(folder)
    part = Part(folder, {}, (folder / "model.safetensors",), adapter=adapter)
    part.meta_tensors()
    return dict(part.tensors())


def scales(folder: Path, adapter: LoraAdapter) -> dict[str, float]:
    """Return the factor of B A in each weight that the adapter has changed."""
    weights, found = Toy().state_dict(), {}
    for name, tensor in merged(folder, adapter).items():
        if name in adapter.pairs():
            product = adapter.pairs()[name]["B"] @ adapter.pairs()[name]["A"]
            found[name.removesuffix(".weight")] = round(float(((tensor - weights[name]) / product).median()), 3)
        else:
            assert torch.equal(tensor, weights[name])
    return found


def test_a_folder_states_rank_and_alpha(tmp_path: Path) -> None:
    adapter = LoraAdapter(write_adapter(tmp_path / "A", RANKS))
    assert scales(tmp_path, adapter) == dict.fromkeys(RANKS, 8 / 4)


def test_patterns_state_those_of_single_modules(tmp_path: Path) -> None:
    changes = {"rank_pattern": {"1.q": 2, "blocks.0": 7}, "alpha_pattern": {"^head": 3, "blocks.*.q": 6}}
    ranks = {**RANKS, "blocks.1.q": 2}
    adapter = LoraAdapter(write_adapter(tmp_path / "A", ranks, **changes))
    assert scales(tmp_path, adapter) == {"blocks.0.q": 6 / 4, "blocks.1.q": 6 / 2, "head": 3 / 4}


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    adapter = LoraAdapter(write_adapter(tmp_path / "A", RANKS, use_rslora=True))
    assert scales(tmp_path, adapter) == dict.fromkeys(RANKS, 8 / 2)


def test_the_file_in_a_folder_is_the_folder(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "A", RANKS)
    assert scales(tmp_path, LoraAdapter(folder / "adapter_model.safetensors")) == dict.fromkeys(RANKS, 8 / 4)


def test_a_folder_of_an_older_peft_has_a_pickle(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "A", RANKS)
    torch.save(
        {
            f"base_model.model.{module}.lora_{side}.weight": LoraAdapter(folder)
            .pairs()[f"{module}.weight"][side]
            .clone()
            for module in RANKS
            for side in "AB"
        },
        folder / "adapter_model.bin",
    )
    (folder / "adapter_model.safetensors").unlink()
    assert scales(tmp_path, LoraAdapter(folder)) == dict.fromkeys(RANKS, 8 / 4)


@pytest.mark.parametrize("targets", [["blocks.0.q", "blocks.1.q", "head"], r".*\.q|head", "all-linear", None])
def test_targets_may_be_names_or_an_expression(tmp_path: Path, targets: object) -> None:
    adapter = LoraAdapter(write_adapter(tmp_path / "A", RANKS, target_modules=targets))
    assert scales(tmp_path, adapter) == dict.fromkeys(RANKS, 8 / 4)


def test_layers_that_are_not_transformed_need_no_matrices(tmp_path: Path) -> None:
    adapter = LoraAdapter(write_adapter(tmp_path / "A", {"blocks.1.q": 4}, layers_to_transform=[1]))
    assert scales(tmp_path, adapter) == {"blocks.1.q": 8 / 4}


@pytest.mark.parametrize(
    ("ranks", "changes", "words"),
    [
        ({"blocks.0.q": 4, "head": 4}, {}, r"nothing for blocks\.1\.q\.weight"),
        ({**RANKS, "blocks.1.q": 3}, {}, r"blocks\.1\.q\.weight has rank 3, but 4 in its configuration"),
        ({}, {"target_modules": None}, "it is empty"),
    ],
)
def test_an_adapter_that_does_not_match_is_refused(
    tmp_path: Path, ranks: dict[str, int], changes: dict[str, object], words: str
) -> None:
    folder = write_adapter(tmp_path / "A", ranks, **changes)
    with pytest.raises(ValueError, match=f"adapter {folder} does not match these weights: .*{words}"):
        merged(tmp_path, LoraAdapter(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora; DoRA is not supported"),
        ({"bias": "lora_only"}, "bias to 'lora_only'; only 'none' is supported"),
        ({"modules_to_save": ["head"]}, r"modules_to_save to \['head'\]; whole modules are not replaced"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out; the network has no transposed weights"),
        ({"peft_type": "LOHA"}, "peft_type to 'LOHA'; only LORA is supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights to 'pissa', which changes the base weights"),
        ({"lora_bias": True}, "lora_bias to True; it is not supported"),
        ({"a_new_method": {"x": 1}}, r"a_new_method to {'x': 1}; it is not supported"),
    ],
)
def test_what_a_merge_would_get_wrong_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    folder = write_adapter(tmp_path / "A", RANKS, **changes)
    with pytest.raises(ValueError, match=f"{folder}/adapter_config.json sets {words}"):
        LoraAdapter(folder).pairs()


@pytest.mark.parametrize(
    "changes",
    [
        {"r": "4"},
        {"r": 0},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"rank_pattern": {"q": 0}},
        {"alpha_pattern": [1]},
        {"rank_pattern": {"(": 2}},
    ],
)
def test_a_field_of_the_wrong_type_is_named(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = write_adapter(tmp_path / "A", RANKS, **changes)
    with pytest.raises(ValueError, match=f"{folder}/adapter_config.json has a field of the wrong type"):
        LoraAdapter(folder).pairs()


def test_an_incomplete_folder_names_the_missing_file(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "A", RANKS)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"no LoRA adapter in {folder}: {folder}/adapter_model.safetensors is missing"):
        LoraAdapter(folder).pairs()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{folder}/adapter_config.json has no field 'r'"):
        LoraAdapter(folder).pairs()


@pytest.mark.parametrize("command", [["inspect"], ["pack"]])
def test_an_empty_folder_ends_the_command_with_its_path_and_the_missing_file(
    tmp_path: Path, checkpoint: Path, command: list[str]
) -> None:
    (tmp_path / "A").mkdir()
    out = [str(tmp_path / "out")] if command == ["pack"] else []
    said = f"error: no LoRA adapter in {tmp_path}/A: {tmp_path}/A/adapter_config.json is missing"
    with pytest.raises(SystemExit, match=said):
        main([*command, str(checkpoint), *out, "--adapter", str(tmp_path / "A")])
    with pytest.raises(SystemExit, match=f"error: no LoRA adapter at {tmp_path}/B: expected a file, or a folder"):
        main([*command, str(checkpoint), *out, "--adapter", str(tmp_path / "B")])


def test_a_folder_around_an_adapters_names_it(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "A", RANKS)
    with pytest.raises(ValueError, match=rf"adapter_config.json is missing; did you mean {folder}\?"):
        LoraAdapter(tmp_path).pairs()


def test_another_alpha_beside_a_folders_is_refused(tmp_path: Path) -> None:
    adapter = LoraAdapter(write_adapter(tmp_path / "A", RANKS), alpha=64.0)
    with pytest.raises(ValueError, match=f"alpha of the adapter {tmp_path}/A is in {tmp_path}/A/adapter_config.json"):
        adapter.pairs()


def test_the_digest_depends_on_the_configuration(tmp_path: Path) -> None:
    write_weights(tmp_path)
    part = Part(tmp_path, {}, (tmp_path / "model.safetensors",))
    digests = {part.digest()}
    for name, changes in {"A": {}, "B": {"lora_alpha": 9}}.items():
        digests.add(replace(part, adapter=LoraAdapter(write_adapter(tmp_path / name, RANKS, **changes))).digest())
    assert len(digests) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q", "head"]},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": r"blocks\.\d\.[qk]",
            "rank_pattern": {"k": 2, "1.q": 6},
            "alpha_pattern": {r"blocks\.1": 3, "0.k": 5},
            "use_rslora": True,
        },
        {"r": 2, "target_modules": "all-linear", "exclude_modules": ["k"], "init_lora_weights": "gaussian"},
        {"r": 3, "target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_saves_is_merged_as_peft_merges_it(tmp_path: Path, options: dict[str, Any]) -> None:
    import peft

    adapted = peft.get_peft_model(Toy(), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(str(tmp_path / "A"))
    found = merged(tmp_path, LoraAdapter(tmp_path / "A"))
    expected = adapted.merge_and_unload().state_dict()
    assert any(not torch.equal(expected[name], Toy().state_dict()[name]) for name in expected)
    torch.testing.assert_close(found, dict(expected))
