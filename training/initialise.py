"""Weights to start from: `python -m training.initialise FOLDER [--seed N]` writes FOLDER/denoiser.

Until the embedded default's network is trained this is what the demo shows: a network whose output is the still
reference whatever is said. Audio encoder and codec are trained and are not touched.
"""

import argparse
from pathlib import Path

import torch

from avatar import checkpoint
from avatar.denoiser import config, model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.initialise", description=(__doc__ or "").split(":")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    network = model.Network(config.tiny())
    model.initialise(network, flags.seed)
    # In float16, as the trained ones will be.
    checkpoint.save(flags.folder / "denoiser", config.tiny().to_dict(), network, torch.float16)
    print(f"wrote untrained weights to {flags.folder / 'denoiser'}: the picture means nothing yet")


if __name__ == "__main__":
    main()
