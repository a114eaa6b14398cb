from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avatar.checkpoints.files import save
from avatar.checkpoints.part import Part
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import Network
from avatar.types import Block, Conditions, Session
from tests.training.small import network_of, small
from training.data import Clip, StoredClip, read_clips, write_shard
from training.initialise import copy_weights, initialise
from training.pretrain_audio import SPEAKING, centre_features, pretrain, set_head, train_encoder


def talking_clip(number: int) -> Clip:
    """Make a clip of nearly constant features that vary with the jaw in one direction."""
    config, rng = small(), np.random.default_rng(number)
    direction = np.random.default_rng(0).normal(size=(config.num_encoder_layers, config.audio_dim, 1))
    jaw = rng.uniform(0, 1, 12).repeat(4)
    features = 3 + 0.5 * direction * jaw + 0.02 * rng.normal(size=(*direction.shape[:2], 48))
    arrays: dict[str, Any] = {"features": features.astype(np.float16), "jaw": jaw.astype(np.float32)}
    # The other's voice goes with nods and brows.
    arrays |= {"heard": arrays["features"][..., ::-1], "nod": 0.1 * jaw[::-1].astype(np.float32)}
    arrays["brow"] = (1 - jaw[::-1]).astype(np.float32)
    return Clip(f"{number:08d}", arrays, {"person": number, "lead_frames": 0})


@pytest.fixture
def talking(tmp_path: Path) -> list[StoredClip]:
    write_shard(tmp_path / "train" / "000000.tar", [talking_clip(number) for number in range(8)])
    return read_clips(tmp_path, "train")


@pytest.fixture
def network() -> Network:
    network = Network(small())
    initialise(network, 0)
    return network


def test_the_encoder_learns_the_jaw_and_its_tokens_keep_varying(network: Network, talking: list[StoredClip]) -> None:
    others = {name: each.clone() for name, each in network.named_parameters() if "casual" not in name}
    encoder, config = network.casual_audio_encoder, network.config
    centre_features(encoder, talking)
    losses, _ = train_encoder(encoder, config, talking, 60, seed=0)
    assert sum(losses[-5:]) / 5 < 0.4
    features = torch.from_numpy(np.array(talking[0].array("features"))).float()[None, None]
    local = network.encode_audio(features).local[..., :-1, :]
    assert local.std(2).mean() > 0.2 * local.std()
    assert all(torch.equal(each, others[name]) for name, each in network.named_parameters() if name in others)


def test_centring_cancels_the_mean_of_features(network: Network, talking: list[StoredClip]) -> None:
    features = torch.from_numpy(np.array(talking[0].array("features"))).float().mean(0)[None]
    convolution = network.casual_audio_encoder.encoder.conv1_local
    before = convolution(features)
    centre_features(network.casual_audio_encoder, talking)
    after = convolution(features)
    assert after.mean(-1).abs().mean() < 0.2 * before.mean(-1).abs().mean()
    torch.testing.assert_close(after.diff(dim=-1), before.diff(dim=-1), atol=1e-5, rtol=1e-4)


def test_clips_without_a_known_jaw_are_refused(network: Network, tmp_path: Path) -> None:
    clip = talking_clip(0)
    unlabelled = Clip(clip.name, {"features": clip.arrays["features"]}, clip.info)
    write_shard(tmp_path / "films" / "train" / "000000.tar", [unlabelled])
    with pytest.raises(ValueError, match="no clip has a known jaw"):
        pretrain(network, read_clips(tmp_path / "films", "train"), 1, seed=0)


def test_the_listening_encoder_goes_on_from_the_speaking_one_to_nods(
    network: Network, talking: list[StoredClip]
) -> None:
    explained = pretrain(network, talking, 60, seed=0)
    assert explained["jaw"] > 0.6
    assert explained["nods and brows"] > 0.6
    speaking, listening = network.casual_audio_encoder.state_dict(), network.heard_audio_encoder.state_dict()
    assert not torch.equal(speaking["weights"], listening["weights"])
    close = [
        torch.nn.functional.cosine_similarity(speaking[name].flatten(), listening[name].flatten(), dim=0)
        for name in speaking
    ]
    assert sum(close) / len(close) > 0.5
    # The mover's mouth opens with the jaw, in the jaw's units.
    features, jaw = (torch.from_numpy(np.array(talking[0].array(name))).float() for name in ("features", "jaw"))
    with torch.no_grad():
        read = network.mouth(network.encode_audio(features[None, None]).flat).flatten()
    assert torch.corrcoef(torch.stack([read, jaw]))[0, 1] > 0.7
    assert 0.5 < read.std() / jaw.std() < 1.3


def test_a_silent_clip_does_not_shrink_the_mouths_movement(tmp_path: Path) -> None:
    silent = talking_clip(1)
    silent = replace(silent, arrays={**silent.arrays, "jaw": np.zeros(48, np.float32)})
    write_shard(tmp_path / "train" / "000000.tar", [talking_clip(0), silent])
    clips = read_clips(tmp_path, "train")
    head, layer = torch.nn.Linear(3, 8), torch.nn.Linear(3, 4)
    set_head(layer, head, SPEAKING, clips)
    deviation = float(np.concatenate([clip.array("jaw") for clip in clips]).std())
    torch.testing.assert_close(layer.weight, deviation * head.weight[-4:])
    torch.testing.assert_close(layer.bias, deviation * head.bias[-4:])


def test_weights_of_another_network_are_copied_where_they_fit(network: Network, tmp_path: Path) -> None:
    plain = Network(replace(small(), heard_inject_layers=(), face_motion=False, mover=None, ffn_dim=64))
    initialise(plain, 1)
    save(tmp_path, plain.config.to_dict(), plain)
    before = {name: each.clone() for name, each in network.state_dict().items()}
    count = copy_weights(network, Part.read(tmp_path))
    changed = {name for name, each in network.state_dict().items() if not torch.equal(each, before[name])}
    assert count == sum(each.shape == before[name].shape for name, each in plain.state_dict().items())
    assert "blocks.0.self_attn.q.weight" in changed
    assert not any("heard" in name or "ffn.0" in name or "face_motion" in name for name in changed)


def test_latents_of_more_channels_change_nothing_at_first(tmp_path: Path) -> None:
    plain, wider = (
        Network(replace(small(), mover=None, in_dim=channels, out_dim=channels, cond_dim=channels))
        for channels in (4, 6)
    )
    plain.load_state_dict(network_of(plain.config).state_dict())
    initialise(wider, 0)
    save(tmp_path, plain.config.to_dict(), plain)
    assert copy_weights(wider, Part.read(tmp_path)) == len(wider.state_dict())
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def denoised(network: Network, channels: int) -> torch.Tensor:
        latents = x[:channels]
        denoiser = Denoiser(network, network.config, 1)
        conditions = Conditions(0, latents[:, :1], torch.zeros(0, 8))
        features = torch.ones(2, 6, 12)
        block = denoiser.step(Block(0, features, latents, conditions), denoiser.open(Session("s", 0, latents)))
        assert block.latent is not None
        return block.latent

    with torch.no_grad():
        one, two = denoised(plain, 4), denoised(wider, 6)
    torch.testing.assert_close(two[:4], one, rtol=1e-5, atol=1e-5)
