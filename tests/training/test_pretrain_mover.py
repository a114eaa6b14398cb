"""Tests of the mover's pretraining."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from avatar.denoiser.model import Network
from tests.training.small import small
from training.batches import BatchConfig
from training.data import StoredClip
from training.initialise import initialise
from training.pretrain import PretrainRecipe
from training.pretrain import make_optimizers as stage_1_optimizers
from training.pretrain_mover import MoverPretraining, MoverRecipe

BATCHES = BatchConfig(4, (3, 3), audio_dropout=0.0, heard_dropout=0.0, face_motion_dropout=0.0)


def new_network() -> Network:
    network = Network(small())
    initialise(network, 0)
    return network


def trained(clips: Sequence[StoredClip], steps: int) -> tuple[MoverPretraining, list[float]]:
    run = MoverPretraining(MoverRecipe(steps=steps, warmup=1, ema_decay=0.8, batches=BATCHES), new_network)
    return run, [run.advance(clips)["loss"] for _ in range(steps)]


def test_the_mover_learns_and_other_weights_stay(prepared: list[StoredClip]) -> None:
    run, losses = trained(prepared, 40)
    assert losses[-1] < 0.8 * losses[0]
    before, after = new_network().state_dict(), run.network.network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("mover.") for name in changed)


def test_held_out_figures_are_of_the_average(prepared: list[StoredClip]) -> None:
    run, _ = trained(prepared, 40)
    start = MoverPretraining(run.recipe, new_network).validate(prepared)
    figures = run.validate(prepared)
    assert set(figures) == {"explained", "features_gain", "heard_gain", "face_motion_gain"}
    assert figures["explained"] > start["explained"]
    assert start["face_motion_gain"] == 0
    assert run.preview(prepared) == []


def test_a_network_without_a_mover_is_refused() -> None:
    with pytest.raises(ValueError, match="the network has no mover: its num_warps is 0"):
        MoverPretraining(MoverRecipe(), lambda: Network(replace(small(), num_warps=0)))


def test_stage_1_trains_what_was_pretrained_at_a_rate_of_its_own() -> None:
    network = new_network()
    optimizers = stage_1_optimizers(network, PretrainRecipe(lr=1e-3, pretrained_lr=1e-4))
    groups = [group for each in optimizers.values() for group in each.param_groups]
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    slow = {name for name, weight in network.named_parameters() if rates[id(weight)] == 1e-4}
    assert slow == {
        name
        for name, _ in network.named_parameters()
        if name.startswith(("mover.", "casual_audio_encoder.", "heard_audio_encoder."))
    }
