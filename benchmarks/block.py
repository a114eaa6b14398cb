"""The cost of a block: audio, all levels, and decoding, in each precision, compiled and not."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from avatar.audio import model as audio_model
from avatar.audio.alignment import SAMPLE_RATE_HZ
from avatar.checkpoints.files import is_native
from avatar.checkpoints.layouts import open_part
from avatar.denoiser import model as denoiser_model
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.speed import compile_layers
from avatar.types import AudioPiece, Block, Conditions, Session
from avatar.vae import vae as vae_model
from benchmarks.row import Row, row

Out = TypeVar("Out")
NUM_BLOCKS = 15
PARTS = ("audio", "denoiser", "decoding")
PORTRAIT = Path(__file__).parents[1] / "assets/portrait.png"
# Only dtypes that this CPU has instructions for: emulated bfloat16 takes minutes.
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if is_native(dtype, torch.device("cpu"))]


@dataclass
class Stream:
    """One variant's stream of a portrait and noise as audio, without audio of another person.

    times_ms: time of each part, block by block. The window is full before anything is timed.
    """

    checkpoint: Path
    dtype: torch.dtype
    compiled: bool
    times_ms: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def __post_init__(self) -> None:
        self.audio = audio_model.load(open_part(self.checkpoint, "audio"), dtype=self.dtype)
        network = denoiser_model.load(open_part(self.checkpoint, "denoiser"), dtype=self.dtype)
        if self.compiled:
            compile_layers(network)
        self.levels = [Denoiser(network, network.config, level) for level in range(network.config.num_levels)]
        self.vae = vae_model.load(open_part(self.checkpoint, "vae"), dtype=self.dtype)
        motion = self.vae.encode_picture(self.vae.read_picture(PORTRAIT.read_bytes()).rgb)
        session = Session("bench", 0, motion)
        self.conditions = Conditions(0, motion[:, :1], torch.zeros(0, 0))
        inputs = [name for name in network.config.inputs if name != "heard"]
        self.audio_state, self.vae_state = self.audio.open(session, inputs), self.vae.open(session)
        self.level_states = [level.open(session) for level in self.levels]
        for _ in range(network.config.window_blocks + 1):
            self.step()
        for times in self.times_ms.values():
            times.clear()

    @property
    def name(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{', compiled' if self.compiled else ''}"

    @property
    def block_ms(self) -> float:
        """Duration of a block."""
        return self.audio.grid.samples / SAMPLE_RATE_HZ * 1000

    def step(self) -> None:
        """Process a block's length of audio, and the blocks that it completes."""
        piece = AudioPiece(torch.randn(1, self.audio.grid.samples) * 0.1, SAMPLE_RATE_HZ)
        for features in self._timed("audio", self.audio.step, piece, self.audio_state):
            block = self._timed("denoiser", self._denoise, features)
            self._timed("decoding", self._decode, block)

    def _decode(self, block: Block) -> None:
        for _ in self.vae.decode(block, self.vae_state):
            pass

    def _denoise(self, block: Block) -> Block:
        block = replace(block, conditions=self.conditions)
        for level, state in zip(self.levels, self.level_states, strict=True):
            block = level.step(block, state)
        return block

    def _timed(self, part: str, work: Callable[..., Out], *arguments: Any) -> Out:
        started = time.thread_time()
        result = work(*arguments)
        self.times_ms[part].append((time.thread_time() - started) * 1000)
        return result


def rows(checkpoint: Path, *, compiled: bool) -> list[Row]:
    """Measure each part of a block and the whole, for each variant; the variants take turns block by block."""
    variants = [(dtype, is_compiled) for is_compiled in (False, True) for dtype in DTYPES]
    measured: list[Row] = []
    streams: list[Stream] = []
    for dtype, is_compiled in variants:
        if compiled or not is_compiled:
            started = time.perf_counter()
            streams.append(stream := Stream(checkpoint, dtype, is_compiled))
            if is_compiled:
                measured.append(row(f"start and compilation, {stream.name}", time.perf_counter() - started, "s"))
    for _ in tqdm(range(NUM_BLOCKS), desc="blocks", disable=None):
        for stream in streams:
            stream.step()
    for stream in streams:
        parts = {part: median(times) for part, times in stream.times_ms.items()}
        measured += [row(f"{part}, {stream.name}", value, "ms") for part, value in parts.items()]
        measured.append(row(f"block, {stream.name}", sum(parts.values()), "ms", at_most=stream.block_ms))
    return measured
