"""Render one clip in one process, without any transport: `python -m avatar SPEECH PORTRAIT OUT.mp4`.

The same models as the services run, called in a row: the same frames, byte for byte. `python -m avatar inspect` and
`python -m avatar pack` are `avatar/inspect.py`.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from avatar import inspect
from avatar.adapter import Adapter
from avatar.audio import model as audio_model
from avatar.denoiser import model as denoiser_model
from avatar.denoiser.denoiser import Denoiser
from avatar.layouts import open_part
from avatar.media import read_sound, write_mp4
from avatar.types import AudioPiece, Conditions, FrameChunk, Session
from avatar.vae import vae as vae_model

# Sound is encoded a second at a time, so that a long file's features are never all in memory.
PIECE_S = 1


def main() -> None:
    if sys.argv[1:2] in (["inspect"], ["pack"]):
        inspect.main(sys.argv[1:])
        return
    parser = argparse.ArgumentParser(prog="python -m avatar", description="Render one clip in one process.")
    parser.add_argument("speech", type=Path, help="a sound file")
    parser.add_argument("portrait", type=Path, help="a PNG, JPEG or WebP picture of a person")
    parser.add_argument("out", type=Path, help="the MP4 file to write")
    parser.add_argument("--checkpoint", type=Path, default=Path("models/tiny"), help="folder of the models")
    parser.add_argument("--adapter", type=Path, help="file of an adapter to merge into the network's weights")
    parser.add_argument("--seed", type=int, default=420, help="seed of all randomness (default 420)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    try:
        samples, rate_hz = read_sound(flags.speech)
        picture = flags.portrait.read_bytes()
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        adapter = Adapter(flags.adapter) if flags.adapter else None
        chunks = render(flags.checkpoint, torch.from_numpy(samples), rate_hz, picture, flags.seed, adapter)
        frames = (chunk.frames.numpy() for chunk in tqdm(chunks, unit="block"))
        frame_rate_hz = open_part(flags.checkpoint, "vae").config["frame_rate_hz"]
        write_mp4(flags.out, frames, frame_rate_hz, vae_model.HIDDEN_FRAMES, samples, rate_hz)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def render(
    checkpoint: Path, samples: Tensor, rate_hz: int, picture: bytes, seed: int, adapter: Adapter | None = None
) -> Iterator[FrameChunk]:
    """The frames of a clip, block by block.

    samples: (a, s) float32 in [-1, 1]. picture: a PNG, JPEG or WebP file. ValueError if one of them cannot be used.
    """
    audio = audio_model.load(open_part(checkpoint, "audio"))
    network, config = denoiser_model.load(open_part(checkpoint, "denoiser", adapter))
    vae = vae_model.load(open_part(checkpoint, "vae"))
    denoisers = [Denoiser(network, config, level) for level in range(config.num_levels)]

    motion = vae.encode_picture(vae.read_picture(picture))
    session = Session("clip", seed, motion)
    conditions = updated = Conditions(0, motion[:, :1], torch.zeros(0, 0))
    hearing, decoding = audio.open(session), vae.open(session)
    histories = [denoiser.open(session) for denoiser in denoisers]
    for piece in pieces(samples, rate_hz):
        for block in audio.step(piece, hearing):
            if block.index == config.sink_update_block:
                conditions = updated
            block = replace(block, conditions=conditions)
            for denoiser, history in zip(denoisers, histories, strict=True):
                block = denoiser.step(block, history)
            if denoisers[-1].updates_sink(block):
                assert block.latent is not None
                updated = conditions.with_sink(block.latent)
            yield vae.step(block, decoding)


def pieces(samples: Tensor, rate_hz: int) -> Iterator[AudioPiece]:
    """Sound (a, s) in pieces, the last one marked."""
    for start in range(0, samples.shape[1], rate_hz * PIECE_S):
        yield AudioPiece(samples[:, start : start + rate_hz * PIECE_S], rate_hz)
    yield AudioPiece(samples[:, :0], rate_hz, is_last=True)


if __name__ == "__main__":
    main()
