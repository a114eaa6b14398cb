"""What the codec alone makes of the truth: the most that a network of latents can reach.

Axes: f pixel frames, H W height and width of frames.
"""

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange, reduce

from avatar.types import FRAMES_PER_LATENT
from training.codec.crops import to_pixels
from training.codec.report import mouth_boxes, psnr
from training.data import StoredClip
from training.eval.inference import Models, until
from training.eval.landmarks import Landmarks, mouth_opening
from training.eval.metrics import Figure, correlation, edge_energy, flicker, mean_figure, ratio_figure


def codec_figures(
    models: Models, clips: Sequence[StoredClip], landmarks: Landmarks | None, deadline: float
) -> dict[str, Figure]:
    """PSNR of whole frames and round the lips, what is left of the mouth and of edges, and what flickers.

    deadline: no clip but the first three is begun after it, seconds of time.monotonic.
    """
    whole, mouth, edges, flickers, openings, agreements = [], [], [], [], [], []
    for clip in until(clips, deadline):
        count = 1 + (len(clip.array("frames")) - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
        truth = np.array(clip.array("frames")[:count])
        pixels = to_pixels(truth)
        codec = models.vae.codec
        with torch.inference_mode():
            decoded = codec.decode(codec.encode(pixels[None]), codec.new_state())[0].float().clamp(-1, 1)
        error = (decoded - pixels) ** 2
        whole.append(reduce(error, "c f h w -> 1", "mean"))
        if clip.has("lips"):
            mouth.append(reduce(mouth_boxes(error, clip.array("lips")[:count]), "f c h w -> 1", "mean"))
        shown = rearrange(((decoded + 1) * 127.5).to(torch.uint8), "c f h w -> f h w c").numpy()
        edges.append((edge_energy(shown), edge_energy(truth)))
        flickers.append((flicker(shown), flicker(truth)))
        if landmarks is not None:
            ours, theirs = (mouth_opening(landmarks.points(frames)) for frames in (shown, truth))
            openings.append((float(ours.std()), float(theirs.std())))
            agreements.append(correlation(ours, clip.array("jaw")[:count] if clip.has("jaw") else theirs))
    unread = Figure(None, "no landmarks")
    return {
        "codec_psnr": Figure(psnr(torch.cat(whole))),
        "codec_psnr_mouth": Figure(psnr(torch.cat(mouth))) if mouth else Figure(None, "the clips have no lips' places"),
        "codec_lip_sync_r": mean_figure(agreements) if agreements else unread,
        "codec_mouth_amplitude": ratio_figure(openings) if openings else unread,
        "codec_edge_energy": ratio_figure(edges),
        "codec_flicker": ratio_figure(flickers),
    }
