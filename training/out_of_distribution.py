"""Teach a checkpoint what its pictures are like.

    python -m training.out_of_distribution models/tiny/vae --data runs/data

Writes into the config of the vae's folder what the portraits of training clips have in common, so that a picture of
another kind gets a notice. To be called again when the codec has changed. `--show FILE ...` writes nothing and says
how far pictures are.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from avatar.checkpoints.files import write_config
from avatar.checkpoints.part import Part
from avatar.vae.out_of_distribution import LATENTS, OutOfDistributionCheck, picture_descriptor
from avatar.vae.vae import Vae, load
from training.data import read_clips

NOTICE = (
    "this model knows drawn people alone, such as those in assets/portraits, and this picture is unlike them; "
    "the video may be blurred, or show somebody else"
)
# Beyond the largest distance of the pictures that were measured, since others of their kind can be a little farther.
MARGIN = 1.02
# How much of the mean variance every direction has at least: in some hardly anything varies.
LEAST_SHARE = 1e-3
DIGITS = 4


def traits(vae: Vae[Any], rgb: Tensor) -> Tensor:
    """The traits (k,) of a picture (H, W, 3) uint8."""
    with torch.inference_mode():
        motion = vae.codec.encode(vae.still_clip(rgb, 1 + 4 * (LATENTS - 1)))[0]
    return picture_descriptor(vae.codec, rgb, motion)


def measured(each: Sequence[Tensor]) -> OutOfDistributionCheck:
    """What pictures of these traits have in common. ValueError if they are fewer than twice the traits."""
    together = torch.stack(list(each)).double()
    count, k = together.shape
    if count < 2 * k:
        raise ValueError(f"{count} pictures say too little of {k} traits, expected at least {2 * k}")
    covariance = torch.cov(together.T)
    covariance += LEAST_SHARE * covariance.diagonal().mean() * torch.eye(k)
    root = torch.linalg.inv(torch.linalg.cholesky(covariance))
    numbers = [[round(value, DIGITS) for value in values] for values in (together.mean(0).tolist(), triangle(root))]
    familiar = OutOfDistributionCheck(tuple(numbers[0]), tuple(numbers[1]), 0.0, NOTICE)
    return replace(familiar, limit=round(MARGIN * max(map(familiar.distance, each)), DIGITS))


def triangle(root: Tensor) -> list[float]:
    """The lower triangle of a matrix, row by row."""
    return [float(value) for value in root[*torch.tril_indices(len(root), len(root))]]


def portraits(vae: Vae[Any], data: Path, part: str, most: int) -> Iterable[Tensor]:
    """Traits of the portraits of at most so many clips, evenly over all."""
    clips = read_clips(data, part)
    chosen = clips[:: -(-len(clips) // most)]
    for clip in tqdm(chosen, f"portraits, {part}", unit="clip", mininterval=10):
        reference: NDArray[np.uint8] = np.array(clip.array("reference"))
        yield traits(vae, torch.from_numpy(reference))


def summary(name: str, distances: Sequence[float], limit: float) -> str:
    beyond = sum(distance > limit for distance in distances)
    middle, farthest = np.median(distances), max(distances)
    return f"{name}: {beyond} of {len(distances)} beyond {limit}, median {middle:.2f}, farthest {farthest:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.out_of_distribution", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("vae", type=Path, help="a checkpoint's vae folder")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="shards, as training.make_data makes them")
    parser.add_argument("--clips", type=int, default=500, help="the most training clips to look at (default 500)")
    parser.add_argument("--show", type=Path, nargs="+", help="write nothing: say how far these pictures are")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    part = Part.read(flags.vae)
    vae = load(part)
    if flags.show:
        familiar = vae.config.familiar
        if familiar is None:
            parser.error(f"{flags.vae} does not say what its pictures are like")
        for path in flags.show:
            distance = familiar.distance(traits(vae, vae.read_picture(path.read_bytes())))
            print(f"{distance:6.2f}  {'unlike' if distance > familiar.limit else 'like  '}  {path}")
        return
    each = list(portraits(vae, flags.data, "train", flags.clips))
    familiar = measured(each)
    print(summary("training", [familiar.distance(one) for one in each], familiar.limit))
    held_out = [familiar.distance(one) for one in portraits(vae, flags.data, "held_out", flags.clips)]
    print(summary("held out", held_out, familiar.limit))
    write_config(flags.vae, {**part.config, "familiar": asdict(familiar)})


if __name__ == "__main__":
    main()
