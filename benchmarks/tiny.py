"""The embedded default on this machine, all services as processes: frames per second, and live sessions."""

import asyncio
import tempfile
from pathlib import Path
from statistics import median

from tqdm import tqdm

from avatar.checkpoints.layouts import block_latents
from benchmarks.pipeline.client import Job, run_clients
from benchmarks.pipeline.live import ENOUGH, live_sessions, share_on_time
from benchmarks.pipeline.metrics import TooSlowError, next_to_try, rate_hz, steady
from benchmarks.row import Row, row
from benchmarks.standin.content import FRAME_RATE_HZ, Content
from services.local.launch import launched

ROUNDS = 5
OFFLINE_S, LIVE_S = 7.7, 4.3
FILL = 4
MOST = 8
LIMIT_S = 120.0


def rows(checkpoint: Path) -> list[Row]:
    """Measure one offline session's frame rate and time to first frame, and live sessions whose frames are on time."""
    return asyncio.run(_rows(checkpoint))


async def _rows(checkpoint: Path) -> list[Row]:
    made, (rates, firsts, most) = Content(block_latents(checkpoint)), ([], [], [])
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as folder:
        async with launched(checkpoint, Path(folder)) as suite:
            for _ in tqdm(range(ROUNDS), desc="tiny", disable=None):
                job = Job(
                    suite.gateway,
                    "full",
                    round(OFFLINE_S / made.block_s),
                    is_checked=False,
                    block_latents=made.block_latents,
                )
                session = (await run_clients(job, LIMIT_S)).sessions[0]
                arrived = session.arrived_s
                if session.refused or not arrived:
                    raise TooSlowError(session.refused or "the session received no block")
                firsts.append(arrived[0] - session.sent_s[0])
                rates.append(rate_hz(steady([arrived], FILL)[0]) * made.block_frames)
                ahead = int(rates[-1] / FRAME_RATE_HZ)  # an upper bound
                tried: dict[int, bool] = {}
                while (number := next_to_try(tried, 0, min(ahead, MOST))) is not None:
                    sessions = await live_sessions(
                        suite, number, round(LIVE_S / made.block_s), is_checked=False, content=made
                    )
                    tried[number] = share_on_time(sessions) >= ENOUGH
                most.append(max((number for number, passes in tried.items() if passes), default=0))
    return [
        row("tiny model, frames per second", median(rates), "Hz", note="one offline session"),
        row("tiny model, time to first frame", median(firsts), "s", note="from the first audio, offline"),
        row("tiny model, sessions in real time", median(most), "sessions", note="99.5 % of frames on time"),
    ]
