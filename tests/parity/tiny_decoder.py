"""Goldens of the tiny decoder, opened from files in the published layout."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar.checkpoints.decoders import open_decoder
from avatar.checkpoints.part import load_weights
from avatar.vae.tiny_decoder import TinyDecoder, TinyDecoderCodec, TinyDecoderConfig
from avatar.vae.wan import WanCodec, WanConfig
from tests.parity.checkpoint import under
from tests.parity.goldens import Golden, Report


def taehv(golden: Golden, report: Report) -> None:
    """Every case whole and streamed; the layers and the memory of one; and one with latents that are scaled first."""
    tensors = golden.tensors
    with TemporaryDirectory() as name:
        weights = {key: value.half() for key, value in under(tensors, golden.info["weight_prefix"]).items()}
        normalised, raw = Path(name) / "taew2_1.safetensors", Path(name) / "lighttaew2_1.pth"
        save_file(weights, normalised)
        encoder = {key: torch.zeros(shape).half() for key, shape in golden.info["encoder_shapes"].items()}
        torch.save({**encoder, **weights}, raw)
        codecs = {path: codec_of(path, golden.info) for path in (normalised, raw)}
    limits = golden.info["tolerance"]
    with torch.inference_mode():
        for case in golden.info["cases"]:
            of = under(tensors, f"{case}/")
            if "frames" in of:
                codec = codecs[raw]
                shown = codec.decode(of["latents"], codec.new_state()).clamp(-1, 1)
                report.compare(f"{case}/frames", shown, of["frames"], **limits["raw_latents/frames"])
            else:
                check_case(codecs[normalised], case, of, golden.info, report)


def check_case(codec: TinyDecoderCodec, case: str, of: dict[str, Tensor], info: dict[str, Any], report: Report) -> None:
    frame_limits, memory_limits = info["tolerance"]["whole, streamed, raw"], info["tolerance"]["memory"]
    left: dict[int, list[Tensor]] = {}  # what leaves each layer, step by step
    hooks = [
        layer.register_forward_hook(lambda _, __, output, i=i: left.setdefault(i, []).append(output))
        for i, layer in enumerate(codec.decoder.decoder)
    ]
    state = codec.new_state()
    whole = codec.decode(of["latents"], state)
    for hook in hooks:
        hook.remove()
    report.compare(f"{case}/whole", as_published(whole), of["whole"], **frame_limits)
    streaming = codec.new_state()
    streamed = torch.cat([codec.decode(each, streaming) for each in torch.split(of["latents"], 1, dim=2)], dim=2)
    report.exact(f"{case}: streamed equals whole", streamed, whole)
    report.compare(f"{case}/streamed", as_published(streamed), of["streamed"], **frame_limits)
    for name, memory in under(of, "memory/").items():
        kept = rearrange(state._last[int(name)], "b 1 h w c -> b c h w")
        report.compare(f"{case}/memory/{name}", kept, memory, **memory_limits)
    if "raw" not in of:
        return
    outputs = {i: rearrange(torch.cat(steps, dim=1), "b t h w c -> b c t h w") for i, steps in left.items()}
    report.compare(f"{case}/raw", outputs[len(outputs) - 1], of["raw"], **frame_limits)
    for name, layer in info["trace"].items():
        if isinstance(codec.decoder.decoder[int(name)], nn.Identity):
            continue  # where the published decoder enlarges; ours does so in the next layer
        output = outputs[int(name)][0]
        report.exact(f"{case}/trace/{name}: shape", list(output.shape), layer["shape"])
        values = output.flatten()[layer["flat_index"]]
        report.compare(f"{case}/trace/{name}", values, torch.tensor(layer["values"]), **memory_limits)


def codec_of(path: Path, info: dict[str, Any]) -> TinyDecoderCodec:
    """The decoder of a file, beside a VAE of the recorded mean and deviation whose encoder is not used."""
    part, decoder = open_decoder(path), TinyDecoder()
    load_weights(decoder, part)
    config = WanConfig(base_dim=4, latents_mean=tuple(info["mean"]), latents_std=tuple(info["std"]))
    wan = WanCodec(config, encodes_only=True)
    return TinyDecoderCodec(wan, decoder.requires_grad_(False), part.parse(TinyDecoderConfig))


def as_published(frames: Tensor) -> Tensor:
    """Frames in [-1, 1] as the published code has them, clamped to [0, 1]."""
    return ((frames + 1) / 2).clamp(0, 1)


RUNNERS: dict[str, Callable[[Golden, Report], None]] = {"taehv": taehv}
