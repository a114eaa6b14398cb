"""Before stage 1, hear: `python -m training.pretrain_audio --data runs/latents --out runs/heard`.

The network's audio encoder learns to hear the mouth; stage 1 then begins with `--start runs/heard`.
Left to stage 1 alone, the encoder became a constant: at first its tokens say nothing that helps, and silencing what
varies in them lowers the loss before anything reads it. Here a linear map from its tokens to the opening of the jaw is
trained with it, for clips whose jaw is known, and then forgotten.

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
from avatar.denoiser import model
from avatar.denoiser.model import Network
from avatar.types import FRAMES_PER_LATENT
from training.data import StoredClip, read_clips

BATCH = 24
RATE = 2e-3
# Clips whose features the first convolution is centred on.
NUM_CENTRED = 64


def listen(network: Network, clips: Sequence[StoredClip], steps: int, seed: int) -> list[float]:
    """Train the audio encoder alone, in place; returns the loss of each step, as a share of the jaw's variance.

    ValueError if the jaw of no clip is known.
    """
    known = [clip for clip in clips if clip.has("jaw")]
    if not known:
        raise ValueError("no clip whose jaw is known; real video starts from a network that hears already")
    centre(network, known[:NUM_CENTRED])
    width = network.config.dim
    head = nn.Linear((network.config.num_audio_token + 1) * width, FRAMES_PER_LATENT)
    # From a head that says anything at first, the encoder would learn to be quiet before it learns to hear.
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    learning = [*network.casual_audio_encoder.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(learning, RATE, (0.9, 0.98), weight_decay=0.01)
    rng = np.random.default_rng(seed)
    losses = []
    for step in range(steps):
        chosen = [known[int(rng.integers(len(known)))] for _ in range(BATCH)]
        features = torch.stack([torch.from_numpy(np.array(clip.array("features"))).float() for clip in chosen])
        jaw = torch.stack([torch.from_numpy(np.array(clip.array("jaw"))) for clip in chosen])
        loss = heard_loss(network, head, features, jaw)
        torch.autograd.backward(loss)
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def centre(network: Network, clips: Sequence[StoredClip]) -> None:
    """Let the first convolutions answer to what varies in features: their mean is four times as large as that."""
    mean = torch.stack([torch.from_numpy(np.array(clip.array("features"), np.float32)).mean((0, 2)) for clip in clips])
    encoder = network.casual_audio_encoder.encoder
    for each in (encoder.conv1_local.conv, encoder.conv1_global.conv):
        assert each.bias is not None
        each.bias.copy_(-torch.einsum("o d k, d -> o", each.weight, mean.mean(0)))


def heard_loss(network: Network, head: nn.Linear, features: Tensor, jaw: Tensor) -> Tensor:
    """Squared error of the jaw that is read from tokens, by the jaw's variance. features (b, l, d, f), jaw (b, f)."""
    tokens = network.encode_audio(features[:, None])
    local = rearrange(tokens.local[:, 0, :, :-1], "b t n d -> b t (n d)")
    read = head(torch.cat([local, tokens.overall[:, 0]], dim=-1))
    return functional.mse_loss(read, rearrange(jaw, "b (t p) -> b t p", p=FRAMES_PER_LATENT)) / jaw.var()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.pretrain_audio", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of shards, as training.prepare makes it")
    parser.add_argument("--out", type=Path, required=True, help="denoiser folder to write: what stage 1 begins with")
    parser.add_argument("--steps", type=int, default=400, help="of the optimiser (default 400)")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    network = Network(configs.tiny())
    model.initialise(network, flags.seed)
    losses = listen(network, read_clips(flags.data, "train"), flags.steps, flags.seed)
    save(flags.out, network.config.to_dict(), network)
    last = losses[-20:]
    print(f"hears {1 - sum(last) / len(last):.0%} of the jaw's variance; wrote {flags.out}")


if __name__ == "__main__":
    main()
