"""Sessions of a checkpoint, rendered with the product's own audio model, levels, caches and codec.

Axes: s samples at 16 kHz, f pixel frames, H W height and width of frames.
"""

import io
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from avatar import render
from avatar.render import DenoisingLoop
from avatar.types import AudioPiece, Block, Conditions, HeardAudio, Session
from avatar.vae.vae import HIDDEN_FRAMES
from training.data import AUDIO_RATE_HZ

Pixels = NDArray[np.uint8]
Audio = NDArray[np.float32]
Answer = TypeVar("Answer")
Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Models(render.Models):
    """The models of a checkpoint, and the class that runs its levels."""

    denoising_loop: type[DenoisingLoop] = DenoisingLoop

    @property
    def block_frames(self) -> int:
        """Pixel frames of a block."""
        return self.audio.grid.frames

    @property
    def block_samples(self) -> int:
        """Samples of a block, at 16 kHz."""
        return self.audio.grid.samples

    def picture(self, image: Pixels) -> Pixels:
        """Fit an image (h, w, 3) to the video's size as a user's picture is fitted: (H, W, 3).

        One that has the size stays as it is: it is framed as the true frames are, and a decoder's time limit would end
        a long evaluation on a busy machine.
        """
        rule = self.vae.config.picture
        if image.shape[:2] == (rule.height, rule.width):
            return image
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        return self.vae.read_picture(file.getvalue()).rgb.numpy()


def load(checkpoint: Path, dtype: torch.dtype = torch.float32, levels: int | None = None) -> Models:
    """Load the models of a checkpoint folder, of its levels so many. ValueError if they cannot be used."""
    return Models(**vars(render.load(checkpoint, dtype=dtype, levels=levels)))


class SessionRenderer:
    """One session, rendered block by block.

    costs_s: CPU seconds of this thread for each piece or block, by stage; hardly affected by other load.
    face_motion: of each block, (m, f), that the audio stage gave to the network; empty if it takes none.
    """

    def __init__(self, models: Models, reference: Pixels, seed: int = 0) -> None:
        """reference: (H, W, 3) of the video's size."""
        self.models = models
        self.costs_s: dict[str, list[float]] = {}
        self.face_motion: list[Tensor] = []
        motion = models.vae.encode_picture(torch.from_numpy(np.array(reference)))
        session = Session("evaluation", seed, motion)
        conditions = Conditions(0, motion[:, :1], torch.zeros(0, 0))
        self._audio_state = models.audio.open(session, models.config.inputs)
        self._vae_state = models.vae.open(session)
        self._levels = models.denoising_loop(models.network, models.config, session, conditions)

    def render(self, pieces: Iterable[AudioPiece]) -> Iterator[Pixels]:
        """Yield the frames (f, H, W, 3) of each block that the audio pieces complete."""
        for piece in pieces:
            for block in self._timed("audio", self.models.audio.step, piece, self._audio_state):
                self.face_motion += [] if block.face_motion is None else [block.face_motion]
                yield self._timed("decode", self._decode, self._timed("levels", self._levels.step, block))

    def _decode(self, block: Block) -> Pixels:
        return np.concatenate([chunk.frames.numpy() for chunk in self.models.vae.decode(block, self._vae_state)])

    def _timed(self, stage: str, step: Callable[..., Answer], *arguments: object) -> Answer:
        started = time.thread_time()
        answer = step(*arguments)
        self.costs_s.setdefault(stage, []).append(time.thread_time() - started)
        return answer


def pieces(audio: Audio, block_samples: int, other: Audio | None = None) -> Iterator[AudioPiece]:
    """Cut audio (s,) at 16 kHz into pieces of a block's length, and add the marked end.

    other: (s,) audio of the other person, which comes with it; None: nobody is heard.
    """
    samples = torch.from_numpy(np.array(audio, np.float32))[None]
    for start in range(0, samples.shape[1], block_samples):
        span = slice(start, start + block_samples)
        heard = []
        if other is not None:
            heard = [HeardAudio(torch.from_numpy(np.array(other[span], np.float32))[None], AUDIO_RATE_HZ, start)]
        yield AudioPiece(samples[:, span], AUDIO_RATE_HZ, heard=heard)
    yield AudioPiece(samples[:, :0], AUDIO_RATE_HZ, is_last=True)


def render_frames(
    models: Models,
    reference: Pixels,
    audio: Audio,
    num_blocks: int | None = None,
    other: Audio | None = None,
    seed: int = 0,
) -> Pixels:
    """Render a session with the reference and audio: frames (f, H, W, 3) from frame HIDDEN_FRAMES of the stream on.

    num_blocks: stop after so many blocks. other: as in `pieces`.
    """
    frames, _ = render_session(models, reference, audio, num_blocks, other, seed)
    return frames


def render_session(
    models: Models, reference: Pixels, audio: Audio, num_blocks: int | None, other: Audio | None, seed: int
) -> tuple[Pixels, Audio | None]:
    """Render as `render_frames`; return the frames, and the face motion (m, f) that was given for them, if any."""
    session = SessionRenderer(models, reference, seed)
    frames = np.concatenate([*islice(session.render(pieces(audio, models.block_samples, other)), num_blocks)])
    if not session.face_motion:
        return frames, None
    given = torch.cat(session.face_motion, dim=1).numpy()
    return frames, given[:, HIDDEN_FRAMES : HIDDEN_FRAMES + len(frames)]


def until(items: Iterable[Item], deadline: float, least: int = 3) -> Iterator[Item]:
    """Yield items until the deadline, seconds of time.monotonic, but at least `least` of them."""
    for number, item in enumerate(items):
        if number >= least and time.monotonic() > deadline:
            return
        yield item
