"""Tests of training.mouth."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avatar.checkpoints.files import save
from avatar.checkpoints.part import Part
from avatar.denoiser.model import Network, load
from tests.training.small import network_of, small
from training.mouth import scale_mouth


def saved(network: Network, folder: Path) -> dict[str, torch.Tensor]:
    save(folder, network.config.to_dict(), network, torch.float16)
    return {name: weight.clone() for name, weight in load(Part.read(folder)).state_dict().items()}


def test_the_mouth_alone_is_scaled_and_keeps_its_precision(tmp_path: Path) -> None:
    before = saved(network_of(small()), tmp_path)
    files = sorted(each.stat().st_size for each in tmp_path.iterdir())
    scale_mouth(tmp_path, 1.5)
    after = load(Part.read(tmp_path)).state_dict()
    for name, weight in before.items():
        factor = 1.5 if name.startswith("mouth.") else 1.0
        torch.testing.assert_close(after[name], factor * weight, rtol=2e-3, atol=1e-6)
    assert sorted(each.stat().st_size for each in tmp_path.iterdir()) == files


def test_a_network_without_a_mover_has_no_mouth_to_scale(tmp_path: Path) -> None:
    saved(network_of(replace(small(), mover=None)), tmp_path)
    with pytest.raises(ValueError, match="has no mover"):
        scale_mouth(tmp_path, 1.5)
