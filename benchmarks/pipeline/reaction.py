"""Reaction of a live stream and the gateway's promise: a click from a microphone, and a sentence that is sent at once.

Over stand-in stages of 20 ms, each a process, and over the embedded default, all services in one process. Values are
wall time from the sending of the piece that carries the sound to the arrival of the first frame of speech.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import grpc.aio

from avatar.checkpoints.layouts import open_part
from avatar.denoiser.config import NetworkConfig
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from benchmarks.live import LiveClient, all_services
from benchmarks.pipeline.metrics import percentile
from benchmarks.pipeline.suite import standin_suite
from benchmarks.row import Row, row
from benchmarks.standin.content import PUBLIC, SHORT

STEP_S = 0.02
# The embedded default's, and about that of every encoder of speech.
LOOKAHEAD_S = 0.1
# Each takes seconds longer where the deployment is slower than real time.
TRIALS, SLOW_TRIALS = 20, 6
SETTLE_S, IDLE_S, LIMIT_S = 2.0, 0.6, 180.0
# Targets of the 95th percentile for short blocks over stand-ins: from a microphone, and sent at once.
TARGETS_S = 0.40, 0.20
# Allowance on the promise, for the others' 95th percentile.
MARGIN_S = 0.03


def standin_rows() -> list[Row]:
    """Measure reactions over stand-in stages, for blocks of 160 and 480 ms."""
    return asyncio.run(_standins())


def default_rows(checkpoint: Path) -> list[Row]:
    """Measure reactions of the embedded default. checkpoint: its folder."""
    return asyncio.run(_default(checkpoint))


async def _standins() -> list[Row]:
    found: list[Row] = []
    for content in (SHORT, PUBLIC):
        async with (
            standin_suite(STEP_S, content=content, lookahead_s=LOOKAHEAD_S) as suite,
            grpc.aio.insecure_channel(suite.gateway) as channel,
        ):
            targets_s = TARGETS_S if content is SHORT else None
            name = f"stages of {STEP_S * 1e3:g} ms, {_words(content.block_s, content.num_levels)}"
            found += reaction_rows(name, *await _reactions(pb_grpc.AvatarServiceStub(channel)), targets_s)
    return found


async def _default(checkpoint: Path) -> list[Row]:
    config = NetworkConfig.from_dict(open_part(checkpoint, "denoiser").config)
    async with all_services(checkpoint) as stub:
        name = f"embedded default, {_words(config.block_s, config.num_levels)}"
        return reaction_rows(name, *await _reactions(stub))


async def _reactions(
    stub: "pb_grpc.AvatarServiceAsyncStub",
) -> tuple[pb.GetCapabilitiesResponse, list[float], list[float]]:
    """Return what the gateway promises, and the seconds of both reactions, at different positions within a block."""
    promised = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
    block_s = promised.block_frames / promised.video.frame_rate_hz
    num_trials = TRIALS if promised.reaction_s else SLOW_TRIALS
    clicks, sentences = list[float](), list[float]()
    async with asyncio.timeout(LIMIT_S):
        client = await LiveClient.open(stub)
        await client.idle(SETTLE_S)
        for trial in range(num_trials):
            for values, speak in ((clicks, client.click), (sentences, client.sentence)):
                await client.idle(IDLE_S + block_s * trial / num_trials)
                values.append(await speak())
                await client.interrupt()
        client.call.cancel()
    return promised, clicks, sentences


def reaction_rows(
    name: str,
    promised: pb.GetCapabilitiesResponse,
    clicks: Sequence[float],
    sentences: Sequence[float],
    targets_s: tuple[float, float] | None = None,
) -> list[Row]:
    """Return the percentiles of both reactions beside the promise.

    targets_s: largest allowed; by default the promise and a margin, and none where nothing is promised.
    """
    found = []
    note = "bound: promised"
    if not promised.reaction_s:
        note = f"nothing promised: {promised.sustained_rate:.2f} of real time is sustained"
    for number, (sound, values, bound) in enumerate(
        (("microphone", clicks, promised.reaction_s), ("sent at once", sentences, promised.reaction_ahead_s))
    ):
        target = targets_s[number] if targets_s else bound + MARGIN_S if bound else None
        for percent in (50, 95):
            figure = f"reaction, {sound}, {name}: p{percent}"
            value = percentile(values, percent)
            found.append(row(figure, value, "s", at_most=target, bound=bound or None, note=note))
    return found


def _words(block_s: float, num_levels: int) -> str:
    return f"blocks of {block_s * 1e3:.0f} ms, {num_levels} levels"
