"""Pretrain the audio encoders before stage 1: `python -m training.pretrain_audio --data runs/latents --out runs/audio`.

Stage 1 then starts from it with `--start runs/audio`. Trained by stage 1 alone, the encoder collapsed to a constant: at
first its tokens carry nothing that helps, and suppressing their variation lowers the loss before any layer uses them.
Here it is trained together with a linear head from its tokens to the opening of the jaw, on clips where that is known.
The encoder of what is heard, of a network that listens, begins as a copy of it and learns the nods and brows that
answer the other person. The heads tell the mover, if the network has one, how far the mouth is open and the brows are
raised.

Axes: b batch, l encoder layers, d width, f pixel frames, t latent frames, n tokens, p frames of a latent frame, e
curves.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from avatar.checkpoints.files import save
from avatar.checkpoints.part import Part
from avatar.denoiser.audio_injection import AudioTokens, CausalAudioEncoder
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network
from avatar.types import FRAMES_PER_LATENT
from training.data import StoredClip, read_clips
from training.initialise import copy_weights, initialise
from training.pretrain import PRESETS

BATCH_SIZE = 24
LEARNING_RATE = 2e-3
# Clips that the bias of the first convolutions is computed from.
NUM_CENTRING_CLIPS = 64


@dataclass(frozen=True)
class Lesson:
    """The task of an encoder: features are the array that it reads, truth the curves (f,) that it predicts."""

    features: str
    truth: tuple[str, ...]


SPEAKING, LISTENING = Lesson("features", ("jaw",)), Lesson("heard", ("nod", "brow"))


def train_encoder(
    encoder: CausalAudioEncoder,
    config: NetworkConfig,
    clips: Sequence[StoredClip],
    steps: int,
    seed: int,
    lesson: Lesson = SPEAKING,
) -> tuple[list[float], nn.Linear]:
    """Train an audio encoder in place; return the loss of each step, relative to the curves' variance, and the head.

    ValueError if no clip has the features and the truth.
    """
    labelled = [clip for clip in clips if all(clip.has(name) for name in (lesson.features, *lesson.truth))]
    if not labelled:
        names = " and ".join(lesson.truth)
        raise ValueError(
            f"no clip has a known {names}; for real video, start stage 1 from a network that was pretrained"
        )
    head = nn.Linear((config.num_audio_token + 1) * config.dim, FRAMES_PER_LATENT * len(lesson.truth))
    # With a random head, the encoder would first learn to suppress its output.
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    trainable = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trainable, LEARNING_RATE, (0.9, 0.98), weight_decay=0.01)
    rng = np.random.default_rng(seed)
    losses = []
    for step in range(steps):
        batch = [labelled[int(rng.integers(len(labelled)))] for _ in range(BATCH_SIZE)]
        features = torch.stack([torch.from_numpy(np.array(clip.array(lesson.features))).float() for clip in batch])
        curves = [np.stack([np.array(clip.array(name), np.float32) for name in lesson.truth]) for clip in batch]
        tokens = encoder.blocks(features[:, None], config.frames_per_block, config.audio_context_frames)
        loss = curve_loss(head, tokens, torch.from_numpy(np.stack(curves)))
        torch.autograd.backward(loss)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses, head


@torch.no_grad()
def centre_features(encoder: CausalAudioEncoder, clips: Sequence[StoredClip]) -> None:
    """Set the biases of the first convolutions to cancel the features' mean, which is four times their variation."""
    mean = torch.stack([torch.from_numpy(np.array(clip.array("features"), np.float32)).mean((0, 2)) for clip in clips])
    for each in (encoder.encoder.conv1_local.conv, encoder.encoder.conv1_global.conv):
        assert each.bias is not None
        each.bias.copy_(-torch.einsum("o d k, d -> o", each.weight, mean.mean(0)))


def curve_loss(head: nn.Linear, tokens: AudioTokens, curves: Tensor) -> Tensor:
    """Return the squared error of curves (b, e, f) over their variance, as the head predicts them from tokens."""
    local = rearrange(tokens.local[:, 0, :, :-1], "b t n d -> b t (n d)")
    predicted = head(torch.cat([local, tokens.overall[:, 0]], dim=-1))
    # Nods are a tenth as large as brows.
    scaled = curves / curves.std((0, 2), keepdim=True).clamp(min=1e-3)
    target = rearrange(scaled, "b e (t p) -> b t (e p)", p=FRAMES_PER_LATENT)
    return functional.mse_loss(predicted, target) / scaled.var((0, 2)).mean()


@torch.no_grad()
def set_head(layer: nn.Linear, head: nn.Linear, lesson: Lesson, clips: Sequence[StoredClip]) -> None:
    """Set a linear map to a head's outputs for the lesson's last curve, which are multiples of its deviation.

    The deviation is that of all clips together, as in the loss: the mean of each clip's is smaller, since in many of
    them a mouth stays shut.
    """
    truth = lesson.truth[-1]
    known = [clip for clip in clips if clip.has(lesson.features) and clip.has(truth)]
    deviation = float(np.concatenate([clip.array(truth) for clip in known]).std())
    layer.weight.copy_(deviation * head.weight[-layer.out_features :])
    layer.bias.copy_(deviation * head.bias[-layer.out_features :])


def pretrain(
    network: Network, clips: Sequence[StoredClip], steps: int, seed: int, is_new: bool = True
) -> dict[str, float]:
    """Pretrain a network's audio encoders; return the share of each truth's variance that its encoder explains.

    is_new: the encoder's weights are random, so its first convolutions are centred on the features.
    """
    encoder = network.casual_audio_encoder
    if is_new:
        centre_features(encoder, [clip for clip in clips if clip.has("features")][:NUM_CENTRING_CLIPS])
    losses = {}
    losses["jaw"], head = train_encoder(encoder, network.config, clips, steps, seed)
    if network.config.mover:
        set_head(network.mouth, head, SPEAKING, clips)
    if "heard" in network.config.inputs:
        network.heard_audio_encoder.load_state_dict(encoder.state_dict())
        heard = network.heard_audio_encoder
        losses["nods and brows"], head = train_encoder(heard, network.config, clips, steps, seed + 1, LISTENING)
        if network.config.mover:
            set_head(network.brows, head, LISTENING, clips)
    return {name: 1 - sum(each[-20:]) / len(each[-20:]) for name, each in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.pretrain_audio", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of shards that training.prepare wrote")
    parser.add_argument("--out", type=Path, required=True, help="denoiser folder to write, for --start of stage 1")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="network (default tiny)")
    parser.add_argument("--layers", type=Path, help="denoiser folder to copy weights from where names and shapes match")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each encoder (default 400)")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    network = Network(PRESETS[flags.preset][0]())
    initialise(network, flags.seed)
    if flags.layers:
        count = copy_weights(network, Part.read(flags.layers))
        print(f"starts from {count} of {len(network.state_dict())} weights of {flags.layers}")
    explained = pretrain(network, read_clips(flags.data, "train"), flags.steps, flags.seed, is_new=not flags.layers)
    save(flags.out, network.config.to_dict(), network)
    for name, share in explained.items():
        print(f"explains {share:.0%} of the variance of {name}")
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    main()
