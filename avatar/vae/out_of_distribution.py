"""The out-of-distribution check: detect pictures unlike those that a checkpoint was trained on.

A picture's descriptor is the log of the codec's reconstruction error in each cell of a 4x4 grid, and the log energy of
each latent channel. The check is a Mahalanobis distance from the descriptors of the training pictures;
`training.out_of_distribution` measures their mean and covariance.

Axes: c channels, t latent frames, f pixel frames, h w height and width of latents, H W of pictures, k components of a
descriptor.
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import reduce
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from avatar.checkpoints.fields import check_ranges
from avatar.vae.codec import Codec
from avatar.vae.picture.reading import to_pixels

# Rows and columns of the grid of reconstruction errors.
GRID_CELLS = 4
# Latents that are used: the second is the first that stands for four frames, as all later ones do.
LATENTS = 2
# Floors under the logarithms: of a squared error of values in [-1, 1], and of a squared latent.
ERROR_FLOOR, LATENT_FLOOR = 1e-8, 1e-4


@dataclass(frozen=True)
class OutOfDistributionCheck:
    """The distribution of a checkpoint's training pictures, under the names in the checkpoint's config.json.

    mean: (k,) of their descriptors.
    root: the whitening matrix of their descriptors, lower triangle row by row: root times a deviation from the mean has
        independent components of variance 1.
    limit: a picture at a greater distance is out of distribution; training pictures are at about 1.
    notice: the message to the client about such a picture.
    """

    mean: tuple[float, ...]
    root: tuple[float, ...]
    limit: float
    notice: str

    def __post_init__(self) -> None:
        check_ranges(vars(self), {"limit": (0.0, 1e6)}, "familiar.")
        k = len(self.mean)
        if len(self.root) != k * (k + 1) // 2:
            expected = f"{k * (k + 1) // 2} numbers for the {k} of mean"
            raise ValueError(f"familiar.root must have {expected}, got {len(self.root)}")

    def check_fits(self, num_channels: int) -> None:
        """Raise ValueError unless descriptors have as many components as the mean. num_channels: of latents."""
        if len(self.mean) != (expected := GRID_CELLS**2 + num_channels):
            raise ValueError(f"familiar.mean must have {expected} numbers, got {len(self.mean)}")

    def distance(self, descriptor: Tensor) -> float:
        """Return the Mahalanobis distance of a descriptor (k,) from the mean, divided by sqrt(k)."""
        k = len(self.mean)
        root = torch.zeros(k, k, dtype=torch.float64)
        root[*torch.tril_indices(k, k)] = torch.tensor(self.root, dtype=torch.float64)
        deviations = root @ (descriptor.double() - torch.tensor(self.mean, dtype=torch.float64))
        return float(deviations.pow(2).mean().sqrt())


def picture_descriptor(codec: Codec[Any], rgb: Tensor, motion: Tensor) -> Tensor:
    """Return the descriptor (k,) float32 of a picture (H, W, 3) uint8; motion: its motion latents (c, t, h, w)."""
    motion = motion[:, :LATENTS]
    with torch.inference_mode():
        frames = codec.decode(motion[None], codec.new_state())[0].float().clamp(-1, 1).cpu()
    error = reduce((frames - to_pixels(rgb.cpu()).unsqueeze(1)) ** 2, "c f h w -> 1 h w", "mean")
    errors = adaptive_avg_pool2d(error, GRID_CELLS).flatten()
    energies = reduce(motion[:, -1].float().cpu() ** 2, "c h w -> c", "mean")
    return torch.cat([torch.log(errors + ERROR_FLOOR), torch.log(energies + LATENT_FLOOR)])
