"""Goldens of pictures and of the Wan codec."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from avatar.checkpoints.layouts import VAE_FILE, open_part
from avatar.types import BLOCK_LATENTS, MOTION_LATENTS, Block, Session
from avatar.vae.codec import State
from avatar.vae.picture.reading import read_picture, to_pixels
from avatar.vae.picture.rule import PictureRule, size_within
from avatar.vae.vae import HIDDEN_FRAMES, WARMUP_LATENTS, Vae, VaeState, load
from avatar.vae.wan import Slots
from tests.parity.goldens import Golden, Report, published


def wan_vae(config: Mapping[str, Any], weights: Mapping[str, Tensor], **tables: Any) -> Vae[Slots]:
    """The Wan VAE of a golden, from the published layout's file.

    config: fields of the reference's codec, as goldens record them. weights: under the reference's names.
    tables: latents_mean and latents_std, where the golden has its own.
    """
    sizes = {name: config[name] for name in ("z_dim", "dim_mult", "num_res_blocks", "temperal_downsample")}
    with published() as checkpoint:
        torch.save(dict(weights), checkpoint / VAE_FILE)
        part = open_part(checkpoint, "vae")
        assert part.config["network"] == {"base_dim": config["dim"]}
        network = {**part.config["network"], **{name: tuple_of(value) for name, value in {**sizes, **tables}.items()}}
        return load(replace(part, config={**part.config, "network": network}))


def frames_of(vae: Vae[State], block: Block, state: VaeState[State]) -> Tensor:
    """A block's frames (3, f, H, W) in [-1, 1]."""
    return torch.cat([vae.frames(latent, state) for latent in vae.latent_frames(block)], dim=1)


def tuple_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def image_prep(golden: Golden, report: Report) -> None:
    bytes_off = golden.info["tolerance_u8"]
    for case in golden.info["cases"]:
        of = {key.split("/")[1]: value for key, value in golden.tensors.items() if key.startswith(f"{case['name']}/")}
        rgb = read_picture(of["png"].numpy().tobytes(), PictureRule("reference", area=case["max_area"])).rgb
        report.compare(f"{case['name']}/rgb_u8", rgb.permute(2, 0, 1), of["rgb_u8"], max_abs=bytes_off)
        pixels = to_pixels(rgb)
        height, width = of["pixels_corner"].shape[1:]
        report.compare(
            f"{case['name']}/corner", pixels[:, :height, :width], of["pixels_corner"], max_abs=2 * bytes_off / 255
        )
        height, width = of["pixels_center"].shape[1:]
        top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
        centre = pixels[:, top : top + height, left : left + width]
        report.compare(f"{case['name']}/center", centre, of["pixels_center"], max_abs=2 * bytes_off / 255)
    rows = golden.info["size_table"]
    chosen = [size_within((in_w, in_h), area) for in_h, in_w, area, _, _ in rows]
    report.exact("size_table", chosen, [(out_w, out_h) for *_, out_h, out_w in rows])


def wan_vae_tiny(golden: Golden, report: Report) -> None:
    info, tensors = golden.info, golden.tensors
    prefix = info["weight_prefix"]
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    vae = wan_vae(info["config"], weights, latents_mean=info["mean"], latents_std=info["std"])
    codec, tolerance = vae.codec, info["tolerance"]
    video = tensors["enc/video"]
    inputs = {
        "latent": video,
        "latent_8frames": video[:, :, :8],
        "latent_5x_first_frame": video[:, :, :1].expand(-1, -1, 5, -1, -1),
        "latent_first_frame_only": video[:, :, :1],
    }
    latents = tensors["dec/latent"]
    warm, *blocks = torch.split(latents, [WARMUP_LATENTS] + [BLOCK_LATENTS] * info["blocks"], dim=2)
    with torch.inference_mode():
        for name, frames in inputs.items():
            report.compare(f"enc/{name}", codec.encode(frames), tensors[f"enc/{name}"], max_abs=tolerance)
        full = codec.decode(latents, codec.new_state()).clamp(-1, 1)
        report.compare("dec/full", full, tensors["dec/full"], max_abs=tolerance)
        cold = codec.decode(blocks[0], codec.new_state()).clamp(-1, 1)
        report.compare("no_warmup", cold, tensors["stream/no_warmup_block0_raw"], max_abs=tolerance)
        warmed = codec.decode(warm, codec.new_state()).clamp(-1, 1)
        report.compare("warmup_out", warmed, tensors["stream/warmup_out"], max_abs=tolerance)

    # As a session does it. Only the first motion latents are decoded, the others may be anything.
    motion = functional.pad(warm[0], (0, 0, 0, 0, 0, MOTION_LATENTS - WARMUP_LATENTS))
    state = vae.open(Session(id="golden", seed=0, motion=motion))
    for index, latent in enumerate(blocks):
        shown = frames_of(vae, Block(index, features=torch.empty(0), latent=latent[0]), state)[None]
        report.compare(f"block{index}_emitted", shown, tensors[f"stream/block{index}_emitted"], max_abs=tolerance)
        raw = tensors[f"stream/block{index}_raw"]
        report.compare(f"block{index}_raw", shown, raw[:, :, HIDDEN_FRAMES if index == 0 else 0 :], max_abs=tolerance)
    shapes = [list(slot.shape) if isinstance(slot, Tensor) else None for slot in state.decoder]
    report.exact("warm", WARMUP_LATENTS, info["warm"])
    report.exact("cache shapes", shapes, info["feat_cache_shapes_after_blocks"])
    for i, slot in enumerate(state.decoder):
        name = f"stream/final_cache/{i}"
        if name in tensors and isinstance(slot, Tensor):
            report.compare(name, slot, tensors[name], max_abs=tolerance)


RUNNERS: dict[str, Callable[[Golden, Report], None]] = {"image_prep": image_prep, "wan_vae_tiny": wan_vae_tiny}
