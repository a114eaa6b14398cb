"""What sessions that share a device cost: blocks of several in one pass, over as many passes of one."""

import time
from pathlib import Path
from statistics import median

from tqdm import tqdm

from avatar.checkpoints.layouts import open_part
from avatar.denoiser import model as denoiser_model
from avatar.denoiser.denoiser import Denoiser, DenoiserState, blank_block, blank_session
from benchmarks.block import DTYPES
from benchmarks.row import Row, row

NUM_PASSES = 5
SIZE = (16, 16)
SESSIONS = (1, 2, 4, 8)


def rows(checkpoint: Path) -> list[Row]:
    """The time of a block in a pass of several sessions over that of a block alone; passes take turns."""
    made: list[Row] = []
    for dtype in DTYPES:
        network, config = denoiser_model.load(open_part(checkpoint, "denoiser"), dtype=dtype)
        denoiser = Denoiser(network, config, level=1)
        streams = [denoiser.open(blank_session(config, *SIZE)) for _ in range(max(SESSIONS))]
        for index in range(config.window_blocks):
            for state in streams:
                denoiser.step(blank_block(config, index, *SIZE), state)
        times: dict[int, list[float]] = {number: [] for number in SESSIONS}
        name = str(dtype).removeprefix("torch.")
        for _ in tqdm(range(NUM_PASSES), desc=f"passes, {name}", disable=None):
            for number in SESSIONS:
                times[number].append(_block_s(denoiser, streams[:number]))
        alone_s = median(times[1])
        made += [row(f"block in a pass of {n}, {name}", median(times[n]) / alone_s, "x alone") for n in SESSIONS[1:]]
    return made


def _block_s(denoiser: Denoiser, states: list[DenoiserState]) -> float:
    """CPU time of a block of a pass of all."""
    blocks = [blank_block(denoiser.config, state.next_index or 0, *SIZE) for state in states]
    started = time.thread_time()
    denoiser.step_many(blocks, states)
    return (time.thread_time() - started) / len(states)
