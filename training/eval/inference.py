"""A checkpoint's people, made to speak as the product does it: its own audio model, levels with their caches, codec.

Axes: s samples at 16 kHz, f pixel frames, H W height and width of frames.
"""

import io
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from avatar import render
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network
from avatar.render import DenoisingLoop
from avatar.types import BLOCK_FRAMES, AudioPiece, Conditions, FrameChunk, Session
from training.data import FRAME_SAMPLES, SOUND_RATE_HZ

BLOCK_SAMPLES = BLOCK_FRAMES * FRAME_SAMPLES
Pixels = NDArray[np.uint8]
Sound = NDArray[np.float32]
Answer = TypeVar("Answer")
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Models(render.Models):
    """The models of a checkpoint, and how a session's blocks are drawn with them."""

    drawing: type[DenoisingLoop] = DenoisingLoop

    def picture(self, image: Pixels) -> Pixels:
        """An image (h, w, 3) as a user's picture becomes: of the video's size, (H, W, 3)."""
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        return self.vae.read_picture(file.getvalue()).numpy()


def load(
    checkpoint: Path, dtype: torch.dtype = torch.float32, denoiser: tuple[Network, NetworkConfig] | None = None
) -> Models:
    """The models of a checkpoint's folder. ValueError if they cannot be used.

    denoiser: a network, and its configuration, in place of the folder's.
    """
    models = Models(**vars(render.load(checkpoint, dtype=dtype)))
    return models if denoiser is None else replace(models, network=denoiser[0], config=denoiser[1])


class Rollout:
    """One session, block after block.

    costs_s: by stage, seconds of this thread's processor time for each piece or block: hardly dependent on what else
        the machine does.
    """

    def __init__(self, models: Models, reference: Pixels, seed: int = 0) -> None:
        """reference: (H, W, 3) of the video's size."""
        self.models = models
        self.costs_s: dict[str, list[float]] = {}
        motion = models.vae.encode_picture(torch.from_numpy(np.array(reference)))
        session = Session("rollout", seed, motion)
        conditions = Conditions(0, motion[:, :1], torch.zeros(0, 0))
        self._hearing, self._decoding = models.audio.open(session), models.vae.open(session)
        self._drawing = models.drawing(models.network, models.config, session, conditions)

    def speak(self, pieces: Iterable[AudioPiece]) -> Iterator[FrameChunk]:
        """The frames of the blocks that the pieces complete."""
        for piece in pieces:
            for block in self._timed("audio", self.models.audio.step, piece, self._hearing):
                drawn = self._timed("levels", self._drawing.step, block)
                yield self._timed("decode", self.models.vae.step, drawn, self._decoding)

    def _timed(self, stage: str, step: Callable[..., Answer], *arguments: object) -> Answer:
        started = time.thread_time()
        answer = step(*arguments)
        self.costs_s.setdefault(stage, []).append(time.thread_time() - started)
        return answer


def pieces(sound: Sound) -> Iterator[AudioPiece]:
    """Sound (s,) at 16 kHz, a block's length at a time, the last one marked."""
    samples = torch.from_numpy(np.array(sound, np.float32))[None]
    for start in range(0, samples.shape[1], BLOCK_SAMPLES):
        yield AudioPiece(samples[:, start : start + BLOCK_SAMPLES], SOUND_RATE_HZ)
    yield AudioPiece(samples[:, :0], SOUND_RATE_HZ, is_last=True)


def spoken(rollout: Rollout, sound: Sound, num_blocks: int | None = None) -> Pixels:
    """The frames (f, H, W, 3) of all or the first blocks, from frame HIDDEN_FRAMES of the stream on."""
    chunks = islice(rollout.speak(pieces(sound)), num_blocks)
    return np.concatenate([chunk.frames.numpy() for chunk in chunks])


def until(items: Iterable[Item], deadline: float, least: int = 3) -> Iterator[Item]:
    """Items until the deadline, seconds of time.monotonic, but at least so many of them."""
    for number, item in enumerate(items):
        if number >= least and time.monotonic() > deadline:
            return
        yield item
