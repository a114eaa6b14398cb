"""Render one clip in one process, without any transport: `python -m avatar SPEECH PORTRAIT OUT.mp4`.

docs/reference_options.md maps the flags to the reference implementation's options. `python -m avatar inspect` and
`python -m avatar pack` are in `avatar/checkpoints/inspect.py`.
"""

import argparse
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from avatar.checkpoints import inspect
from avatar.checkpoints.files import DTYPES
from avatar.checkpoints.inspect import format_bytes, read_size
from avatar.checkpoints.layouts import open_part
from avatar.checkpoints.lora import LoraAdapter
from avatar.media import Film, check_film_name, film_signer, read_audio, read_video, write_mp4
from avatar.render import (
    Models,
    RenderOptions,
    check_actors,
    check_speech,
    load,
    portrait_fit,
    render,
    with_clip_frames,
)
from avatar.text import model as text_model
from avatar.types import FrameChunk
from avatar.vae.marks.label import draw_label
from avatar.vae.picture.reading import read_mask, read_picture
from avatar.vae.picture.rule import Fit
from avatar.vae.vae import HIDDEN_FRAMES, parse_config

FRAME_S = 0.02  # encoder frames are 50 Hz


def main() -> None:
    """Render a clip, or run `inspect` or `pack`; an invalid input ends the program with its reason."""
    if sys.argv[1:2] in (["inspect"], ["pack"]):
        inspect.main(sys.argv[1:])
        return
    flags = parser().parse_args()
    try:
        film = make_film(flags)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    size = f"{film.num_frames} frames of {film.width}x{film.height}, {format_bytes(flags.out.stat().st_size)}"
    print(f"wrote {flags.out}: {film.duration_s:.2f} s, {size}")


def make_film(flags: argparse.Namespace) -> Film:
    """Render and write the film of the flags; inputs and the output's name are checked before the models are loaded."""
    check_film_name(flags.out)
    inputs = [*flags.speech, flags.portrait, *(flags.mask or []), *([flags.pose_video] if flags.pose_video else [])]
    if flags.out.exists() and any(path.exists() and flags.out.samefile(path) for path in inputs):
        raise ValueError(f"{flags.out} is one of the inputs; expected the name of another film to write")
    check_content(flags)
    signer = film_signer(flags.c2pa)
    speech, rate_hz = read_speech(flags.speech)
    picture = picture_file(flags.portrait)
    check_pictures(flags, picture)
    adapter = LoraAdapter(flags.adapter) if flags.adapter else None
    make_folder(flags.out.parent)
    dtype, device = DTYPES[flags.dtype], flags.device
    models = load(
        flags.checkpoint,
        adapter,
        levels=flags.levels,
        decoder=flags.decoder,
        dtype=dtype,
        device=device,
        threads=flags.threads,
    )
    if models.config.num_levels < models.config.num_trained_levels:
        print(f"levels: {models.config.levels_text}")
    options = render_options(flags, models)
    chunks = render(models, list(map(torch.from_numpy, speech)), rate_hz, picture, options)
    grid = models.audio.grid
    num_blocks = grid.num_blocks(max(samples.shape[-1] for samples in speech), rate_hz)
    num_blocks = min(num_blocks, options.num_blocks or num_blocks)
    shown = with_progress(chunks, grid.frames * num_blocks - HIDDEN_FRAMES)
    frame_rate_hz = models.vae.config.frame_rate_hz
    if not flags.marks:
        print("the film carries no machine-readable marks")
    with logging_redirect_tqdm():
        return write_mp4(
            flags.out,
            pixels(shown, has_label=flags.label),
            frame_rate_hz,
            HIDDEN_FRAMES,
            mix(speech),
            rate_hz,
            is_marked=flags.marks,
            signer=signer,
        )


def with_progress(chunks: Iterable[FrameChunk], num_frames: int) -> Iterator[FrameChunk]:
    """Yield chunks, and show on stderr how many of their frames there have been."""
    with tqdm(total=num_frames, unit="frame") as progress:
        for chunk in chunks:
            yield chunk
            progress.update(len(chunk.frames))


def pixels(chunks: Iterable[FrameChunk], *, has_label: bool) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of each chunk, (f, h, w, 3) uint8 RGB, with the label "AI" if they have one."""
    for chunk in chunks:
        frames = chunk.frames.numpy()
        if has_label:
            draw_label(frames)
        yield frames


def check_content(flags: argparse.Namespace) -> None:
    """Raise ValueError for an invalid seed, a prompt that the checkpoint does not take, or too few or many masks."""
    if not -1 <= flags.seed < 1 << 63:
        raise ValueError(f"seed must be 0 to 2^63 - 1, or -1, got {flags.seed}")
    if flags.prompt:
        open_part(flags.checkpoint, "text")
    check_actors(len(flags.speech), len(flags.mask or []))


def check_pictures(flags: argparse.Namespace, picture: bytes) -> None:
    """Raise ValueError, with the file's name, if the portrait, a mask or the pose video cannot be used."""
    part = open_part(flags.checkpoint, "vae")
    with part.naming_config():
        rule = parse_config(part.config).picture
    fit = portrait_fit(flags.fit, rule.fit, bool(flags.mask))
    with naming(flags.portrait):
        height, width, _ = read_picture(picture, rule, flags.size, fit).rgb.shape
    for path in flags.mask or []:
        with naming(path):
            read_mask(picture_file(path), picture, (width, height), fit, cell=1)
    if flags.pose_video:
        next(read_video(flags.pose_video, rate_hz=1), None)


def picture_file(path: Path) -> bytes:
    """Return the bytes of a picture's file. ValueError if there is none."""
    if not path.is_file():
        raise ValueError(f"no picture at {path}")
    return path.read_bytes()


def make_folder(folder: Path) -> None:
    """Make the folder of the output if it is missing, and say so. OSError if it cannot be written to."""
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{folder} is a file, expected a folder to write the film to")
        folder.mkdir(parents=True)
        print(f"made the folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write to the folder {folder}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path in front of a ValueError's message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    out = argparse.ArgumentParser(prog="python -m avatar", description="Render one clip in one process.")
    out.add_argument("speech", type=Path, nargs="+", help="an audio file; one per actor, each with a --mask")
    out.add_argument("portrait", type=Path, help="a PNG, JPEG, WebP, HEIC or AVIF picture of a person")
    out.add_argument("out", type=Path, help="the film to write: .mp4, .m4v or .mov; its folder is made")
    out.add_argument("--checkpoint", type=Path, default=Path("models/tiny"), help="folder of the models")
    out.add_argument("--adapter", type=Path, help="LoRA adapter, a file or PEFT's folder, to merge into the network")
    out.add_argument(
        "--decoder", type=Path, help="decoder of frames, a file called taew2_1 or lighttaew2_1, or a folder"
    )
    out.add_argument("--device", type=usable_device, default="cpu", help="torch device (default cpu)")
    out.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and states (default float32)")
    out.add_argument("--threads", type=positive, default=1, help="CPU threads (default 1)")

    out.add_argument("--label", action="store_true", help='draw "AI" into the upper left corner of every frame')
    out.add_argument(
        "--no-marks",
        dest="marks",
        action="store_false",
        help="leave out the machine-readable marks which say that a machine made the film",
    )
    out.add_argument(
        "--c2pa",
        type=Path,
        nargs=2,
        metavar=("CERT", "KEY"),
        help="sign the film (C2PA) with a certificate and its key, PEM files; needs c2pa-python",
    )

    content = out.add_argument_group("content")
    content.add_argument("--prompt", default="", help="text prompt; for checkpoints with a text encoder")
    content.add_argument("--seed", type=int, default=420, help="seed of all randomness (default 420); -1: random")
    size = content.add_mutually_exclusive_group()
    size.add_argument("--size", type=area, metavar="A*B", help="greatest area in pixels; the shape is the portrait's")
    size.add_argument("--exact-size", dest="size", type=read_size, metavar="WxH", help="width and height in pixels")
    content.add_argument("--fit", choices=get_args(Fit), help="how the portrait is fitted to the size")
    content.add_argument("--mask", type=Path, action="append", help="an actor's mask: white where the actor is")
    content.add_argument("--pose-video", type=Path, help="a video of poses to follow")

    generation = out.add_argument_group("generation; defaults are the checkpoint's")
    length = generation.add_mutually_exclusive_group()
    length.add_argument("--num-clips", type=positive, help="the most clips, of --clip-frames each (default: all)")
    length.add_argument("--num-blocks", type=positive, help="the most blocks (default: all)")
    generation.add_argument("--clip-frames", type=positive, help="frames of the reference's clip: whole blocks")
    generation.add_argument("--levels", type=positive, help="denoising steps; fewer are faster, and not as good")
    generation.add_argument(
        "--sink-update-block", type=block_or_never, help="block at which the sink is updated, or never"
    )
    generation.add_argument(
        "--sink-distance", type=distance, metavar="N|LOW-HIGH", help="latent frames from block to sink"
    )
    generation.add_argument(
        "--right-context", type=encoder_frames, metavar="S", help="seconds of audio after a block to use"
    )
    generation.add_argument(
        "--schedule", choices=("pipeline", "offline"), default="pipeline", help="the services', or the reference's"
    )
    generation.add_argument(
        "--audio", choices=("live", "whole"), default="live", help="features of live audio or whole files"
    )
    generation.add_argument("--noise", choices=("block", "clip"), default="block", help="drawn per block, or per clip")
    return out


def render_options(flags: argparse.Namespace, models: Models) -> RenderOptions:
    """Return the options of the flags. ValueError if the checkpoint does not support them."""
    config = models.config
    num_blocks = flags.num_blocks
    if flags.num_clips is not None:
        num_blocks = flags.num_clips * with_clip_frames(config, flags.clip_frames).window_blocks
    frame_rate_hz = models.vae.config.frame_rate_hz
    return RenderOptions(
        seed=secrets.randbits(63) if flags.seed == -1 else flags.seed,
        size=flags.size,
        fit=flags.fit,
        text=text_model.load(open_part(flags.checkpoint, "text")).embed(flags.prompt) if flags.prompt else None,
        masks=[mask.read_bytes() for mask in flags.mask] if flags.mask else None,
        pose=read_video(flags.pose_video, frame_rate_hz) if flags.pose_video else None,
        num_blocks=num_blocks,
        clip_frames=flags.clip_frames,
        sink_update_block=flags.sink_update_block,
        sink_distance=flags.sink_distance,
        audio_right_frames=flags.right_context,
        schedule=flags.schedule,
        audio=flags.audio,
        noise=flags.noise,
    )


def read_speech(paths: list[Path]) -> tuple[list[NDArray[np.float32]], int]:
    """Return each file's samples, (1 or 2, s) in [-1, 1], and their rate in Hz. ValueError if rates differ."""
    speech, rates = zip(*map(read_audio, paths), strict=True)
    if len(set(rates)) > 1:
        raise ValueError(f"all speech must have the same rate, got {', '.join(f'{rate} Hz' for rate in rates)}")
    for path, samples in zip(paths, speech, strict=True):
        with naming(path):
            check_speech(torch.from_numpy(samples), rates[0])
    return list(speech), rates[0]


def mix(speech: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the video's audio: the samples of one actor unchanged, those of several mixed to mono."""
    if len(speech) == 1:
        return speech[0]
    mixed = np.zeros((1, max(samples.shape[1] for samples in speech)), np.float32)
    for samples in speech:
        mixed[:, : samples.shape[1]] += samples.mean(0)
    return mixed.clip(-1, 1)


def usable_device(text: str) -> torch.device:
    """Parse a torch device, and allocate a number on it. ArgumentTypeError if this machine has no such device."""
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has all three, with texts of many lines
        available = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used on this machine, expected {available}") from error
    return device


def area(text: str) -> int:
    """Parse an area in pixels written as `720*400`."""
    width, height = map(positive, text.split("*"))
    return width * height


def distance(text: str) -> int | tuple[int, int]:
    """Parse a sink distance: a number of latent frames, or `LOW-HIGH`."""
    low, _, high = text.partition("-")
    return (int(low), int(high)) if high else int(low)


def encoder_frames(text: str) -> int:
    """Convert seconds to frames of the audio encoder. ValueError if they are not whole frames."""
    frames = round(float(text) / FRAME_S)
    if abs(frames * FRAME_S - float(text)) > 1e-6:
        raise ValueError(f"{text} s is not a multiple of {FRAME_S} s")
    return frames


def block_or_never(text: str) -> int:
    """Parse a block's index, or `never` as 0."""
    return 0 if text == "never" else positive(text)


def positive(text: str) -> int:
    """Parse a positive integer."""
    value = int(text)
    if value < 1:
        raise ValueError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    main()
