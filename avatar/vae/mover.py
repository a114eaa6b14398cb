"""The mover: it moves the picture of a reference, frame by frame, and encodes what it shows.

    reference latents --decode, once--> picture --flow and paint of each frame--> frames --encode--> latents

A flow moves what the picture shows, paint adds what it does not: the inside of a mouth, lids that close. A network that
begins from the result only has to correct it. Latents themselves can hardly be moved: detail in them does not survive
a move of a few pixels.

Source: flow by a few values of motion, as in the first order motion model (arXiv 2003.00196).

Axes: b batch, c latent channels, t latent frames, f pixel frames, m values, d width, h w height and width of latents,
H W of pictures.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from avatar.types import FACE_MOTION, FRAMES_PER_LATENT
from avatar.vae.light import LightCodec, LightConfig

# The values of a frame: its face motion, how far the mouth is open, and how far the brows are raised. Divisors that
# bring them to about one.
VALUE_SCALES = (1.0, 0.1, 0.15, 0.05, 0.15, 0.1, 0.1, 0.1)
NUM_VALUES = len(FACE_MOTION) + 2
WIDTH = 128
# Sides, in pixels, of the squares that have a flow and a paint of their own, and of those that features see.
FLOW_PIXELS, FEATURE_PIXELS = 4, 16
# A frame goes through the codec twice, in the reference and when it is shown; this much of the reference's detail, its
# difference from the mean of 3x3 pixels, is added to make up for the first time.
SHARPENING = 0.5


@lru_cache(maxsize=16)
def value_scales(device: torch.device) -> Tensor:
    """Return VALUE_SCALES (m,) on a device, where they stay."""
    return torch.tensor(VALUE_SCALES, device=device)


@dataclass(frozen=True, eq=False)
class Texture:
    """A reference as the mover reads it: its picture (b, 3, H, W) in [-1, 1], and features (b, d, H/16, W/16).

    In training the picture may be smaller than that of the features.
    """

    picture: Tensor
    features: Tensor


class Mover(nn.Module):
    """The mover of one codec's pictures. The codec's weights are frozen copies."""

    def __init__(self, config: LightConfig) -> None:
        super().__init__()
        self.codec = LightCodec(config).requires_grad_(False)
        self.enter = nn.ModuleList(
            nn.Conv2d(width, width_out, 4, 2, padding=1) for width, width_out in ((5, 32), (32, 64), (64, WIDTH))
        )
        self.middle = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.values = nn.Sequential(nn.Linear(NUM_VALUES, WIDTH), nn.GELU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.blocks = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.leave = nn.Conv2d(WIDTH, 5 * (FEATURE_PIXELS // FLOW_PIXELS) ** 2, 3, padding=1)

    def texture_numbers(self, height: int, width: int) -> int:
        """Return the numbers of a texture; height, width: of latents."""
        pixels = height * width * self.codec.space_stride**2
        return 3 * pixels + WIDTH * pixels // FEATURE_PIXELS**2

    @torch.no_grad()
    def read(self, reference: Tensor) -> Texture:
        """Decode reference latents (b, c, h, w) and read their picture, once for all frames."""
        still = repeat(reference, "b c h w -> b c t h w", t=2)
        picture = self.codec.decode(still, self.codec.new_state())[:, :, -1].clamp(-1, 1)
        around = functional.avg_pool2d(picture, 3, 1, padding=1, count_include_pad=False)
        return self.look((picture + SHARPENING * (picture - around)).clamp(-1, 1))

    def look(self, picture: Tensor) -> Texture:
        """Read a picture (b, 3, H, W)."""
        small = functional.avg_pool2d(picture, 2)
        rows, columns = (
            torch.linspace(-1, 1, side, device=small.device, dtype=small.dtype) for side in small.shape[-2:]
        )
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        x = torch.cat([small, places.expand(len(small), -1, -1, -1)], dim=1)
        for layer in self.enter:
            x = functional.gelu(layer(x))
        return Texture(picture, x + functional.gelu(self.middle(x)))

    @torch.no_grad()
    def forward(self, texture: Texture, values: Tensor) -> Tensor:
        """Return the latents (b, c, t, h, w) of frames with these values (b, m, f), f = 4 t.

        Each latent is encoded by itself, so that streams and whole clips have the same ones.
        """
        frames = rearrange(self.show(texture, values), "b c (t p) h w -> (b t) c p h w", p=FRAMES_PER_LATENT)
        return rearrange(self.codec.encode_steps(frames), "(b t) c 1 h w -> b c t h w", b=len(values))

    def show(self, texture: Texture, values: Tensor) -> Tensor:
        """Return the frames (b, 3, f, H, W) with these values (b, m, f), of the size of the texture's picture."""
        num_frames = values.shape[2]
        rows = rearrange(values, "b m f -> (b f) m") / value_scales(values.device)
        factors = rearrange(self.values(rows.to(texture.features.dtype)), "n (six d) -> six n d 1 1", six=6)
        x = functional.gelu(
            repeat(texture.features, "b d h w -> (b f) d h w", f=num_frames) * (1 + factors[0]) + factors[1]
        )
        for layer, scale, shift in zip(self.blocks, factors[2::2], factors[3::2], strict=True):
            x = x + functional.gelu(layer(x) * (1 + scale) + shift)
        fields = functional.pixel_shuffle(self.leave(x), FEATURE_PIXELS // FLOW_PIXELS).float()
        size = texture.picture.shape[-2:]
        fields = functional.interpolate(fields, size=size, mode="bilinear", align_corners=False)
        # Flow is in units of FEATURE_PIXELS; a picture is 2 wide and 2 high.
        flow = torch.stack([fields[:, axis] * (2 / x.shape[-1 - axis]) for axis in range(2)], dim=-1)
        still = functional.affine_grid(torch.eye(2, 3, device=x.device)[None], [1, 1, *size], align_corners=False)
        pictures = repeat(texture.picture.float(), "b c h w -> (b f) c h w", f=num_frames)
        grid = still + flow
        # Bilinear weights blur: with them frames had .58 of the squared edges of true ones, with these .64.
        moved = functional.grid_sample(pictures, grid, mode="bicubic", padding_mode="border", align_corners=False)
        return rearrange(moved + fields[:, 2:], "(b f) c h w -> b c f h w", f=num_frames)
