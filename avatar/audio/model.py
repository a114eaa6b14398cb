"""The streaming audio model: pieces of any size in, a block of features whenever its window is complete.

    AudioPiece --check, resample--> samples at 16 kHz --fill the window--> window --encoder--> Block (features)
               --heard------------> window of what has arrived --encoder--> Block (heard)
               both windows --loudness, phrases--> Block (face_motion)

A stream keeps the next block's windows, the resampler and some running numbers, however long it gets. Features do not
depend on how the audio was cut into pieces; those of the other person depend on which had arrived with a block's piece.
Both other inputs are made for networks that take them alone.

Axes: a audio channels, s samples, t encoder frames, l encoder layers, d width, f pixel frames.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from avatar.audio.alignment import FRAME_SAMPLES, RECEPTIVE_FIELD_SAMPLES, SAMPLE_RATE_HZ, BlockGrid
from avatar.audio.encoder import AudioEncoder
from avatar.audio.inputs.face_motion import FaceMotion
from avatar.audio.inputs.heard import HeardWindow
from avatar.audio.inputs.voice import levels
from avatar.audio.resample import LAG_S, MonoResampler, check_piece
from avatar.audio.statistics import NUM_BYTES, AudioStatistics
from avatar.audio.wav2vec2 import Wav2Vec2
from avatar.audio.whisper import Whisper
from avatar.checkpoints.part import Part
from avatar.types import AudioPiece, Block, HeardAudio, Session

# 2.56 s: twice the right context that fills wav2vec2's positional convolution.
MAX_RIGHT_FRAMES = 128
WARM_BLOCKS = 2
# Samples that a block's last encoder frame covers behind the block.
OVERLAP_SAMPLES = RECEPTIVE_FIELD_SAMPLES - FRAME_SAMPLES

ENCODERS: dict[str, type[AudioEncoder]] = {"whisper": Whisper, "wav2vec2": Wav2Vec2}


def load(part: Part, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> "AudioModel":
    """Return the audio model of a checkpoint's part; its config's `encoder` names one of ENCODERS.

    ValueError if there is no such encoder, or its config or weights do not fit.
    """
    name = part.config.get("encoder")
    if name not in ENCODERS:
        raise ValueError(f"{part.folder}: encoder is {name!r}, expected one of {', '.join(ENCODERS)}")
    # float32 is float32: TensorFloat-32, with 10 bits of its 23, is torch's default for a GPU's convolutions.
    torch.backends.cudnn.allow_tf32 = False
    return AudioModel(ENCODERS[name].load(part, dtype=dtype, device=device))


@dataclass(eq=False)
class AudioState:
    """The state of one audio stream.

    window: (s,) audio at 16 kHz of the next block's window, filled from the left; zeros where none has arrived yet.
    right_frames: right context, in encoder frames after a block.
    num_samples: samples at 16 kHz received so far.
    next_block: index of the block whose window is being filled.
    statistics: as of the last block.
    rate_hz: rate of the pieces; None before the first.
    resampler: None before the first piece, and after one with `completes`.
    preceding: (a, s) the end of the block that such a piece completed; it primes the next resampler.
    first_answer: the first block to encode; blocks before it only fill the window.
    has_ended: the last piece has arrived.
    heard: audio of the other person. heard_statistics: of it, as of the last block. encodes_heard: features of it are
        made. face_motion: None if the network takes none.
    """

    window: Tensor
    right_frames: int
    num_samples: int = 0
    next_block: int = 0
    statistics: AudioStatistics = field(default_factory=AudioStatistics)
    rate_hz: int | None = None
    resampler: MonoResampler | None = None
    preceding: Tensor | None = None
    first_answer: int = 0
    has_ended: bool = False
    heard: HeardWindow = field(default_factory=HeardWindow)
    heard_statistics: AudioStatistics = field(default_factory=AudioStatistics)
    encodes_heard: bool = False
    face_motion: FaceMotion | None = None

    def snapshot(self) -> bytes:
        """Return what a stream that is resumed after the last block goes on from, beside its audio."""
        own = self.statistics.to_bytes()
        if self.face_motion is None and not self.encodes_heard:
            return own
        return own + self.heard_statistics.to_bytes() + (self.face_motion.to_bytes() if self.face_motion else b"")


class AudioModel:
    """A streaming model (`avatar.runtime.pipeline.StreamingModel`) around an audio encoder.

    grid: the blocks that it makes.
    history_s: seconds of audio before a block from which `resume` rebuilds a stream's state; whole blocks.
    lookahead_s: seconds of audio after a block that its features need, unless the session sets another right context.
    max_right_frames: the longest right context that sessions may set, in encoder frames; 0 if they may not.
    """

    def __init__(self, encoder: AudioEncoder) -> None:
        self.encoder, self.grid = encoder, encoder.grid
        block_samples = self.grid.samples
        # The other's window has no right context, and reaches back so much further.
        self._window_samples = encoder.left_samples + self.grid.window_end(0, encoder.right_frames)
        heard_samples = self._window_samples - OVERLAP_SAMPLES + round(LAG_S * SAMPLE_RATE_HZ)
        heard_blocks = math.ceil(heard_samples / block_samples) - 1
        # One block more than the window: a resampler that starts there needs a block to settle.
        own_blocks = math.ceil(encoder.left_samples / block_samples) + 1
        self.history_s = max(own_blocks, heard_blocks) * block_samples / SAMPLE_RATE_HZ
        self.max_right_frames = MAX_RIGHT_FRAMES if encoder.right_is_free else 0
        self.lookahead_s = (self.grid.window_end(0, encoder.right_frames) - block_samples) / SAMPLE_RATE_HZ

    def open(self, session: Session, inputs: Collection[str] = (), statistics: bytes = b"") -> AudioState:
        """Return the state of a new stream.

        inputs: those of `NetworkConfig.inputs` to make. statistics: `Block.statistics` of the block before the first;
        empty if there is none. ValueError if they do not fit, or the encoder cannot use the session's right context.
        """
        right_frames = self.encoder.right_frames
        if session.audio_right_frames is not None:
            if not self.max_right_frames:
                raise ValueError(f"this encoder needs {right_frames} frames after a block; no other number works")
            right_frames = session.audio_right_frames
            if not 0 <= right_frames <= self.max_right_frames:
                raise ValueError(f"right context must be 0 to {self.max_right_frames} frames, got {right_frames}")
        window = torch.zeros(self.encoder.left_samples + self.grid.window_end(0, right_frames))
        state = AudioState(window, right_frames, encodes_heard="heard" in inputs)
        own, heard, motion = statistics[:NUM_BYTES], statistics[NUM_BYTES : 2 * NUM_BYTES], statistics[2 * NUM_BYTES :]
        if own:
            state.statistics = AudioStatistics.from_bytes(own)
        if heard:
            state.heard_statistics = AudioStatistics.from_bytes(heard)
        if "face_motion" in inputs:
            state.face_motion = FaceMotion(session.seed, motion)
        return state

    def resume(
        self,
        session: Session,
        first_block: int,
        first_answer: int,
        statistics: bytes,
        inputs: Collection[str] = (),
    ) -> AudioState:
        """Return the state of a stream that continues a lost stream of the same session.

        first_block: the block that the first piece starts with, `history_s` before first_answer or the session's start.
        first_answer: the first block to answer with. statistics, inputs: as in `open`.
        The blocks are those of the lost stream, byte for byte, if the audio's rate is a multiple of 25 Hz.
        ValueError if the arguments do not fit together, or as in `open`.
        """
        if not 0 <= first_block <= first_answer:
            raise ValueError(f"a stream cannot start at block {first_block} to answer from block {first_answer} on")
        state = self.open(session, inputs, statistics)
        state.num_samples, state.next_block = first_block * self.grid.samples, first_block
        state.first_answer = first_answer
        return state

    @torch.no_grad()
    def step(self, piece: AudioPiece, state: AudioState) -> list[Block]:
        """Return the blocks that this piece completes, in order; their features are (l, d, f) float32.

        The last piece completes the block in which it ends, as if silence followed. ValueError if the audio is invalid,
        changes its rate, comes after the last piece, or `completes` a block that it does not end; the state is then
        unchanged.
        """
        if state.has_ended:
            raise ValueError("the audio of this stream has ended; open another session for more")
        check_piece(piece)
        if state.rate_hz not in (None, piece.rate_hz):
            raise ValueError(f"audio must keep its rate of {state.rate_hz} Hz, got {piece.rate_hz}")
        if piece.completes is not None:
            return self._complete(piece, piece.completes, state)
        self._listen(piece, state)
        blocks = self._fill(self._resample(piece.samples, state, piece), state)
        if piece.is_last:
            state.has_ended = True
            num_blocks = -(-state.num_samples // self.grid.samples)
            end = self.grid.window_end(num_blocks - 1, state.right_frames) if num_blocks else 0
            blocks += self._fill(torch.zeros(end - state.num_samples), state)
        return blocks

    def _listen(self, piece: AudioPiece, state: AudioState) -> None:
        """Keep the audio of the other person that comes with a piece, if an input is made of it."""
        if not (state.encodes_heard or state.face_motion):
            return
        # A resampler holds own samples back.
        new_s = piece.samples.shape[1] / piece.rate_hz + LAG_S
        end = state.num_samples + math.ceil(new_s * SAMPLE_RATE_HZ)
        for heard in piece.heard:
            state.heard.add(heard, end)

    def warm(self, *, listens: bool = False) -> int:
        """Encode WARM_BLOCKS blocks of faint noise, and return that number; silence may take no time.

        listens: encode as much of the other person's audio, too.
        """
        state = self.open(Session("warm", 0, torch.zeros(0)), ("heard",) * listens)
        noise = 1e-3 * torch.randn(1, self.grid.samples, generator=torch.Generator().manual_seed(0))
        for index in range(WARM_BLOCKS):
            heard = HeardAudio(noise, SAMPLE_RATE_HZ, index * self.grid.samples)
            self.step(AudioPiece(noise, SAMPLE_RATE_HZ, completes=index, heard=[heard]), state)
        return WARM_BLOCKS

    def _complete(self, piece: AudioPiece, index: int, state: AudioState) -> list[Block]:
        """Encode the blocks up to `index`, with as much right context as the piece has; the rest of it is silence.

        The stream continues at the block's end: the audio after it (`piece.behind`) comes again.
        """
        behind = torch.zeros(piece.samples.shape[0], 0) if piece.behind is None else piece.behind
        check_piece(replace(piece, samples=behind))
        missing = (index + 1) * self.grid.samples - state.num_samples
        given = piece.samples.shape[1] * SAMPLE_RATE_HZ / piece.rate_hz
        # A running resampler still holds samples back, and at rates that are no multiple of 25 Hz blocks end between
        # samples: `given` may be up to 2 too many or a resampler's lag too few.
        if index < state.next_block - 1 or not given - 2 <= missing <= given + LAG_S * SAMPLE_RATE_HZ:
            raise ValueError(f"block {index} cannot be completed by {given:g} samples after {state.num_samples}")
        self._listen(piece, state)
        audio = self._resample(torch.cat([piece.samples, behind], 1), state, replace(piece, is_last=True))
        needed = self.grid.window_end(index, state.right_frames) - state.num_samples
        blocks = self._fill(functional.pad(audio[:needed], (0, max(0, needed - len(audio)))), state)
        state.num_samples = (index + 1) * self.grid.samples
        state.preceding = piece.samples[:, -(piece.rate_hz // 25) :] if piece.samples.shape[1] else None
        state.resampler = None
        return blocks

    def _resample(self, samples: Tensor, state: AudioState, piece: AudioPiece) -> Tensor:
        """Resample samples (a, s) of the piece's rate; returns what is ready, (s,) mono at 16 kHz."""
        state.rate_hz = piece.rate_hz
        if state.resampler is None:
            if not samples.shape[1]:
                return torch.zeros(0)
            state.resampler = MonoResampler(piece.rate_hz, self.grid.samples, state.preceding)
        return state.resampler(samples, piece.is_last)

    def _fill(self, audio: Tensor, state: AudioState) -> list[Block]:
        """Fill windows with audio (s,) at 16 kHz, and encode those that are complete."""
        blocks = []
        while len(audio):
            missing = self.grid.window_end(state.next_block, state.right_frames) - state.num_samples
            start = len(state.window) - missing
            taken, audio = audio[:missing], audio[missing:]
            state.window[start : start + len(taken)] = taken
            state.num_samples += len(taken)
            if len(taken) == missing:
                if state.next_block >= state.first_answer:
                    blocks.append(self._encode(state))
                state.window = state.window.roll(-self.grid.samples)
                state.next_block += 1
        return blocks

    def _encode(self, state: AudioState) -> Block:
        """Encode the next block, whose window is complete."""
        index = state.next_block
        window = state.window[max(0, len(state.window) - state.num_samples) :]
        new = window[-self.grid.samples :] if index else window
        statistics = state.statistics.with_samples(new)
        states, state.statistics = self.encoder.encode(window, statistics, state.right_frames)
        block = Block(index, interpolate(states, index, self.grid).cpu())
        if state.encodes_heard or state.face_motion:
            behind = OVERLAP_SAMPLES + state.right_frames * FRAME_SAMPLES
            block = self._with_inputs(block, state.window[-behind - self.grid.samples : -behind], state)
        return replace(block, statistics=state.snapshot())

    def _with_inputs(self, block: Block, own: Tensor, state: AudioState) -> Block:
        """Return the block with the inputs that the network takes beside features. own: (s,) the block's own audio.

        The other's window ends with the block, so there is no right context to wait for.
        """
        window = state.heard.window((block.index + 1) * self.grid.samples, self._window_samples - OVERLAP_SAMPLES)
        heard = torch.zeros(self.grid.samples) if window is None else window[-self.grid.samples :]
        if state.encodes_heard and window is not None:
            statistics = state.heard_statistics.with_samples(heard)
            padded = functional.pad(window, (0, OVERLAP_SAMPLES))
            states, state.heard_statistics = self.encoder.encode(padded, statistics, right_frames=0)
            block = replace(block, heard=interpolate(states, block.index, self.grid).cpu())
        if state.face_motion is not None:
            block = replace(block, face_motion=state.face_motion.advance(levels(own), levels(heard)))
        return block


def interpolate(states: Tensor, index: int, grid: BlockGrid) -> Tensor:
    """Interpolate encoder states to the pixel frames of block `index`: features (l, d, f).

    states: (l, t, d) at 50 Hz, whose last frame is the block's last.
    """
    frames, weights = grid.frame_weights(index)
    before = torch.tensor(frames) - (index + 1) * grid.encoder_frames  # counted from the end
    features = states[:, before].lerp(states[:, before + 1], rearrange(torch.tensor(weights), "f -> f 1").to(states))
    return rearrange(features, "l f d -> l d f").contiguous()
