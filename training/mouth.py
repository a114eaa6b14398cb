"""Scale how far a network's mover opens mouths: `python -m training.mouth DENOISER GAIN`.

A mover learns from absolute errors, so it opens mouths less far than the truth. The gain multiplies the opening that it
is given; `mouth amplitude` of training.evaluate is 1 where it is right. Gains of several calls multiply.
"""

import argparse
from pathlib import Path

import torch

from avatar.checkpoints.files import save
from avatar.checkpoints.part import Part
from avatar.denoiser.model import load


def scale_mouth(folder: Path, gain: float) -> None:
    """Scale the mouth of the network in a denoiser folder, in place. ValueError if it has no mover."""
    network = load(Part.read(folder))
    if not network.config.mover:
        raise ValueError(f"the network in {folder} has no mover, so nothing can be scaled")
    with torch.no_grad():
        network.mouth.weight.mul_(gain)
        network.mouth.bias.mul_(gain)
    save(folder, network.config.to_dict(), network, torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.mouth", description=(__doc__ or "").split(":")[0])
    parser.add_argument("denoiser", type=Path, help="denoiser folder of a checkpoint; it is written again")
    parser.add_argument("gain", type=float, help="factor on the opening, such as 1.3")
    flags = parser.parse_args()
    scale_mouth(flags.denoiser, flags.gain)


if __name__ == "__main__":
    main()
