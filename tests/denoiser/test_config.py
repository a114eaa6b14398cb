"""Tests of avatar.denoiser.config."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from avatar.denoiser.config import NetworkConfig, base, tiny, to_tuple
from avatar.denoiser.sampler import select_levels
from avatar.settings import DenoiserSettings
from services.denoiser.loading import load_denoisers

# Fields of the public checkpoint's config.json.
PUBLIC = {
    "_class_name": "WanModel_S2V",
    "_diffusers_version": "0.34.0",
    "adain_mode": "attn_norm",
    "add_last_motion": True,
    "audio_dim": 1024,
    "audio_inject_layers": [0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39],
    "cond_dim": 16,
    "dim": 5120,
    "enable_adain": True,
    "enable_framepack": True,
    "enable_motioner": False,
    "enable_tsm": False,
    "eps": 1e-6,
    "ffn_dim": 13824,
    "framepack_drop_mode": "padd",
    "freq_dim": 256,
    "in_dim": 16,
    "model_type": "s2v",
    "motion_token_num": 1024,
    "num_audio_token": 4,
    "num_heads": 40,
    "num_layers": 40,
    "out_dim": 16,
    "text_len": 512,
    "trainable_token_pos_emb": False,
    "zero_init": True,
    "zero_timestep": True,
}


def test_the_public_file_gives_the_base_preset() -> None:
    assert NetworkConfig.from_dict(PUBLIC) == base()


@pytest.mark.parametrize("preset", [tiny, base])
def test_a_saved_config_loads_equal(preset: Callable[[], NetworkConfig]) -> None:
    assert NetworkConfig.from_dict(json.loads(json.dumps(preset().to_dict()))) == preset()


def test_unknown_fields_are_ignored_and_named(caplog: pytest.LogCaptureFixture) -> None:
    assert NetworkConfig.from_dict(PUBLIC | {"flavour": 1, "colour": 2}) == base()
    assert "ignored unknown fields of a checkpoint: colour, flavour; known are in_dim" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"), [("adain_mode", "attn"), ("qk_norm", False), ("patch_size", [1, 4, 4]), ("model_type", "t2v")]
)
def test_another_network_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*{value!r}".replace("[", r"\[")):
        NetworkConfig.from_dict(PUBLIC | {name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_heads": 3}, "dim"),
        ({"audio_inject_layers": (0, 8)}, "audio_inject_layers"),
        ({"audio_inject_layers": (2, 0)}, "audio_inject_layers"),
        ({"schedule": (1.0, 0.5)}, "schedule"),
        ({"schedule": (1.0, 0.5, 0.5, 0.0)}, "schedule"),
        ({"schedule": (0.0,)}, "schedule"),
        ({"schedule": ()}, "schedule"),
        ({"schedule": (1.5, 0.0)}, "schedule"),
        ({"sampler": "heun"}, "sampler"),
        ({"noise_scale": 1.5}, "noise_scale"),
        ({"noise_scale": -0.5}, "noise_scale"),
        ({"trained_noise_scale": 0.0}, "trained_noise_scale"),
        ({"noise_correlation": 1.0}, "noise_correlation"),
        ({"audio_context_frames": 3}, "audio_context_frames"),
        ({"sink_distance": (5, 4)}, "sink_distance"),
        ({"sink_distance": (4,)}, "sink_distance"),
        ({"sink_update_block": 0}, "sink_update_block"),
        ({"pose": "video"}, "pose"),
        ({"cond_dim": 8}, "pose"),
        ({"output": "noise"}, "output"),
        ({"window_latents": 0}, "window_latents must be 1 to 1024, got 0"),
        ({"window_latents": 3 * 10**9}, "window_latents"),
        ({"window_latents": 11}, "window_latents must be whole blocks of 3 latents, got 11"),
        ({"out_dim": 8}, "out_dim must be in_dim, 16, got 8"),
        ({"num_frames_per_block": 0}, "num_frames_per_block must be 1 to 3, got 0"),
        ({"num_frames_per_block": 1000}, "num_frames_per_block"),
        ({"freq_dim": 255}, "freq_dim must be even"),
        ({"sink_distance": 10**30}, "sink_distance"),
        ({"sink_update_block": 10**30}, "sink_update_block"),
        ({"schedule": (1.0, 1e-320, 0.0)}, "schedule"),
        ({"trained_schedule": (0.5, 1.0, 0.9, 0.75, 0.0)}, "trained_schedule must be two or more sigmas that descend"),
        *(({"eps": eps}, f"eps must be .*, got {eps}") for eps in (nan, inf, -1.0, 0.0)),
        *(({"residual_scale": scale}, "residual_scale") for scale in (nan, inf, 1e30)),
    ],
)
def test_contradicting_values_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(tiny(), **change)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("audio_inject_layers", [0.5], "a list of values, each a whole number"),
        ("audio_inject_layers", 3, "a list"),
        ("heard_inject_layers", ["1"], "a list"),
        ("schedule", None, "a list of values, each a finite number"),
        ("trained_schedule", [1.0, "0"], "a list of values, each a finite number or null"),
        ("schedule", [1.0, nan, 0.0], "a list"),
        ("sink_distance", [4.5, 30.5], "a whole number or a list of 2 values, each a whole number"),
        ("sink_distance", [1, 2, 3], "a whole number or a list of 2"),
        ("sink_distance", 1e30, "a whole number or a list of 2"),
        ("noise_scale", inf, "a finite number"),
        ("window_blocks", 10**9, "1 to 1024"),
        ("window_blocks", "4", "a whole number"),
        ("window_blocks", 0, "1 to 1024"),
    ],
)
def test_a_field_that_cannot_be_used_is_named_with_what_is_expected(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be {expected}.*, got {re.escape(repr(to_tuple(value)))}$"):
        NetworkConfig.from_dict({name: value})


def test_the_file_of_a_wrong_field_is_named_and_no_setting(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    file = folder / "denoiser/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_heads": 0}))
    with pytest.raises(ValueError, match=rf"^the configuration in {file}: num_heads must be 1 to 1048576, got 0$"):
        load_denoisers(DenoiserSettings(checkpoint=folder), [])


def test_a_value_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(ValueError, match="dim must be a whole number, got 'wide'"):
        NetworkConfig.from_dict(PUBLIC | {"dim": "wide"})


@pytest.mark.parametrize(("name", "value"), [("num_heads", 0), ("dim", 10**12), ("num_layers", -1)])
def test_a_size_that_no_network_has_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be 1 to \d+, got {value}$"):
        NetworkConfig.from_dict({name: value})


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        (4, [0, 1, 2, 3]),
        (3, [0, 1, 2]),
        (2, [0, 2]),
        (1, [0]),
        ((1.0, 0.602), [0, 2]),
        ((1.0, 0.857692, 0.00892857), [0, 1, 3]),
    ],
)
def test_fewer_levels_are_some_of_the_public_ones(choice: int | tuple[float, ...], kept: list[int]) -> None:
    trained = base().schedule
    chosen = base().with_levels(choice)
    assert chosen.schedule == (*(trained[level] for level in kept), 0.0)
    assert chosen.num_trained_levels == 4
    assert chosen.with_levels(None) == chosen
    assert chosen.with_levels(4) == base(), "a choice is always among the trained levels"
    assert NetworkConfig.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (0, "must be 1 to 4, got 0"),
        (5, "must be 1 to 4, got 5"),
        ((0.5,), "the levels must descend from the first of sigma 1, 0.9, 0.75, 0.5"),
        ((1.0, 0.5, 0.75), "must descend"),
        ((1.0, 1.0), "must descend"),
        ((1.0, 0.6), "trained for levels of sigma 1, 0.9, 0.75, 0.5; expected some of them"),
        ((), "expected some of them"),
    ],
)
def test_levels_that_were_not_trained_are_refused(choice: int | tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        select_levels(tiny().schedule, choice)
    with pytest.raises(ValueError, match="schedule must be some of trained_schedule's"):
        replace(tiny(), schedule=(1.0, 0.6, 0.0), trained_schedule=tiny().schedule)


def test_levels_are_described_with_the_trained_ones() -> None:
    assert tiny().levels_text == "4: sigma 1, 0.9, 0.75, 0.5, 0"
    assert base().with_levels(2).levels_text == "2 of the 4 trained: sigma 1, 0.602151, 0"


def test_the_window_is_counted_in_latents() -> None:
    """Of a file of an older version, whose window is in blocks, it is converted."""
    for latents in (1, 2, 3):
        fields = {"num_frames_per_block": latents}
        assert NetworkConfig.from_dict(fields).window_blocks == 12 // latents
        assert NetworkConfig.from_dict({**fields, "window_blocks": 5}).window_latents == 5 * latents
