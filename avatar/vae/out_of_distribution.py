"""Whether a picture is like those that a checkpoint was trained on.

A picture's traits are what its codec loses of it in each field, and how much each latent channel holds. Pictures of one
kind lie close together there, by a distance that knows how traits go together; `training.out_of_distribution`
measures the kind.

Axes: c channels, t latent frames, f pixel frames, h w height and width of latents, H W of pictures, k traits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import reduce
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from avatar.vae.codec import Codec
from avatar.vae.picture import to_pixels

# Rows and columns of fields.
FIELDS = 4
# Latents that are looked at: the second is the first that stands for as many frames as all others.
LATENTS = 2
# Below these, less is not told from nothing: of an error of values in [-1, 1] and of a latent, squared.
LEAST_ERROR, LEAST_LATENT = 1e-8, 1e-4


@dataclass(frozen=True)
class OutOfDistributionCheck:
    """What pictures of one kind have in common.

    mean: (k,) of their traits. root: the lower triangle, row by row, of the matrix that makes their traits' deviations
    independent and of variance 1. limit: the distance beyond which a picture is unlike them; their own is about 1.
    notice: what a client is told of such a picture.
    """

    mean: tuple[float, ...]
    root: tuple[float, ...]
    limit: float
    notice: str

    def __post_init__(self) -> None:
        k = len(self.mean)
        if len(self.root) != k * (k + 1) // 2:
            raise ValueError(f"a triangle of {k} rows has {k * (k + 1) // 2} numbers, got {len(self.root)}")

    def distance(self, traits: Tensor) -> float:
        """How far traits (k,) are from the mean: the root mean square of their independent deviations."""
        k = len(self.mean)
        root = torch.zeros(k, k, dtype=torch.float64)
        root[*torch.tril_indices(k, k)] = torch.tensor(self.root, dtype=torch.float64)
        deviations = root @ (traits.double() - torch.tensor(self.mean, dtype=torch.float64))
        return float(deviations.pow(2).mean().sqrt())


def picture_descriptor(codec: Codec[Any], rgb: Tensor, motion: Tensor) -> Tensor:
    """The traits (k,) float32 of a picture (H, W, 3) uint8, whose motion latents (c, t, h, w) the codec has made."""
    motion = motion[:, :LATENTS]
    with torch.inference_mode():
        frames = codec.decode(motion[None], codec.fresh())[0].float().clamp(-1, 1).cpu()
    error = reduce((frames - to_pixels(rgb.cpu()).unsqueeze(1)) ** 2, "c f h w -> 1 h w", "mean")
    fields = adaptive_avg_pool2d(error, FIELDS).flatten()
    held = reduce(motion[:, -1].float().cpu() ** 2, "c h w -> c", "mean")
    return torch.cat([torch.log(fields + LEAST_ERROR), torch.log(held + LEAST_LATENT)])
