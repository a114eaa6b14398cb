"""The streaming model of sound: pieces of any size in, a block of features whenever its window is complete.

A stream keeps the window of the next block, the resampler and four running numbers, whatever its length; features do
not depend on how the sound was cut.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from avatar.audio.clock import BLOCK_FRAMES, BLOCK_SAMPLES, SAMPLE_RATE_HZ, placement, window_end
from avatar.audio.encoder import Encoder
from avatar.audio.resample import SETTLE_S, Resampler, check_piece
from avatar.audio.statistics import Statistics
from avatar.audio.wav2vec2 import Wav2Vec2
from avatar.audio.whisper import Whisper
from avatar.checkpoint import read_config
from avatar.types import AudioPiece, Block, Session

ENCODERS: dict[str, type[Encoder]] = {"whisper": Whisper, "wav2vec2": Wav2Vec2}


def load(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> "AudioModel":
    """The audio model of a checkpoint's folder, by its config's `encoder`. ValueError if it cannot be used."""
    name = read_config(folder).get("encoder")
    if name not in ENCODERS:
        raise ValueError(f"{folder}/config.json: encoder is {name!r}, expected one of {', '.join(ENCODERS)}")
    return AudioModel(ENCODERS[name].load(folder, device=device, dtype=dtype))


@dataclass(eq=False)
class AudioState:
    """What one stream of sound carries.

    window: (s,) sound at 16 kHz of the next block's window; zero where it is not there yet.
    num_samples: how many samples at 16 kHz the stream has had.
    next_block: the block whose window is being filled.
    statistics: as of the last block.
    resampler: None before the first piece, which says the rate.
    """

    window: Tensor
    num_samples: int = 0
    next_block: int = 0
    statistics: Statistics = field(default_factory=Statistics)
    resampler: Resampler | None = None
    is_over: bool = False


class AudioModel:
    """A streaming model (`avatar.pipeline.StreamingModel`) of sound, around an encoder.

    history_s: seconds of sound before a block that rebuild a stream's state for it, beside its statistics.
    lookahead_s: seconds of sound after a block that its features need.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        end = window_end(0, encoder.right_frames)
        self.window_samples = encoder.left_samples + end
        self.history_s = encoder.left_samples / SAMPLE_RATE_HZ + SETTLE_S
        self.lookahead_s = (end - BLOCK_SAMPLES) / SAMPLE_RATE_HZ

    def open(self, session: Session) -> AudioState:  # noqa: ARG002 (sound has no constants)
        return AudioState(torch.zeros(self.window_samples))

    @torch.no_grad()
    def step(self, piece: AudioPiece, state: AudioState) -> list[Block]:
        """The blocks that this piece completes, in order; their features are (l, d, f) float32.

        The last piece completes the block that it ends in, as if silence followed. ValueError if the sound cannot be
        used, changes its rate, or comes after the last piece; the state is then as before.
        """
        if state.is_over:
            raise ValueError("the sound of this stream has ended; open another session for more")
        check_piece(piece)
        resampler = state.resampler or Resampler(piece.rate_hz)
        if piece.rate_hz != resampler.rate_hz:
            raise ValueError(f"audio must keep its rate of {resampler.rate_hz} Hz, got {piece.rate_hz}")
        state.resampler = resampler
        blocks = self._listen(resampler(piece.samples, piece.is_last), state)
        if piece.is_last:
            state.is_over = True
            num_blocks = -(-state.num_samples // BLOCK_SAMPLES)
            end = window_end(num_blocks - 1, self.encoder.right_frames) if num_blocks else 0
            blocks += self._listen(torch.zeros(end - state.num_samples), state)
        return blocks

    def _listen(self, sound: Tensor, state: AudioState) -> list[Block]:
        """Fill windows with sound (s,) at 16 kHz, and encode those that are complete."""
        blocks = []
        while len(sound):
            room = window_end(state.next_block, self.encoder.right_frames) - state.num_samples
            heard, sound = sound[:room], sound[room:]
            start = self.window_samples - room
            state.window[start : start + len(heard)] = heard
            state.num_samples += len(heard)
            if len(heard) == room:
                blocks.append(self._encode(state))
        return blocks

    def _encode(self, state: AudioState) -> Block:
        """The block whose window is complete; the window moves on to the next one."""
        index = state.next_block
        window = state.window[max(0, self.window_samples - state.num_samples) :]
        new = window[-BLOCK_SAMPLES:] if index else window
        states, state.statistics = self.encoder.encode(window, state.statistics.with_samples(new))
        state.window = state.window.roll(-BLOCK_SAMPLES)
        state.next_block += 1
        return Block(index, place(states, index).cpu())


def place(states: Tensor, index: int) -> Tensor:
    """A block's features (l, d, f), from states (l, t, d) whose last frame is the block's last, 24 k + 23."""
    frames, weights = placement(index)
    before = torch.tensor(frames) - (index + 1) * BLOCK_FRAMES  # counted from the end
    features = states[:, before].lerp(states[:, before + 1], rearrange(torch.tensor(weights), "f -> f 1").to(states))
    return rearrange(features, "l f d -> l d f").contiguous()
