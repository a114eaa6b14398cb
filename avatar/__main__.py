"""Render one clip in one process, without any transport: `python -m avatar SPEECH PORTRAIT OUT.mp4`.

docs/reference_options.md says which of the reference implementation's options each flag is. `python -m avatar inspect`
and `python -m avatar pack` are `avatar/checkpoints/inspect.py`.
"""

import argparse
import secrets
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from avatar.checkpoints import inspect
from avatar.checkpoints.lora import LoraAdapter
from avatar.media import read_audio, read_video, write_mp4
from avatar.render import Models, Options, embed, in_clips, load, render
from avatar.vae.picture import Size
from avatar.vae.vae import HIDDEN_FRAMES

FRAME_S = 0.02  # of the audio encoder
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    if sys.argv[1:2] in (["inspect"], ["pack"]):
        inspect.main(sys.argv[1:])
        return
    flags = parser().parse_args()
    torch.set_num_threads(flags.threads)
    try:
        sounds, rate_hz = read_sounds(flags.speech)
        picture = flags.portrait.read_bytes()
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        adapter = LoraAdapter(flags.adapter) if flags.adapter else None
        models = load(flags.checkpoint, adapter, dtype=DTYPES[flags.dtype], device=flags.device)
        chunks = render(models, list(map(torch.from_numpy, sounds)), rate_hz, picture, options(flags, models))
        frames = (chunk.frames.numpy() for chunk in tqdm(chunks, unit="block"))
        with logging_redirect_tqdm():
            write_mp4(flags.out, frames, models.vae.config.frame_rate_hz, HIDDEN_FRAMES, mixed(sounds), rate_hz)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m avatar", description="Render one clip in one process.")
    out.add_argument("speech", type=Path, nargs="+", help="a sound file; one for each actor, with --mask for each")
    out.add_argument("portrait", type=Path, help="a PNG, JPEG or WebP picture of a person")
    out.add_argument("out", type=Path, help="the MP4 file to write")
    out.add_argument("--checkpoint", type=Path, default=Path("models/tiny"), help="folder of the models")
    out.add_argument("--adapter", type=Path, help="file of an adapter to merge into the network's weights")
    out.add_argument("--device", type=torch.device, default="cpu", help="where to compute (default cpu)")
    out.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and states (default float32)")
    out.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")

    what = out.add_argument_group("what is shown")
    what.add_argument("--prompt", default="", help="what the video shows, in words; for checkpoints that know text")
    what.add_argument("--seed", type=int, default=420, help="seed of all randomness (default 420); -1 draws one")
    size = what.add_mutually_exclusive_group()
    size.add_argument("--size", type=area, metavar="A*B", help="at most so many pixels, in the portrait's own shape")
    size.add_argument("--exact-size", dest="size", type=width_height, metavar="WxH", help="width and height in pixels")
    what.add_argument("--fit", choices=("cover", "reference"), help="how the portrait is brought to the size")
    what.add_argument("--mask", type=Path, action="append", help="an actor's mask: white where the portrait shows it")
    what.add_argument("--pose-video", type=Path, help="a video whose poses are followed")

    how = out.add_argument_group("how it is drawn; what is not given is the checkpoint's choice")
    length = how.add_mutually_exclusive_group()
    length.add_argument("--num-clips", type=positive, help="the most clips, of --clip-frames each (default: all)")
    length.add_argument("--num-blocks", type=positive, help="the most blocks, of 0.48 s each (default: all)")
    how.add_argument("--clip-frames", type=positive, help="frames of the reference's clip: 24, 36, 48, ...")
    how.add_argument("--levels", type=positive, help="denoising steps; other numbers than the checkpoint's are refused")
    how.add_argument("--sink-update-block", type=block_or_never, help="where the sink is replaced: a block, or never")
    how.add_argument("--sink-distance", type=distance, metavar="N|LOW-HIGH", help="latent frames from block to sink")
    how.add_argument("--right-context", type=encoder_frames, metavar="S", help="seconds of sound heard behind a block")
    how.add_argument("--schedule", choices=("pipeline", "offline"), default="pipeline", help="as services; as one GPU")
    how.add_argument("--audio", choices=("live", "whole"), default="live", help="heard as it comes, or as whole files")
    how.add_argument("--noise", choices=("block", "clip"), default="block", help="draw it as we, or as the reference")
    return out


def options(flags: argparse.Namespace, models: Models) -> Options:
    """What the flags ask for. ValueError if the checkpoint cannot give it."""
    config = models.config
    if flags.levels not in (None, config.num_levels):
        raise ValueError(
            f"this checkpoint has {config.num_levels} levels, which its weights were made for; "
            f"it cannot be run at {flags.levels}"
        )
    if not -1 <= flags.seed < 1 << 63:
        raise ValueError(f"seed must be 0 to 2^63 - 1, or -1, got {flags.seed}")
    num_blocks = flags.num_blocks
    if flags.num_clips is not None:
        num_blocks = flags.num_clips * in_clips(config, flags.clip_frames).window_blocks
    frame_rate_hz = models.vae.config.frame_rate_hz
    return Options(
        seed=secrets.randbits(63) if flags.seed == -1 else flags.seed,
        size=flags.size,
        fit=flags.fit,
        text=embed(flags.checkpoint, flags.prompt) if flags.prompt else None,
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


def read_sounds(paths: list[Path]) -> tuple[list[NDArray[np.float32]], int]:
    """Each file's samples, (1 or 2, s) in [-1, 1], and their rate. ValueError if they do not have the same."""
    sounds, rates = zip(*map(read_audio, paths), strict=True)
    if len(set(rates)) > 1:
        raise ValueError(f"all speech must have the same rate, got {', '.join(f'{rate} Hz' for rate in rates)}")
    return list(sounds), rates[0]


def mixed(sounds: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """What is heard in the film: one sound as it is, several together in one channel."""
    if len(sounds) == 1:
        return sounds[0]
    together = np.zeros((1, max(sound.shape[1] for sound in sounds)), np.float32)
    for sound in sounds:
        together[:, : sound.shape[1]] += sound.mean(0)
    return together.clip(-1, 1)


def area(text: str) -> int:
    width, height = map(positive, text.split("*"))
    return width * height


def width_height(text: str) -> Size:
    width, height = map(positive, text.split("x"))
    return width, height


def distance(text: str) -> int | tuple[int, int]:
    low, _, high = text.partition("-")
    return (int(low), int(high)) if high else int(low)


def encoder_frames(text: str) -> int:
    """Seconds as frames of the audio encoder, whole ones."""
    frames = round(float(text) / FRAME_S)
    if abs(frames * FRAME_S - float(text)) > 1e-6:
        raise ValueError(f"{text} s are no whole number of {FRAME_S} s")
    return frames


def block_or_never(text: str) -> int:
    return 0 if text == "never" else positive(text)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    main()
