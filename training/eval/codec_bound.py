"""Metrics of the codec alone, on true frames: an upper bound for any network that generates its latents.

Axes: f pixel frames, H W height and width of frames.
"""

from collections.abc import Sequence

import torch
from einops import rearrange, reduce

from avatar.types import FRAMES_PER_LATENT
from training.codec.crops import to_pixels
from training.data import StoredClip
from training.eval.inference import Models, until
from training.eval.metrics import (
    Metric,
    correlation,
    edge_energy,
    flicker,
    mean_metric,
    ratio_metric,
    sharpness,
    speaks,
)
from training.eval.psnr import mouth_boxes, psnr
from training.eval.readers.landmarks import Landmarks, mouth_opening


def codec_metrics(
    models: Models, clips: Sequence[StoredClip], landmarks: Landmarks | None, deadline: float
) -> dict[str, Metric]:
    """Return PSNR of whole frames and around the lips, lip sync, mouth amplitude, edge energy, sharpness and flicker.

    deadline: seconds of time.monotonic; after it no clip is started, except the first three.
    """
    whole, mouth, edges, sharp, flickers, openings, correlations = [], [], [], [], [], [], []
    for clip in until(clips, deadline):
        count = 1 + (clip.num_frames - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
        truth = clip.frames(slice(count))
        pixels = to_pixels(truth)
        codec = models.vae.codec
        with torch.inference_mode():
            decoded = codec.decode(codec.encode(pixels[None]), codec.new_state())[0].float().clamp(-1, 1)
        error = (decoded - pixels) ** 2
        whole.append(reduce(error, "c f h w -> 1", "mean"))
        if clip.has("lips"):
            mouth.append(reduce(mouth_boxes(error, clip.array("lips")[:count]), "f c h w -> 1", "mean"))
        decoded_frames = rearrange(((decoded + 1) * 127.5).to(torch.uint8), "c f h w -> f h w c").numpy()
        edges.append((edge_energy(decoded_frames), edge_energy(truth)))
        sharp.append((sharpness(decoded_frames), sharpness(truth)))
        flickers.append((flicker(decoded_frames), flicker(truth)))
        if landmarks is not None:
            ours, theirs = (mouth_opening(landmarks.points(frames)) for frames in (decoded_frames, truth))
            openings.append((float(ours.std()), float(theirs.std())))
            jaw = clip.array("jaw")[:count] if clip.has("jaw") else theirs
            correlations += [correlation(ours, jaw)] if speaks(jaw) else []
    unread = Metric(None, "no landmarks")
    return {
        "codec_psnr": Metric(psnr(torch.cat(whole))),
        "codec_psnr_mouth": Metric(psnr(torch.cat(mouth))) if mouth else Metric(None, "no lip positions"),
        "codec_lip_sync_r": mean_metric(correlations) if correlations else unread,
        "codec_mouth_amplitude": ratio_metric(openings) if openings else unread,
        "codec_edge_energy": ratio_metric(edges),
        "codec_sharpness": ratio_metric(sharp),
        "codec_flicker": ratio_metric(flickers),
    }
