"""A stand-in worker's process: `python -m benchmarks.standin STAGE --listen HOST:PORT --step-s SECONDS [--level N]`."""

import argparse
import asyncio

from avatar.rpc.server import Servicer, serving, until_stopped
from avatar.runtime.device_queue import DeviceQueue
from avatar.types import BLOCK_LATENTS
from benchmarks.standin.content import NUM_LEVELS, Content
from benchmarks.standin.service import AudioServicer, DenoiserServicer, Stage, VaeServicer
from benchmarks.standin.step import Step, set_timer_slack

# Past blocks that rebuild a stream: the public 14B network's window, and the decoder's history.
HISTORY_BLOCKS = {"audio": 3, "denoiser": 3, "vae": 10}


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.standin", description=(__doc__ or "").strip())
    parser.add_argument("stage", choices=tuple(HISTORY_BLOCKS))
    parser.add_argument("--listen", required=True, help="HOST:PORT to serve at")
    parser.add_argument("--step-s", type=float, required=True, help="seconds that a block takes")
    parser.add_argument("--level", type=int, default=0, choices=range(NUM_LEVELS), help="of a denoiser")
    parser.add_argument("--levels", type=int, default=NUM_LEVELS, help="number of levels")
    parser.add_argument("--block-latents", type=int, default=BLOCK_LATENTS, help="latent frames of a block")
    parser.add_argument("--lookahead-s", type=float, default=0.0, help="seconds of audio after a block that it needs")
    parser.add_argument("--capacity", type=int, default=64, help="streams at a time")
    flags = parser.parse_args()
    set_timer_slack()
    made = Content(flags.block_latents, flags.levels)
    with DeviceQueue() as queue:
        stage = Stage(flags.stage, Step(flags.step_s), queue, flags.capacity, HISTORY_BLOCKS[flags.stage], made)
        async with serving(flags.listen, _servicer(flags.stage, stage, flags.level, flags.lookahead_s)):
            await until_stopped()


def _servicer(name: str, stage: Stage, level: int, lookahead_s: float) -> Servicer:
    if name == "audio":
        return AudioServicer(stage, lookahead_s)
    return VaeServicer(stage) if name == "vae" else DenoiserServicer(stage, level)


if __name__ == "__main__":
    asyncio.run(main())
