"""Tests of avatar.denoiser.model: the network, whole and in streams."""

import hashlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor

from avatar.checkpoints.files import save
from avatar.checkpoints.part import Part
from avatar.denoiser.attention import reference_frame
from avatar.denoiser.cache import KeysValues, KVCache
from avatar.denoiser.config import NetworkConfig, base
from avatar.denoiser.model import Network, load
from tests.denoiser.conftest import HEIGHT, WIDTH, every_length, randn, random_network
from training.clips import ClipHistory
from training.initialise import initialise

ROOT = Path(__file__).parents[2]
BLOCKS = 5
DISTANCES = (30, 7, 4, 21, 4)


class Clip:
    """A batch of random clips and their inputs; block i of a clip is block i + start of its stream."""

    def __init__(self, config: NetworkConfig, seed: int = 0, batch: int = 1, start: int = 6) -> None:
        self.config, self.start, frames = config, start, BLOCKS * config.num_frames_per_block
        self.x = randn(seed, batch, config.in_dim, frames, HEIGHT, WIDTH)
        self.features = randn(
            seed + 1, batch, 1, config.num_encoder_layers, config.audio_dim, BLOCKS * config.frames_per_block
        )
        self.reference = randn(seed + 2, batch, config.in_dim, 1, HEIGHT, WIDTH)
        self.motion = randn(seed + 3, batch, config.in_dim, 19, HEIGHT, WIDTH)
        self.text = randn(seed + 4, batch, min(3, config.text_len), config.text_dim)
        self.pose = randn(seed + 5, batch, config.cond_dim, frames, HEIGHT, WIDTH)
        self.timesteps = torch.full((1, 1), 750.0)

    def first_frame(self, block: int) -> int:
        return (self.start + block) * self.config.num_frames_per_block

    def reference_frames(self) -> list[int | Tensor]:
        return [reference_frame(self.first_frame(block), DISTANCES[block]) for block in range(BLOCKS)]

    def prefilled(self, network: Network) -> tuple[list[KeysValues], list[KeysValues]]:
        text = network.embed_text(self.text)
        return text, network.prefill(self.reference, self.motion, text)

    def whole(self, network: Network) -> Tensor:
        """All blocks at once, under the mask."""
        text, conditions = self.prefilled(network)
        history = ClipHistory(self.config, HEIGHT, WIDTH, conditions, self.reference_frames())
        modulation, audio = network.embed_time(self.timesteps), network.encode_audio(self.features)
        output: Tensor = network(self.x, modulation, text, audio, self.pose, self.first_frame(0), history)
        return output

    def streamed(self, network: Network) -> Tensor:
        """Block after block, with a ring."""
        text, conditions = self.prefilled(network)
        cache = KVCache(self.config, HEIGHT, WIDTH, batch=len(self.x), dtype=network.dtype)
        cache.set_sink(conditions)
        frames, columns, outputs = self.config.num_frames_per_block, self.config.frames_per_block, []
        for block, reference in enumerate(self.reference_frames()):
            cache.start_block(self.start + block, int(reference))
            now, audio_span = slice(block * frames, (block + 1) * frames), slice(block * columns, (block + 1) * columns)
            steps = self.timesteps if self.timesteps.shape[1] == 1 else self.timesteps[:, now]
            audio = network.encode_audio(self.features[..., audio_span])
            x, pose = self.x[:, :, now], self.pose[:, :, now]
            modulation = network.embed_time(steps)
            outputs.append(network(x, modulation, text, audio, pose, self.first_frame(block), cache))
        return torch.cat(outputs, dim=2)


def frames_of(config: NetworkConfig, *blocks: int) -> list[int]:
    frames = config.num_frames_per_block
    return [frame for block in blocks for frame in range(block * frames, (block + 1) * frames)]


def without_gradient(network: Network) -> list[str]:
    return [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]


def test_base_has_the_public_names_and_shapes() -> None:
    with torch.device("meta"):
        network = Network(base())
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert len(shapes) == 1260
    assert sum(each.numel() for each in network.parameters()) == 16_295_755_609
    patterns = {re.sub(r"\.\d+\.", ".N.", name) for name in shapes if name.startswith(("blocks", "audio_injector"))}
    attention = {f"{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")} | {
        "norm_q.weight",
        "norm_k.weight",
    }
    assert patterns == {
        "blocks.N.modulation",
        *(f"blocks.N.{each}" for each in ("norm3.weight", "norm3.bias")),
        *(f"blocks.N.ffn.N.{each}" for each in ("weight", "bias")),
        *(f"blocks.N.{kind}.{each}" for kind in ("self_attn", "cross_attn") for each in attention),
        *(f"audio_injector.injector.N.{each}" for each in attention),
        *(f"audio_injector.injector_adain_layers.N.linear.{each}" for each in ("weight", "bias")),
    }
    listing = "".join(f"{name} {shape}\n" for name, shape in sorted(shapes.items()))
    assert (
        hashlib.sha256(listing.encode()).hexdigest()
        == "0052f6bcc22fa439e4f736e47f232149f2dd6a88484e470fb839273ff27d3897"
    )


@every_length
def test_streamed_equals_whole(network: Network, config: NetworkConfig) -> None:
    clip = Clip(config)
    torch.testing.assert_close(clip.streamed(network), clip.whole(network), atol=1e-5, rtol=0)


@every_length
def test_streamed_equals_whole_when_levels_differ_by_block(network: Network, config: NetworkConfig) -> None:
    clip = Clip(config)
    clip.timesteps = (1000 * torch.rand(1, BLOCKS)).repeat_interleave(config.num_frames_per_block, dim=1)
    torch.testing.assert_close(clip.streamed(network), clip.whole(network), atol=1e-5, rtol=0)


def test_a_common_level_equals_one_level_per_frame(network: Network, config: NetworkConfig) -> None:
    clip = Clip(config)
    common = clip.whole(network)
    clip.timesteps = clip.timesteps.expand(1, clip.x.shape[2])
    torch.testing.assert_close(clip.whole(network), common, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changed", ["x", "features", "pose"])
@pytest.mark.parametrize("way", ["whole", "streamed"])
def test_the_future_does_not_affect_the_past(network: Network, config: NetworkConfig, changed: str, way: str) -> None:
    clip = Clip(config)
    before = getattr(clip, way)(network)
    along = 4 if changed == "features" else 2
    part = getattr(clip, changed).movedim(along, 0)
    part[len(part) // BLOCKS * 3 :] += 1
    after = getattr(clip, way)(network)
    past, future = frames_of(config, 0, 1, 2), frames_of(config, 3)
    assert torch.equal(before[:, :, past], after[:, :, past])
    assert not torch.allclose(before[:, :, future], after[:, :, future], atol=1e-2)


@pytest.mark.parametrize("changed", ["reference", "motion", "text"])
def test_conditions_affect_every_block(network: Network, config: NetworkConfig, changed: str) -> None:
    clip = Clip(config)
    before = clip.whole(network)
    getattr(clip, changed).add_(1)
    moved = rearrange(clip.whole(network) - before, "b c (blocks t) h w -> blocks (b c t h w)", blocks=BLOCKS)
    assert (moved.abs().amax(1) > 1e-3).all()


def test_a_batch_of_two_equals_two_of_one(network: Network, config: NetworkConfig) -> None:
    clips = [Clip(config, seed) for seed in (0, 50)]
    both = Clip(config)
    for name in ("x", "features", "reference", "motion", "text", "pose"):
        setattr(both, name, torch.cat([getattr(clip, name) for clip in clips]))
    apart = torch.cat([clip.streamed(network) for clip in clips])
    torch.testing.assert_close(both.streamed(network), apart, atol=1e-5, rtol=0)
    torch.testing.assert_close(both.whole(network), apart, atol=1e-5, rtol=0)


def test_samples_of_a_batch_may_have_different_positions(network: Network, config: NetworkConfig) -> None:
    clips = [Clip(config, start=start) for start in (3, 4000)]
    apart = torch.cat([clip.whole(network) for clip in clips])
    both = Clip(config, batch=2)
    for name in ("x", "features", "reference", "motion", "text", "pose"):
        setattr(both, name, torch.cat([getattr(clip, name) for clip in clips]))
    first, text = torch.tensor([clip.first_frame(0) for clip in clips]), network.embed_text(both.text)
    frames = [torch.tensor(pair) for pair in zip(*(clip.reference_frames() for clip in clips), strict=True)]
    history = ClipHistory(config, HEIGHT, WIDTH, network.prefill(both.reference, both.motion, text), frames)
    modulation, audio = network.embed_time(both.timesteps), network.encode_audio(both.features)
    together = network(both.x, modulation, text, audio, both.pose, first, history)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_text_is_padded_with_zeros_that_are_attended_to(network: Network, config: NetworkConfig) -> None:
    clip = Clip(config)
    short = clip.whole(network)
    clip.text = torch.cat([clip.text, torch.zeros(1, config.text_len - 3, config.text_dim)], dim=1)
    assert torch.equal(clip.whole(network), short)
    clip.text[:, 3:] += 1
    assert not torch.allclose(clip.whole(network), short, atol=1e-3)


def test_the_shortcut_for_one_text_token_equals_attention(config: NetworkConfig) -> None:
    network = random_network(replace(config, text_len=1))
    text, x = network.embed_text(randn(1, 1, 1, config.text_dim)), randn(2, 1, 2, 24, config.dim)
    layer = network.layers[0]
    q = layer.cross_attn.queries(layer.norm3(x).flatten(1, 2))
    read = rearrange(layer.cross_attn(q, *text[0]), "b (t s) d -> b t s d", t=2)
    torch.testing.assert_close(layer.attend_to_text(x, text[0]).expand_as(read), read)


def test_gradients_reach_every_parameter(config: NetworkConfig) -> None:
    network = random_network(config).requires_grad_(True)
    torch.autograd.backward(Clip(config).whole(network).square().mean())
    assert without_gradient(network) == []


def test_initial_weights_depend_on_the_seed_only(config: NetworkConfig) -> None:
    one, same, other = (Network(config) for _ in range(3))
    for network, seed in ((one, 3), (same, 3), (other, 4)):
        initialise(network, seed)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.patch_embedding.weight, other.patch_embedding.weight)


def test_four_training_steps_reach_the_zero_initialised_weights(config: NetworkConfig) -> None:
    network, clip = Network(config), Clip(config)
    initialise(network, seed=3)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(4):
        loss = (clip.whole(network) - clip.reference).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert without_gradient(network) == []


def test_a_saved_network_loads_with_equal_output(network: Network, config: NetworkConfig, tmp_path: Path) -> None:
    save(tmp_path, config.to_dict(), network)
    loaded = load(Part.read(tmp_path))
    assert loaded.config == config
    assert not any(weight.requires_grad for weight in loaded.parameters())
    clip = Clip(config)
    assert torch.equal(clip.streamed(loaded), clip.streamed(network))


@pytest.mark.slow
def test_loading_imports_no_compiler() -> None:
    program = (
        "import sys; from pathlib import Path; from avatar.checkpoints.part import Part\n"
        "from avatar.denoiser.model import load\n"
        "load(Part.read(Path(sys.argv[1]))); print({'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, "models/tiny/denoiser"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n", "they take 1.5 CPU-seconds of a worker's start"
