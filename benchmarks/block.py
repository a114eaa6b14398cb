"""What a block of 480 ms costs: sound, every level, and decoding, in each precision, compiled and not."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from avatar.audio import model as audio_model
from avatar.audio.alignment import BLOCK_SAMPLES, SAMPLE_RATE_HZ
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
BLOCK_MS = BLOCK_SAMPLES / SAMPLE_RATE_HZ * 1000
PARTS = ("audio", "denoiser", "decoding")
# What this processor has instructions for; without them bfloat16 takes minutes, and nobody would use it.
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if is_native(dtype, torch.device("cpu"))]


@dataclass
class Stream:
    """One variant's stream of a still grey picture and noise as sound; `times_ms` of each part, block by block.

    The window is full before anything is timed.
    """

    checkpoint: Path
    dtype: torch.dtype
    compiled: bool
    times_ms: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def __post_init__(self) -> None:
        self.audio = audio_model.load(open_part(self.checkpoint, "audio"), dtype=self.dtype)
        network, config = denoiser_model.load(open_part(self.checkpoint, "denoiser"), dtype=self.dtype)
        if self.compiled:
            compile_layers(network)
        self.levels = [Denoiser(network, config, level) for level in range(config.num_levels)]
        self.vae = vae_model.load(open_part(self.checkpoint, "vae"), dtype=self.dtype)
        motion = self.vae.encode_picture(torch.full((128, 128, 3), 128, dtype=torch.uint8))
        session = Session("bench", 0, motion)
        self.conditions = Conditions(0, motion[:, :1], torch.zeros(0, 0))
        self.hearing, self.decoding = self.audio.open(session), self.vae.open(session)
        self.histories = [level.open(session) for level in self.levels]
        for _ in range(config.window_blocks + 1):
            self.step()
        for times in self.times_ms.values():
            times.clear()

    @property
    def name(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{', compiled' if self.compiled else ''}"

    def step(self) -> None:
        """A piece of sound as long as a block, and the blocks that it completes."""
        piece = AudioPiece(torch.randn(1, BLOCK_SAMPLES) * 0.1, SAMPLE_RATE_HZ)
        for heard in self._timed("audio", self.audio.step, piece, self.hearing):
            block = self._timed("denoiser", self._denoise, heard)
            self._timed("decoding", self.vae.step, block, self.decoding)

    def _denoise(self, block: Block) -> Block:
        block = replace(block, conditions=self.conditions)
        for level, history in zip(self.levels, self.histories, strict=True):
            block = level.step(block, history)
        return block

    def _timed(self, part: str, work: Callable[..., Out], *arguments: Any) -> Out:
        started = time.thread_time()
        made = work(*arguments)
        self.times_ms[part].append((time.thread_time() - started) * 1000)
        return made


def rows(checkpoint: Path, *, compiled: bool) -> list[Row]:
    """Milliseconds a block of each part and of all, for each variant; blocks of the variants take turns."""
    variants = [(dtype, is_compiled) for is_compiled in (False, True) for dtype in DTYPES]
    made: list[Row] = []
    streams: list[Stream] = []
    for dtype, is_compiled in variants:
        if compiled or not is_compiled:
            started = time.perf_counter()
            streams.append(stream := Stream(checkpoint, dtype, is_compiled))
            if is_compiled:
                made.append(row(f"start and compilation, {stream.name}", time.perf_counter() - started, "s"))
    for _ in tqdm(range(NUM_BLOCKS), desc="blocks", disable=None):
        for stream in streams:
            stream.step()
    for stream in streams:
        parts = {part: median(times) for part, times in stream.times_ms.items()}
        made += [row(f"{part}, {stream.name}", value, "ms") for part, value in parts.items()]
        made.append(row(f"block, {stream.name}", sum(parts.values()), "ms", at_most=BLOCK_MS))
    return made
