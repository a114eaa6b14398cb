"""How many sessions' blocks a device should step in one pass: measured, before the first stream."""

import time

import torch

from avatar.denoiser.attention import REFERENCE_FRAME
from avatar.denoiser.denoiser import Denoiser, DenoiserState, blank_block, blank_session

# A doubling must save this share of the time of a block. Less is not worth that all of a pass come when it ends, nor
# that numbers then depend, in their last digits, on who else was waiting.
MARGIN = 0.2
# Of so many passes the fastest counts: what else the machine does makes none faster.
NUM_PASSES = 3


def batch_that_pays(denoiser: Denoiser, height: int, width: int, most: int) -> int:
    """The number of blocks of latents of this size to step in one pass: 1, 2, 4 ... up to most, as far as it pays.

    A pass of twice as many is tried, and its states made, only where half as many have paid.
    """
    states = [first := _filled(denoiser, height, width)]
    best, best_s = 1, _pass_s(denoiser, states)
    while 2 * best <= most:
        states += [_filled(denoiser, height, width, first) for _ in range(best)]
        block_s = _pass_s(denoiser, states) / len(states)
        if block_s > (1 - MARGIN) * best_s:
            break
        best, best_s = len(states), block_s
    return best


def _filled(denoiser: Denoiser, height: int, width: int, like: DenoiserState | None = None) -> DenoiserState:
    """A stream with a full window of nothing; under another's conditions, as if it had prefilled them itself."""
    config = denoiser.config
    state = denoiser.open(blank_session(config, height, width))
    if like is None:
        denoiser.step(blank_block(config, 0, height, width), state)
    else:
        state.prefilled = like.prefilled
    for index in range(config.window_blocks):
        state.cache.begin(index, REFERENCE_FRAME)
    state.next_index = config.window_blocks
    return state


def _pass_s(denoiser: Denoiser, states: list[DenoiserState]) -> float:
    """Seconds of a pass of all."""
    height, width = states[0].size
    # One thread's own time, where it does all the work, is touched least by others on the machine.
    is_alone = denoiser.network.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if is_alone else time.perf_counter
    passes = []
    for _ in range(1 + NUM_PASSES):
        blocks = [blank_block(denoiser.config, state.next_index or 0, height, width) for state in states]
        started = clock()
        latent = denoiser.step_many(blocks, states)[-1].latent
        assert latent is not None
        latent.cpu()  # a GPU has done its work when this is there
        passes.append(clock() - started)
    return min(passes[1:])  # the first is cold
