"""The commands `inspect` and `pack`: describe a checkpoint without loading it, and copy it into our layout.

python -m avatar inspect CHECKPOINT [--adapter PATH] [--decoder PATH] [--size WxH] [--dtype TYPE] [--devices N]
python -m avatar pack CHECKPOINT OUT [--adapter PATH] [--decoder PATH] [--dtype TYPE]

`inspect` builds the models on the meta device and compares names and shapes with the files; no weight is read. With
`--devices` it says what fits on so many devices, and the frame rates that counts allow (`avatar.checkpoints.sizing`).
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avatar.audio import model as audio_model
from avatar.audio.wav2vec2 import Wav2Vec2
from avatar.checkpoints.decoders import DECODER
from avatar.checkpoints.files import DTYPES, TOKENIZER, save_shards
from avatar.checkpoints.layouts import is_published, open_part, part_names
from avatar.checkpoints.lora import ALPHA, LoraAdapter
from avatar.checkpoints.part import MERGED, Part, dtype_name
from avatar.checkpoints.sizing import (
    SIZES,
    TINY,
    WAN_BASE_DIM,
    DecoderCost,
    Sizing,
    Work,
    audio_work,
    deployment,
    wan_decoder,
)
from avatar.denoiser import model as denoiser_model
from avatar.denoiser.cache import KVCache
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.float8 import FLOAT8
from avatar.denoiser.speed import kernel_of_step
from avatar.text import model as text_model
from avatar.vae import vae as vae_model
from avatar.vae.picture.rule import PictureRule, Size, sizes_text
from avatar.vae.vae import Vae

# dtypes that weights may be stored in.
STORED = {**DTYPES, "float16": torch.float16}
# Picture size for the memory table, unless --size or the checkpoint sets one.
DEFAULT_PICTURE = (1920, 1080)
# Bytes of a weight of the VAE and of the audio encoder as devices serve them: in bfloat16 and float32.
SERVED_BYTES = {"vae": 2, "audio": 4}


def main(arguments: Sequence[str]) -> None:
    """Run `inspect` or `pack`; an invalid checkpoint ends the program with its reason."""
    parser = argparse.ArgumentParser(prog="python -m avatar")
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser("inspect", help="describe a checkpoint and check that it is complete")
    inspecting.add_argument("--size", type=read_size, metavar="WxH", help="picture size for the memory table")
    inspecting.add_argument(
        "--dtype", choices=STORED, help="dtype that the network is served in (default: as stored, float32 for float16)"
    )
    inspecting.add_argument("--levels", type=int, help="fewer levels than the checkpoint was trained for")
    inspecting.add_argument(
        "--devices", type=int, metavar="N", help="say what fits on N devices, and how fast it can be"
    )
    inspecting.add_argument("--memory", type=float, default=80, metavar="GB", help="memory of each device (default 80)")
    packing = commands.add_parser("pack", help="write a checkpoint in our layout, merged with its adapter")
    packing.add_argument("--dtype", choices=STORED, help="dtype of all weights (default: as stored)")
    for each in (inspecting, packing):
        each.add_argument("checkpoint", type=Path, help="folder, in our layout or the published one")
        each.add_argument(
            "--adapter", type=Path, help="LoRA adapter, a file or PEFT's folder, to merge into the network"
        )
        each.add_argument(
            "--decoder", type=Path, help="decoder of frames, a file called taew2_1 or lighttaew2_1, or a folder"
        )
        each.add_argument("--adapter-alpha", type=float, help=f"alpha of a file's training ({ALPHA:g})")
    packing.add_argument("out", type=Path, help="folder to write; it must not exist")
    flags = parser.parse_args(arguments)
    adapter = LoraAdapter(flags.adapter, flags.adapter_alpha) if flags.adapter else None
    dtype = STORED.get(flags.dtype)
    try:
        if flags.command == "inspect":
            devices = (flags.devices, flags.memory * 1e9) if flags.devices is not None else None
            print(
                *inspect(flags.checkpoint, adapter, flags.size, dtype, flags.levels, flags.decoder, devices), sep="\n"
            )
        else:
            pack(flags.checkpoint, flags.out, adapter, dtype, flags.decoder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def read_size(text: str) -> Size:
    """Parse a size (width, height) written as `704x384`."""
    try:
        width, height = map(int, text.split("x"))
        if min(width, height) < 1:
            raise ValueError("a size is at least 1x1")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, expected WIDTHxHEIGHT") from error
    return width, height


def build_models(
    parts: dict[str, Part], dtype: torch.dtype
) -> tuple[audio_model.AudioModel, denoiser_model.Network, Vae[Any], text_model.TextEncoder | None]:
    """Build a checkpoint's models on the meta device, which have shapes and no weights; the network in dtype.

    ValueError if a name or a shape in the parts is wrong, or the models do not fit each other.
    """
    audio = audio_model.load(parts["audio"], device="meta")
    network = denoiser_model.load(parts["denoiser"], dtype=dtype, device="meta")
    config, vae = network.config, vae_model.load(parts["vae"], device="meta")
    expected, made = (config.num_encoder_layers, config.audio_dim), (audio.encoder.num_states, audio.encoder.width)
    if expected != made:
        raise ValueError(f"the network expects audio features of {expected} (layers, width), the encoder makes {made}")
    if vae.codec.channels != config.in_dim:
        raise ValueError(f"the network has latents of {config.in_dim} channels, the VAE has {vae.codec.channels}")
    text = text_model.load(parts["text"], device="meta") if "text" in parts else None
    if text is not None and (text.width != config.text_dim or text.config.max_tokens > config.text_len):
        raise ValueError(
            f"the network reads at most {config.text_len} text tokens of width {config.text_dim}, the text encoder "
            f"makes {text.config.max_tokens} of width {text.width}"
        )
    return audio, network, vae, text


def inspect(
    checkpoint: Path,
    adapter: LoraAdapter | None = None,
    size: Size | None = None,
    dtype: torch.dtype | None = None,
    levels: int | None = None,
    decoder: Path | None = None,
    devices: tuple[int, float] | None = None,
) -> Iterator[str]:
    """Yield the lines that describe a checkpoint. ValueError if a name or a shape in it is wrong.

    size: (width, height) of the picture for the memory table; None for the checkpoint's own size, or a 16:9 picture.
    dtype: that the network is served in; None for the one that most of its weights are stored in, float32 for float16.
    levels: of fewer than the checkpoint was trained for. decoder: as in `open_part`. devices: their number and the
    memory of each, in bytes, to say what fits there; None: say nothing of them.
    """
    parts = open_parts(checkpoint, adapter, decoder)
    parts["denoiser"] = denoiser_model.with_levels(parts["denoiser"], levels)
    stored = {name: part.meta_tensors() for name, part in parts.items()}
    audio, network, vae, text = build_models(parts, dtype or served_dtype(stored["denoiser"]))
    config, picture = network.config, vae.config.picture
    layout = "as published" if is_published(checkpoint) else "in our layout"
    yield f"{checkpoint}: {layout}, every name and shape in place"
    yield ""
    yield f"{'part':10}{'parameters':>16}{'stored':>11}"
    for name, tensors in stored.items():
        num_parameters = numbers(tensors)
        size_text = format_bytes(sum(tensor.nbytes for tensor in tensors.values()))
        dtypes = ", ".join(sorted({dtype_name(tensor.dtype) for tensor in tensors.values()}))
        yield f"{name:10}{num_parameters:16,}{size_text:>11}  {dtypes}"
    yield ""
    yield f"adapter   {adapter_line(parts['denoiser'], is_published(checkpoint))}"
    yield f"network   {config.num_layers} layers of width {config.dim}, blocks of {config.num_frames_per_block} latents"
    yield f"audio     {type(audio.encoder).__name__}, looks {audio.lookahead_s:.2f} s ahead"
    yield f"inputs    {', '.join(('audio', *config.inputs))}"
    prompts = f"{text.config.encoder}, {text.config.max_tokens} tokens of width {text.width}" if text else "none"
    yield f"prompts   {prompts}"
    yield f"decoder   {decoder_line(parts['vae'])}"
    yield f"levels    {config.levels_text}"
    correlation = f"; correlation {config.noise_correlation:g}" if config.noise_correlation else ""
    yield f"noise     deviation {config.noise_scale:g}; distilled with {config.trained_noise_scale:g}{correlation}"
    yield f"pictures  {sizes_line(picture)}, {vae.config.frame_rate_hz} a second"
    if picture.fixed_size is None:
        yield f"served    {sizes_text(picture.limited().all_sizes)}; AVATAR_SIZES chooses others"
    yield ""
    width, height = picture.video_size(size or picture.fixed_size or DEFAULT_PICTURE, size)
    stride = vae.codec.space_stride
    latents = height // stride, width // stride
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield f"attention {kernel_of_step(config, *latents, network.dtype, device, None)} on this machine's {device.type}"
    yield f"memory of a denoiser at {width}x{height} in {dtype_name(network.dtype)}"
    memory = denoiser_memory(network, *latents)
    widest = max(map(len, memory))
    for what, num_bytes in memory.items():
        yield f"{what:{widest}}{format_bytes(num_bytes):>11}"
    if devices:
        coder_bytes = sum(numbers(stored[name]) * bytes_each for name, bytes_each in SERVED_BYTES.items())
        coders = decoder_costs(parts["vae"]), audio_costs(audio), coder_bytes
        chosen = size or picture.fixed_size
        sizings = {
            f"{width}x{height}": sizing_of(network, height // stride, width // stride, *coders)
            for width, height in ([chosen] if chosen else SIZES)
        }
        yield ""
        yield from deployment(sizings, *devices)


def sizing_of(
    network: denoiser_model.Network, height: int, width: int, decoder: DecoderCost, audio: Work, coder_bytes: float
) -> Sizing:
    """Return the sizing of videos of height x width latents. coder_bytes: as of `Sizing`."""
    weights = sum(each.nbytes for each in network.state_dict().values())
    memory = Denoiser(network, network.config, 0).memory(height, width)
    float8_bytes, _ = Denoiser(network, network.config, 0, kv_dtype=FLOAT8).memory(height, width)
    return Sizing(network.config, height, width, weights, *memory, decoder, audio, coder_bytes, float8_bytes)


def decoder_costs(part: Part) -> DecoderCost:
    """Return the costs of the decoder of a VAE's part; those of the light codec are too small to count."""
    if part.decoder is not None:
        return TINY
    is_wan = part.config["codec"] == "wan"
    return wan_decoder(part.config.get("network", {}).get("base_dim", WAN_BASE_DIM)) if is_wan else DecoderCost()


def audio_costs(audio: audio_model.AudioModel) -> Work:
    """Return the work of the audio encoder for a block; that of others than wav2vec2 is too small to count."""
    encoder = audio.encoder
    return audio_work(encoder.num_states - 1, encoder.width) if isinstance(encoder, Wav2Vec2) else Work()


def numbers(tensors: dict[str, Tensor]) -> int:
    """Return the number of numbers in tensors."""
    return sum(tensor.numel() for tensor in tensors.values())


def open_parts(checkpoint: Path, adapter: LoraAdapter | None, decoder: Path | None) -> dict[str, Part]:
    """Return all parts of a checkpoint by their names, with `decoder` where the VAE has another one."""
    parts = {name: open_part(checkpoint, name, adapter, decoder=decoder) for name in part_names(checkpoint)}
    if other := parts["vae"].decoder:
        parts[DECODER] = other
    return parts


def denoiser_memory(network: denoiser_model.Network, height: int, width: int) -> dict[str, int]:
    """Return the bytes of a process's weights and of a session's state, by name; height, width of latents."""
    config = network.config
    cache, float8 = (
        KVCache(config, height, width, dtype=network.dtype, device="meta", window_dtype=window_dtype)
        for window_dtype in (network.dtype, FLOAT8)
    )
    ring = config.num_layers * sum(each.nbytes for each in cache.window(0))
    _, shared = Denoiser(network, config, 0).memory(height, width)
    return {
        "weights, shared by levels in a process": sum(each.nbytes for each in network.state_dict().values()),
        "a session and level: window of blocks": ring,
        "  the same with AVATAR_KV_DTYPE=float8_e4m3fn": float8.num_bytes - (cache.num_bytes - ring),
        "a session and level: picture and motion": cache.num_bytes - ring,
        "a session: prefills, shared by its levels": shared,
    }


def served_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """Return the dtype that most of the numbers have; float32 if it is not one that services compute in."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        numbers[tensor.dtype] += tensor.numel()
    [(stored, _)] = numbers.most_common(1)
    return stored if stored in DTYPES.values() else torch.float32


def adapter_line(part: Part, is_published_layout: bool) -> str:
    """Describe the denoiser's LoRA adapter."""
    if merged := part.merged_adapter():
        return f"{merged} is merged into the weights"
    if part.adapter is None:
        return "none; the published weights need one to generate block by block" if is_published_layout else "none"
    pairs = part.adapter.pairs()
    ranks = {name: len(pair["A"]) for name, pair in pairs.items()}
    scales = {part.adapter.scale(name, rank) for name, rank in ranks.items()}
    numbers = sum(matrix.numel() for pair in pairs.values() for matrix in pair.values())
    what = f"{numbers:,} parameters for {len(pairs)} weights"
    return f"{part.adapter.path}: {what}, rank {span(set(ranks.values()))}, scale {span(scales)}"


def decoder_line(part: Part) -> str:
    """Describe the decoder of a VAE's part."""
    if part.decoder is None:
        return "the VAE's own"
    return f"{part.decoder.folder}, tiny, takes {part.decoder.config['latents']} latents"


def span(numbers: Collection[float]) -> str:
    """Format numbers as one, or as the least and the greatest."""
    least, greatest = min(numbers), max(numbers)
    return f"{least:g}" if least == greatest else f"{least:g} to {greatest:g}"


def sizes_line(rule: PictureRule) -> str:
    """Describe the video sizes."""
    if rule.fixed_size is not None:
        return "{}x{} only".format(*rule.fixed_size)
    return f"any of at most {rule.area:,} pixels whose sides are multiples of 64"


def format_bytes(num_bytes: int) -> str:
    """Format bytes in kB, MB or GB (powers of 1000)."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes / 1e3:.2f} kB"


def pack(
    checkpoint: Path,
    out: Path,
    adapter: LoraAdapter | None = None,
    dtype: torch.dtype | None = None,
    decoder: Path | None = None,
) -> None:
    """Write a checkpoint in our layout, merged with the adapter.

    dtype: of floating point weights; None: each tensor keeps its stored dtype. decoder: as in `open_part`.
    ValueError if a name or a shape in the checkpoint is wrong, or `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; expected the name of a new folder")
    parts = open_parts(checkpoint, adapter, decoder)
    build_models(parts, torch.float32)  # checks names and shapes before anything is written
    for name, part in parts.items():
        merged = part.adapter.name if part.adapter else part.merged_adapter()
        kept = {key: tensor.dtype for key, tensor in part.meta_tensors().items()}
        tensors = ((key, tensor if dtype else tensor.to(kept[key])) for key, tensor in part.tensors())
        save_shards(out / name, part.config, tensors, dtype, {MERGED: merged} if merged else None)
        if part.tokenizer is not None:
            shutil.copy(part.tokenizer, out / name / TOKENIZER)
