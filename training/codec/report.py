"""Metrics and previews of a codec on held-out clips.

Axes: b batch, c channels, f frames, h w height and width.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avatar.vae.light import LightCodec
from avatar.vae.vae import to_bytes
from training.codec.crops import to_pixels
from training.data import StoredClip
from training.eval.contact_sheets import save_sheet
from training.eval.metrics import edge_energy, flicker, sharpness
from training.eval.psnr import mouth_boxes, psnr
from training.strategy import SINGLE

NUM_FRAMES = 33
NOISE = 0.1


@torch.no_grad()
def report(codec: LightCodec, clips: Sequence[StoredClip], sheet: Path | None = None) -> dict[str, float]:
    """Return metrics of reconstructions, and write a preview if `sheet` names a file.

    psnr, psnr_mouth, psnr_noisy: dB, of whole frames, of the box around the lips, and with noise on the latents.
    flicker, sharpness, edges: second differences in time, Laplacians and differences of neighbours, over the true
    frames'. latent_std: of all channels together, and its extremes.
    sheet: PNG of truth, reconstruction and four times the difference, of one frame per clip.
    """
    whole, mouth, noisy, latents = [], [], [], []
    details = np.zeros((3, 2))
    columns: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for clip in clips:
        frames = to_pixels(clip.frames(slice(NUM_FRAMES)))
        with SINGLE.autocast():
            latent = codec.encode(frames[None]).float()
            noise = torch.randn(latent.shape, generator=generator) * NOISE * latent.std()
            result, degraded = (
                codec.decode(value, codec.new_state())[0].float().clamp(-1, 1) for value in (latent, latent + noise)
            )
        error = (result - frames) ** 2
        whole.append(error.mean())
        if clip.has("lips"):
            mouth.append(mouth_boxes(error, clip.array("lips")[:NUM_FRAMES]).mean())
        noisy.append(((degraded - frames) ** 2).mean())
        shown = [to_bytes(each).numpy() for each in (result, frames)]
        details += [[metric(each) for each in shown] for metric in (flicker, sharpness, edge_energy)]
        latents.append(latent[0, :, 1:].flatten(1))
        if len(columns) < 10:
            middle = NUM_FRAMES // 2
            columns.append(torch.stack([frames[:, middle], result[:, middle], 4 * (result - frames)[:, middle]]))
    if sheet is not None:
        save_sheet(sheet, torch.stack(columns, 1).unbind(0))
    ratios = details[:, 0] / np.maximum(details[:, 1], 1e-9)
    deviations = torch.cat(latents, 1).std(1)
    return {
        "psnr": psnr(torch.stack(whole)),
        **({"psnr_mouth": psnr(torch.stack(mouth))} if mouth else {}),
        "psnr_noisy": psnr(torch.stack(noisy)),
        **dict(zip(("flicker", "sharpness", "edges"), ratios.tolist(), strict=True)),
        "latent_std": float(torch.cat(latents, 1).std()),
        "latent_std_least": float(deviations.min()),
        "latent_std_most": float(deviations.max()),
    }
