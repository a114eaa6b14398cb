"""Fit a checkpoint's out-of-distribution check.

    python -m training.out_of_distribution models/tiny/vae --data runs/data

Fits the distribution of the portraits of training clips and writes it into the config of the vae folder, so that a
picture outside it gets a notice. Run it again when the codec has changed. `--show FILE ...` only prints distances.
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

from avatar.checkpoints.files import CONFIG, write_json
from avatar.checkpoints.part import Part
from avatar.vae.out_of_distribution import LATENTS, OutOfDistributionCheck, picture_descriptor
from avatar.vae.vae import Vae, load
from training.data import read_clips

NOTICE = (
    "This model was trained on drawn people only, such as those in assets/portraits; this picture differs from them, "
    "so the video may be blurred or show another person."
)
# The limit over the largest measured distance, because other pictures in distribution can be a little farther.
MARGIN = 1.02
# Variance that is added to every direction, relative to the mean variance: some directions hardly vary.
REGULARISATION = 1e-3
DIGITS = 4


def descriptor(vae: Vae[Any], rgb: Tensor) -> Tensor:
    """Return the descriptor (k,) of a picture (H, W, 3) uint8."""
    with torch.inference_mode():
        motion = vae.codec.encode(vae.still_clip(rgb, 1 + 4 * (LATENTS - 1)))[0]
    return picture_descriptor(vae.codec, rgb, motion)


def fit_check(descriptors: Sequence[Tensor]) -> OutOfDistributionCheck:
    """Fit the check to descriptors (k,). ValueError with fewer than 2 k of them."""
    stacked = torch.stack(list(descriptors)).double()
    count, k = stacked.shape
    if count < 2 * k:
        raise ValueError(f"{count} pictures are too few for {k} components, expected at least {2 * k}")
    covariance = torch.cov(stacked.T)
    covariance += REGULARISATION * covariance.diagonal().mean() * torch.eye(k)
    root = torch.linalg.inv(torch.linalg.cholesky(covariance))
    mean, triangle = (
        tuple(round(value, DIGITS) for value in values) for values in (stacked.mean(0).tolist(), lower_triangle(root))
    )
    check = OutOfDistributionCheck(mean, triangle, 0.0, NOTICE)
    return replace(check, limit=round(MARGIN * max(map(check.distance, descriptors)), DIGITS))


def lower_triangle(matrix: Tensor) -> list[float]:
    """Return the lower triangle of a matrix, row by row."""
    return [float(value) for value in matrix[*torch.tril_indices(len(matrix), len(matrix))]]


def portrait_descriptors(vae: Vae[Any], data: Path, split: str, max_clips: int) -> Iterable[Tensor]:
    """Yield the descriptors of the portraits of at most `max_clips` clips, evenly spaced."""
    clips = read_clips(data, split)
    selected = clips[:: -(-len(clips) // max_clips)]
    for clip in tqdm(selected, f"portraits, {split}", unit="clip", mininterval=10):
        reference: NDArray[np.uint8] = np.array(clip.array("reference"))
        yield descriptor(vae, torch.from_numpy(reference))


def summary(name: str, distances: Sequence[float], limit: float) -> str:
    beyond = sum(distance > limit for distance in distances)
    median, largest = np.median(distances), max(distances)
    return f"{name}: {beyond} of {len(distances)} beyond {limit}, median {median:.2f}, largest {largest:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.out_of_distribution", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("vae", type=Path, help="vae folder of a checkpoint")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="shards that training.make_data wrote")
    parser.add_argument("--clips", type=int, default=500, help="maximum number of clips per split (default 500)")
    parser.add_argument("--show", type=Path, nargs="+", help="write nothing: print the distances of these pictures")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    part = Part.read(flags.vae)
    vae = load(part)
    if flags.show:
        check = vae.config.familiar
        if check is None:
            parser.error(f"{flags.vae} has no out-of-distribution check")
        for path in flags.show:
            distance = check.distance(descriptor(vae, vae.read_picture(path.read_bytes()).rgb))
            print(f"{distance:6.2f}  {'outside' if distance > check.limit else 'inside '}  {path}")
        return
    training = list(portrait_descriptors(vae, flags.data, "train", flags.clips))
    check = fit_check(training)
    print(summary("training", [check.distance(each) for each in training], check.limit))
    held_out = [check.distance(each) for each in portrait_descriptors(vae, flags.data, "held_out", flags.clips)]
    print(summary("held out", held_out, check.limit))
    write_json(flags.vae / CONFIG, {**part.config, "familiar": asdict(check)})


if __name__ == "__main__":
    main()
