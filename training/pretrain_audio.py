"""Pretrain the audio encoder before stage 1: `python -m training.pretrain_audio --data runs/latents --out runs/audio`.

Stage 1 then starts from it with `--start runs/audio`. Trained by stage 1 alone, the encoder collapsed to a constant: at
first its tokens carry nothing that helps, and suppressing their variation lowers the loss before any layer uses them.
Here it is trained together with a linear head from its tokens to the opening of the jaw, on clips where that is known;
the head is then discarded.

Axes: b batch, l encoder layers, d width, f pixel frames, t latent frames, n tokens, p frames of a latent frame.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from avatar.checkpoints.files import save
from avatar.denoiser import config as configs
from avatar.denoiser.model import Network
from avatar.types import FRAMES_PER_LATENT
from training.data import StoredClip, read_clips
from training.initialise import initialise

BATCH_SIZE = 24
LEARNING_RATE = 2e-3
# Clips that the bias of the first convolutions is computed from.
NUM_CENTRING_CLIPS = 64


def train_encoder(network: Network, clips: Sequence[StoredClip], steps: int, seed: int) -> list[float]:
    """Train the audio encoder in place; return the loss of each step, relative to the jaw's variance.

    ValueError if no clip has a known jaw.
    """
    labelled = [clip for clip in clips if clip.has("jaw")]
    if not labelled:
        raise ValueError("no clip has a known jaw; for real video, start stage 1 from a network that was pretrained")
    centre_features(network, labelled[:NUM_CENTRING_CLIPS])
    width = network.config.dim
    head = nn.Linear((network.config.num_audio_token + 1) * width, FRAMES_PER_LATENT)
    # With a random head, the encoder would first learn to suppress its output.
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    trainable = [*network.casual_audio_encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trainable, LEARNING_RATE, (0.9, 0.98), weight_decay=0.01)
    rng = np.random.default_rng(seed)
    losses = []
    for step in range(steps):
        batch = [labelled[int(rng.integers(len(labelled)))] for _ in range(BATCH_SIZE)]
        features = torch.stack([torch.from_numpy(np.array(clip.array("features"))).float() for clip in batch])
        jaw = torch.stack([torch.from_numpy(np.array(clip.array("jaw"))) for clip in batch])
        loss = jaw_loss(network, head, features, jaw)
        torch.autograd.backward(loss)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def centre_features(network: Network, clips: Sequence[StoredClip]) -> None:
    """Set the biases of the first convolutions to cancel the features' mean, which is four times their variation."""
    mean = torch.stack([torch.from_numpy(np.array(clip.array("features"), np.float32)).mean((0, 2)) for clip in clips])
    encoder = network.casual_audio_encoder.encoder
    for each in (encoder.conv1_local.conv, encoder.conv1_global.conv):
        assert each.bias is not None
        each.bias.copy_(-torch.einsum("o d k, d -> o", each.weight, mean.mean(0)))


def jaw_loss(network: Network, head: nn.Linear, features: Tensor, jaw: Tensor) -> Tensor:
    """Return the jaw's squared error over its variance, predicted from features (b, l, d, f). jaw: (b, f)."""
    tokens = network.encode_audio(features[:, None])
    local = rearrange(tokens.local[:, 0, :, :-1], "b t n d -> b t (n d)")
    predicted = head(torch.cat([local, tokens.overall[:, 0]], dim=-1))
    return functional.mse_loss(predicted, rearrange(jaw, "b (t p) -> b t p", p=FRAMES_PER_LATENT)) / jaw.var()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.pretrain_audio", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of shards that training.prepare wrote")
    parser.add_argument("--out", type=Path, required=True, help="denoiser folder to write, for --start of stage 1")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default 400)")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    network = Network(configs.tiny())
    initialise(network, flags.seed)
    losses = train_encoder(network, read_clips(flags.data, "train"), flags.steps, flags.seed)
    save(flags.out, network.config.to_dict(), network)
    last = losses[-20:]
    print(f"explains {1 - sum(last) / len(last):.0%} of the jaw's variance; wrote {flags.out}")


if __name__ == "__main__":
    main()
