"""The streaming model of sound: pieces of any size in, a block of features whenever its window is complete.

A stream keeps the window of the next block, the resampler and four running numbers, whatever its length; features do
not depend on how the sound was cut.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from torch import Tensor

from avatar.audio.alignment import BLOCK_ENCODER_FRAMES, BLOCK_SAMPLES, SAMPLE_RATE_HZ, placement, window_end
from avatar.audio.encoder import Encoder
from avatar.audio.resample import Resampler, check_piece
from avatar.audio.statistics import Statistics
from avatar.audio.wav2vec2 import Wav2Vec2
from avatar.audio.whisper import Whisper
from avatar.checkpoints.part import Part
from avatar.types import AudioPiece, Block, Session

# 2.56 s: twice what completes wav2vec2's positional convolution.
MAX_RIGHT_FRAMES = 128
WARM_BLOCKS = 2

ENCODERS: dict[str, type[Encoder]] = {"whisper": Whisper, "wav2vec2": Wav2Vec2}


def load(part: Part, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> "AudioModel":
    """The audio model of a checkpoint's part, by its config's `encoder`. ValueError if it cannot be used."""
    name = part.config.get("encoder")
    if name not in ENCODERS:
        raise ValueError(f"{part.folder}: encoder is {name!r}, expected one of {', '.join(ENCODERS)}")
    return AudioModel(ENCODERS[name].load(part, dtype=dtype, device=device))


@dataclass(eq=False)
class AudioState:
    """What one stream of sound carries.

    window: (s,) sound at 16 kHz of the next block's window; zero where it is not there yet.
    num_samples: how many samples at 16 kHz the stream has had.
    next_block: the block whose window is being filled.
    statistics: as of the last block.
    rate_hz: None before the first piece.
    resampler: None before the first piece, and after one that completed a block.
    before: (a, s) the last sound of the block that such a piece completed, for the next resampler.
    right_frames: encoder frames of sound behind a block.
    first_answer: the first block that is encoded; of those before it the sound is kept.
    """

    window: Tensor
    right_frames: int
    num_samples: int = 0
    next_block: int = 0
    statistics: Statistics = field(default_factory=Statistics)
    rate_hz: int | None = None
    resampler: Resampler | None = None
    before: Tensor | None = None
    first_answer: int = 0
    is_over: bool = False


class AudioModel:
    """A streaming model (`avatar.runtime.pipeline.StreamingModel`) of sound, around an encoder.

    history_s: seconds of sound before a block that rebuild a stream's state for it, with its statistics: whole blocks.
    lookahead_s: seconds of sound after a block that its features need, if the session does not say.
    max_right_frames: most encoder frames behind a block that sessions may ask for; 0 if they may not.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        # A resampler that begins there needs a block to settle.
        self.history_s = (math.ceil(encoder.left_samples / BLOCK_SAMPLES) + 1) * BLOCK_SAMPLES / SAMPLE_RATE_HZ
        self.max_right_frames = MAX_RIGHT_FRAMES if encoder.right_is_free else 0
        self.lookahead_s = (window_end(0, encoder.right_frames) - BLOCK_SAMPLES) / SAMPLE_RATE_HZ

    def open(self, session: Session) -> AudioState:
        """A stream that has heard nothing. ValueError if it cannot see as far ahead as the session says."""
        right_frames = self.encoder.right_frames
        if session.audio_right_frames is not None:
            if not self.max_right_frames:
                raise ValueError(f"this encoder hears {right_frames} frames behind a block, and no other number")
            right_frames = session.audio_right_frames
            if not 0 <= right_frames <= self.max_right_frames:
                raise ValueError(f"right context must be 0 to {self.max_right_frames} frames, got {right_frames}")
        return AudioState(torch.zeros(self.encoder.left_samples + window_end(0, right_frames)), right_frames)

    def reopen(self, session: Session, first_block: int, first_answer: int, statistics: bytes) -> AudioState:
        """A stream that goes on where another one of the session was lost.

        first_block: what the first piece begins with, `history_s` before first_answer or the session's beginning.
        first_answer: the first block that is made. statistics: `Block.statistics` of the one before; empty for none.
        From then on blocks are those of the lost stream, to the byte, if its rate is a multiple of 25 Hz.
        ValueError if these do not fit together, or as in `open`.
        """
        if not 0 <= first_block <= first_answer:
            raise ValueError(f"a stream cannot begin at block {first_block} to answer from block {first_answer} on")
        state = self.open(session)
        state.num_samples, state.next_block = first_block * BLOCK_SAMPLES, first_block
        state.first_answer = first_answer
        if statistics:
            state.statistics = Statistics.from_bytes(statistics)
        return state

    @torch.no_grad()
    def step(self, piece: AudioPiece, state: AudioState) -> list[Block]:
        """The blocks that this piece completes, in order; their features are (l, d, f) float32.

        The last piece completes the block that it ends in, as if silence followed. ValueError if the sound cannot be
        used, changes its rate, comes after the last piece, or completes a block that it does not end; the state is then
        as before.
        """
        if state.is_over:
            raise ValueError("the sound of this stream has ended; open another session for more")
        check_piece(piece)
        if state.rate_hz not in (None, piece.rate_hz):
            raise ValueError(f"audio must keep its rate of {state.rate_hz} Hz, got {piece.rate_hz}")
        if piece.completes is not None:
            return self._complete(piece, piece.completes, state)
        blocks = self._listen(_resampled(piece.samples, state, piece), state)
        if piece.is_last:
            state.is_over = True
            num_blocks = -(-state.num_samples // BLOCK_SAMPLES)
            end = window_end(num_blocks - 1, state.right_frames) if num_blocks else 0
            blocks += self._listen(torch.zeros(end - state.num_samples), state)
        return blocks

    def warm(self) -> int:
        """Encode blocks of silence; how many."""
        state = self.open(Session("warm", 0, torch.zeros(0)))
        for index in range(WARM_BLOCKS):
            self.step(AudioPiece(torch.zeros(1, BLOCK_SAMPLES), SAMPLE_RATE_HZ, completes=index), state)
        return WARM_BLOCKS

    def _complete(self, piece: AudioPiece, index: int, state: AudioState) -> list[Block]:
        """The blocks up to this one, from what there is of the sound behind it; the stream goes on at its end."""
        behind = torch.zeros(piece.samples.shape[0], 0) if piece.behind is None else piece.behind
        check_piece(replace(piece, samples=behind))
        missing = (index + 1) * BLOCK_SAMPLES - state.num_samples
        given = piece.samples.shape[1] * SAMPLE_RATE_HZ / piece.rate_hz
        # What a resampler holds back is missing, too, and rates that are no multiple of 25 round.
        if index < state.next_block - 1 or not given - 2 <= missing <= given + BLOCK_SAMPLES / 4:
            raise ValueError(f"block {index} cannot be completed by {given:g} samples after {state.num_samples}")
        sound = _resampled(torch.cat([piece.samples, behind], 1), state, replace(piece, is_last=True))
        room = window_end(index, state.right_frames) - state.num_samples
        blocks = self._listen(torch.nn.functional.pad(sound[:room], (0, max(0, room - len(sound)))), state)
        state.num_samples = (index + 1) * BLOCK_SAMPLES
        state.before = piece.samples[:, -(piece.rate_hz // 25) :] if piece.samples.shape[1] else None
        state.resampler = None
        return blocks

    def _listen(self, sound: Tensor, state: AudioState) -> list[Block]:
        """Fill windows with sound (s,) at 16 kHz, and encode those that are complete."""
        blocks = []
        while len(sound):
            room = window_end(state.next_block, state.right_frames) - state.num_samples
            heard, sound = sound[:room], sound[room:]
            start = len(state.window) - room
            state.window[start : start + len(heard)] = heard
            state.num_samples += len(heard)
            if len(heard) == room:
                if state.next_block >= state.first_answer:
                    blocks.append(self._encode(state))
                state.window = state.window.roll(-BLOCK_SAMPLES)
                state.next_block += 1
        return blocks

    def _encode(self, state: AudioState) -> Block:
        """The block whose window is complete."""
        index = state.next_block
        window = state.window[max(0, len(state.window) - state.num_samples) :]
        new = window[-BLOCK_SAMPLES:] if index else window
        statistics = state.statistics.with_samples(new)
        states, state.statistics = self.encoder.encode(window, statistics, state.right_frames)
        return Block(index, place(states, index).cpu(), statistics=state.statistics.to_bytes())


@dataclass(frozen=True)
class ResumedAudioModel:
    """An audio model whose stream is rebuilt; see `AudioModel.reopen`."""

    model: AudioModel
    first_block: int
    first_answer: int
    statistics: bytes

    def open(self, session: Session) -> AudioState:
        return self.model.reopen(session, self.first_block, self.first_answer, self.statistics)

    def step(self, piece: AudioPiece, state: AudioState) -> list[Block]:
        return self.model.step(piece, state)


def _resampled(samples: Tensor, state: AudioState, piece: AudioPiece) -> Tensor:
    """Samples (a, s) at 16 kHz, as far as they are ready."""
    state.rate_hz = piece.rate_hz
    if state.resampler is None:
        if not samples.shape[1]:
            return torch.zeros(0)
        state.resampler = Resampler(piece.rate_hz, state.before)
    return state.resampler(samples, piece.is_last)


def place(states: Tensor, index: int) -> Tensor:
    """A block's features (l, d, f), from states (l, t, d) whose last frame is the block's last, 24 k + 23."""
    frames, weights = placement(index)
    before = torch.tensor(frames) - (index + 1) * BLOCK_ENCODER_FRAMES  # counted from the end
    features = states[:, before].lerp(states[:, before + 1], rearrange(torch.tensor(weights), "f -> f 1").to(states))
    return rearrange(features, "l f d -> l d f").contiguous()
