"""Weights to start from: `python -m training.initialise FOLDER [--seed N]` writes FOLDER/denoiser and FOLDER/vae.

Until the embedded default is trained this is what the demo shows: a codec that keeps a picture's low frequencies, and a
network whose output is the still reference whatever is said. The audio encoder is trained and is not touched.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from avatar import checkpoint
from avatar.denoiser import config as denoiser_config
from avatar.denoiser import model
from avatar.vae import light, vae


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.initialise", description=(__doc__ or "").split(":")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    initialise(flags.folder, flags.seed)
    print(f"wrote untrained weights to {flags.folder}: the picture means nothing yet")


def initialise(folder: Path, seed: int) -> None:
    """Write the tiny network and codec with weights that the seed decides, in float16 as the trained ones will be."""
    network_config = denoiser_config.tiny()
    network = model.Network(network_config)
    model.initialise(network, seed)
    checkpoint.save(folder / "denoiser", network_config.to_dict(), network, torch.float16)
    codec = light.initialise(light.tiny(), seed)
    checkpoint.save(folder / "vae", asdict(vae.tiny()), codec, torch.float16)


if __name__ == "__main__":
    main()
