"""Denoisers whose steps take simulated time, behind the real service: `python -m tests.services.event_time`.

Nothing waits. Times are computed as events and travel with the data, so a busy machine does not change them: a latent
holds the time at which its step ended, features hold the time at which their audio arrived, and a sink or a text holds
the time at which it became known. A device runs one job at a time, each in the first gap that is long enough.

A latent's first channel is that time, its second one the largest number of prefills of any process on its way.
"""

import os
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from avatar.denoiser.attention import condition_positions
from avatar.denoiser.cache import KeysValues, Prefilled, Prefills
from avatar.denoiser.config import NetworkConfig, tiny
from avatar.denoiser.denoiser import Denoiser, DenoiserState
from avatar.rpc.server import serving, until_stopped
from avatar.runtime.device_queue import DeviceQueue
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from avatar.types import Block, Conditions
from services.denoiser.service import DenoiserServicer
from services.process import run

STEP_S, PREFILL_S = 0.25, 0.15
SIDE = 8
DIGEST = "event-time"
CONFIG = replace(
    tiny(),
    in_dim=2,
    out_dim=2,
    cond_dim=2,
    dim=48,
    num_heads=2,
    num_layers=1,
    text_dim=4,
    text_len=2,
    audio_dim=1,
    num_encoder_layers=1,
    audio_inject_layers=(0,),
    num_frames_per_block=1,
    window_latents=4,
    pose="zeros",
    # With four levels, block 0 is done when block 4 can start: nothing but the update's prefill stops the pipeline.
    sink_update_block=4,
)


class SimulatedNetwork:
    """A network of one device. not_before: earliest start of a prefill, beside the time when its input was known."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, config: NetworkConfig) -> None:
        self.config = config
        self.num_prefills = 0
        self.not_before = 0.0
        self._busy: list[tuple[float, float]] = []

    def run(self, ready_s: float, duration_s: float) -> float:
        """Return the end of a job that starts in the first gap that is long enough."""
        start_s = ready_s
        for busy_start_s, busy_end_s in sorted(self._busy):
            if start_s + duration_s <= busy_start_s + 1e-6:
                break
            start_s = max(start_s, busy_end_s)
        self._busy.append((start_s, start_s + duration_s))
        return start_s + duration_s

    def embed_time(self, timesteps: Tensor) -> Tensor:
        return timesteps

    def embed_text(self, text: Tensor) -> list[KeysValues]:
        """Return the time at which the text was known, in place of keys and values."""
        return [(text.max() if text.numel() else torch.zeros(()), torch.zeros(()))]

    def prefill(self, reference: Tensor, _: Tensor, text: list[KeysValues]) -> list[KeysValues]:
        """Put the end of the prefill into the text, and return empty keys and values."""
        self.num_prefills += 1
        known_s = text[0][0]
        known_s.fill_(self.run(max(known_s.item(), reference[:, 0].max().item(), self.not_before), PREFILL_S))
        shape = 1, len(condition_positions(SIDE, SIDE)), self.config.num_heads, self.config.head_dim
        return [(torch.zeros(shape), torch.zeros(shape))]

    def read_texture(self, _: Tensor) -> None:
        """A simulated network has no mover."""


class SimulatedDenoiser(Denoiser):
    """A level on a simulated network."""

    def __init__(self, network: SimulatedNetwork, level: int, prefills: Prefills) -> None:
        super().__init__(network, network.config, level, prefills=prefills)  # type: ignore[arg-type]
        self._simulated = network
        self._ended_s: WeakKeyDictionary[DenoiserState, float] = WeakKeyDictionary()

    def prefill(self, conditions: Conditions, state: DenoiserState) -> None:
        self._simulated.not_before = 0.0
        super().prefill(conditions, state)

    def step(self, block: Block, state: DenoiserState) -> Block:
        self._simulated.not_before = self._ready_s(block, state)
        return super().step(block, state)

    def _ready_s(self, block: Block, state: DenoiserState) -> float:
        """Return when the block's input had arrived and the stream's block before it had ended."""
        given = block.features if block.latent is None else block.latent[0]
        return max(given.max().item(), self._ended_s.get(state, 0.0))

    def _denoise(self, block: Block, prefilled: Prefilled, state: DenoiserState) -> tuple[Tensor, None]:
        ready_s = max(self._ready_s(block, state), prefilled.text[0][0].item())
        self._ended_s[state] = end_s = self._simulated.run(ready_s, STEP_S)
        before = 0.0 if block.latent is None else block.latent[1].max().item()
        latent = torch.full((2, 1, SIDE, SIDE), end_s)
        latent[1] = max(before, self._simulated.num_prefills)
        return latent, None


def servicer(levels: list[int], store: SessionStore, queue: DeviceQueue) -> DenoiserServicer:
    """Return the service of some levels on a device of their own."""
    network, prefills = SimulatedNetwork(CONFIG), Prefills()
    denoisers = {level: SimulatedDenoiser(network, level, prefills) for level in levels}
    return DenoiserServicer(denoisers, DIGEST, store, queue, capacity=8)


async def main() -> None:
    """Serve AVATAR_LEVELS at AVATAR_LISTEN."""
    store = SessionStore(RedisHashes(os.environ["AVATAR_REDIS_URL"]))
    levels = [int(level) for level in os.environ["AVATAR_LEVELS"].split(",")]
    try:
        with DeviceQueue() as queue:
            async with serving(os.environ["AVATAR_LISTEN"], servicer(levels, store, queue)):
                await until_stopped()
    finally:
        await store.aclose()


if __name__ == "__main__":
    run(main)
