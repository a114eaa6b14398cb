"""What a checkpoint is, without loading it, and its copy in our layout.

python -m avatar inspect CHECKPOINT [--adapter FILE] [--size WxH] [--dtype TYPE]
python -m avatar pack CHECKPOINT OUT [--adapter FILE] [--dtype TYPE]
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avatar.audio import model as audio_model
from avatar.checkpoints.files import TOKENIZER, save_shards
from avatar.checkpoints.layouts import is_published, open_part, parts_of
from avatar.checkpoints.lora import ALPHA, LoraAdapter
from avatar.checkpoints.part import MERGED, Part
from avatar.denoiser import model as denoiser_model
from avatar.denoiser.cache import KVCache
from avatar.denoiser.config import NetworkConfig
from avatar.text import model as text_model
from avatar.vae import vae as vae_model
from avatar.vae.picture import PictureRule, Size
from avatar.vae.vae import Vae

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A picture whose video has the shape of a screen.
WIDE = (1920, 1080)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m avatar")
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser("inspect", help="say what a checkpoint is and whether all of it is there")
    inspecting.add_argument("--size", type=read_size, metavar="WxH", help="picture size that memory is given for")
    inspecting.add_argument("--dtype", choices=DTYPES, help="type that the network is served in (default: as stored)")
    packing = commands.add_parser("pack", help="write a checkpoint in our layout, merged with its adapter")
    packing.add_argument("--dtype", choices=DTYPES, help="type of all weights (default: as stored)")
    for each in (inspecting, packing):
        each.add_argument("checkpoint", type=Path, help="folder, in our layout or as it is published")
        each.add_argument("--adapter", type=Path, help="file of an adapter to merge into the network's weights")
        each.add_argument("--adapter-alpha", type=float, default=ALPHA, help=f"what it was trained with ({ALPHA:g})")
    packing.add_argument("out", type=Path, help="folder to write; it must not be there yet")
    flags = parser.parse_args(arguments)
    adapter = LoraAdapter(flags.adapter, flags.adapter_alpha) if flags.adapter else None
    dtype = DTYPES.get(flags.dtype)
    try:
        if flags.command == "inspect":
            print(*inspect(flags.checkpoint, adapter, flags.size, dtype), sep="\n")
        else:
            pack(flags.checkpoint, flags.out, adapter, dtype)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def read_size(text: str) -> Size:
    """A size written as `704x384`."""
    try:
        width, height = map(int, text.split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, expected WIDTHxHEIGHT") from error
    return width, height


@dataclass(frozen=True)
class Models:
    """A checkpoint's models on the meta device: all sizes, no weights."""

    audio: audio_model.AudioModel
    network: denoiser_model.Network
    config: NetworkConfig
    vae: Vae[Any]
    text: text_model.TextEncoder | None = None


def outline(parts: dict[str, Part], dtype: torch.dtype) -> Models:
    """The models that the parts make. ValueError if a name or a shape is wrong, or the models do not fit each other."""
    audio = audio_model.load(parts["audio"], device="meta")
    network, config = denoiser_model.load(parts["denoiser"], dtype=dtype, device="meta")
    vae = vae_model.load(parts["vae"], device="meta")
    heard, made = (config.num_encoder_layers, config.audio_dim), (audio.encoder.num_states, audio.encoder.width)
    if heard != made:
        raise ValueError(f"the network hears {heard} (layers, width) of sound, the audio encoder makes {made}")
    if vae.codec.channels != config.in_dim:
        raise ValueError(f"the network has latents of {config.in_dim} channels, the VAE of {vae.codec.channels}")
    text = text_model.load(parts["text"], device="meta") if "text" in parts else None
    if text is not None and (text.width != config.text_dim or text.config.max_tokens > config.text_len):
        raise ValueError(
            f"the network reads {config.text_len} rows of text of width {config.text_dim}, the text encoder makes"
            f" {text.config.max_tokens} of width {text.width}"
        )
    return Models(audio, network, config, vae, text)


def inspect(
    checkpoint: Path, adapter: LoraAdapter | None = None, size: Size | None = None, dtype: torch.dtype | None = None
) -> Iterator[str]:
    """Lines that say what a checkpoint is. ValueError if a name or a shape in it is not what it should be.

    size: of the picture that a session's memory is given for; None for what a wide picture gets.
    dtype: that the network is served in; None for the one that most of it is stored in.
    """
    parts = {name: open_part(checkpoint, name, adapter) for name in parts_of(checkpoint)}
    stored = {name: part.outline() for name, part in parts.items()}
    models = outline(parts, dtype or most(stored["denoiser"]))
    config, picture = models.config, models.vae.config.picture
    layout = "as published" if is_published(checkpoint) else "in our layout"
    yield f"{checkpoint}: {layout}, every name and shape in place"
    yield ""
    yield f"{'part':10}{'parameters':>16}{'stored':>11}"
    for name, tensors in stored.items():
        num_bytes = sum(each.nbytes for each in tensors.values())
        yield f"{name:10}{count(tensors):16,}{human(num_bytes):>11}  {types(tensors)}"
    yield ""
    yield f"adapter   {adapter_line(parts['denoiser'], is_published(checkpoint))}"
    yield f"network   {config.num_layers} layers of width {config.dim}, blocks of {config.num_frames_per_block} latents"
    yield f"sound     {type(models.audio.encoder).__name__}, {models.audio.lookahead_s:.2f} s ahead of the picture"
    yield f"prompts   {text_line(models.text)}"
    yield f"levels    {config.num_levels}: sigma {', '.join(f'{sigma:g}' for sigma in config.schedule)}"
    yield f"pictures  {sizes_line(picture)}, {models.vae.config.frame_rate_hz} a second"
    yield ""
    width, height = picture.video_size(size or picture.fixed_size or WIDE, size)
    yield f"memory of a denoiser at {width}x{height} in {name_of(models.network.dtype)}"
    stride = models.vae.codec.space_stride
    for what, num_bytes in denoiser_memory(models.network, height // stride, width // stride).items():
        yield f"{what:40}{human(num_bytes):>10}"


def denoiser_memory(network: denoiser_model.Network, height: int, width: int) -> dict[str, int]:
    """Bytes of weights, and those that each session takes at each level, of latents of height x width."""
    config = network.config
    cache = KVCache(config, height, width, dtype=network.dtype, device="meta")
    ring = config.num_layers * sum(each.nbytes for each in cache.window(0))
    words = 2 * config.num_layers * config.text_len * config.dim * network.dtype.itemsize
    return {
        "weights, shared by levels in a process": sum(each.nbytes for each in network.state_dict().values()),
        "a session and level: window of blocks": ring,
        "a session and level: picture and motion": cache.num_bytes - ring,
        "a session and level: text": words,
    }


def most(tensors: dict[str, Tensor]) -> torch.dtype:
    """The type of most numbers."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        numbers[tensor.dtype] += tensor.numel()
    return numbers.most_common(1)[0][0]


def count(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def types(tensors: dict[str, Tensor]) -> str:
    return ", ".join(sorted({name_of(tensor.dtype) for tensor in tensors.values()}))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def adapter_line(part: Part, is_bare: bool) -> str:
    if merged := part.merged_adapter():
        return f"{merged} is merged into the weights"
    if part.adapter is None:
        return "none; the published weights make video block by block only with one" if is_bare else "none"
    path, alpha, pairs = part.adapter.path, part.adapter.alpha, part.adapter.pairs()
    rank = len(next(iter(pairs.values()))["A"])
    numbers = sum(matrix.numel() for pair in pairs.values() for matrix in pair.values())
    return f"{path}: {numbers:,} parameters for {len(pairs)} weights, rank {rank}, scale {alpha / rank:g}"


def text_line(text: text_model.TextEncoder | None) -> str:
    return "none" if text is None else f"{text.config.encoder}, {text.config.max_tokens} tokens of width {text.width}"


def sizes_line(rule: PictureRule) -> str:
    if rule.fixed_size is not None:
        return "{}x{} alone".format(*rule.fixed_size)
    return f"any of at most {rule.area:,} pixels whose sides are multiples of 64"


def human(num_bytes: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes / 1e3:.2f} kB"


def pack(checkpoint: Path, out: Path, adapter: LoraAdapter | None = None, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint in our layout, merged with the adapter, floating point weights as `dtype` if it is given.

    Otherwise each tensor keeps the type that it is stored in. ValueError if the checkpoint is not what it should be, or
    `out` is there already.
    """
    if out.exists():
        raise ValueError(f"{out} is there already, expected a folder to be made")
    parts = {name: open_part(checkpoint, name, adapter) for name in parts_of(checkpoint)}
    outline(parts, torch.float32)
    for name, part in parts.items():
        merged = part.adapter.path.name if part.adapter else part.merged_adapter()
        kept = {key: tensor.dtype for key, tensor in part.outline().items()}
        tensors = ((key, tensor if dtype else tensor.to(kept[key])) for key, tensor in part.tensors())
        save_shards(out / name, part.config, tensors, dtype, {MERGED: merged} if merged else None)
        if part.tokenizer is not None:
            shutil.copy(part.tokenizer, out / name / TOKENIZER)
