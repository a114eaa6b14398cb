"""Tests of services.local.launch: one suite of processes, its traces and metrics, and the loss of a worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from avatar.rpc.channel import channel
from avatar.worker.v1 import (
    audio_pb2,
    audio_pb2_grpc,
    denoiser_pb2,
    denoiser_pb2_grpc,
    vae_pb2,
    vae_pb2_grpc,
    voice_pb2,
    voice_pb2_grpc,
)
from docs.tables import instruments
from services.local.launch import launched
from services.local.processes import Suite
from tests.collector import Collector, collecting
from tests.conftest import speech
from tests.product import connected, frame, new_session, open_stream, pieces, rest, send, speak
from tests.refusals import refused
from tests.services.test_suite import SECONDS, rendered
from tests.test_operations import rows

IDLE_S = 2.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def collector() -> AsyncGenerator[Collector, None]:
    async with collecting() as collector:
        yield collector


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite(
    two_levels: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> AsyncGenerator[Suite, None]:
    """A running suite that exports its traces and metrics; the module's last tests break it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        patch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "500")
        patch.setenv("AVATAR_RESUME_S", "0.2")
        patch.setenv("AVATAR_REBUILD_S", "1")
        async with launched(two_levels, tmp_path_factory.mktemp("logs")) as suite:
            yield suite


async def active_streams(suite: Suite) -> dict[str, int]:
    """Return the number of open streams of each worker."""
    asking: dict[str, tuple[Any, Any]] = {
        "audio": (audio_pb2_grpc.AudioServiceStub, audio_pb2.AudioServiceGetInfoRequest()),
        "denoiser": (denoiser_pb2_grpc.DenoiserServiceStub, denoiser_pb2.DenoiserServiceGetInfoRequest()),
        "vae": (vae_pb2_grpc.VaeServiceStub, vae_pb2.VaeServiceGetInfoRequest()),
        "voice": (voice_pb2_grpc.VoiceServiceStub, voice_pb2.VoiceServiceGetInfoRequest()),
    }
    active = {}
    for name, target in suite.targets.items():
        if (service := name.partition("-")[0]) in asking:
            stub, request = asking[service]
            async with channel(target) as each:
                active[name] = (await stub(each).GetInfo(request, timeout=IDLE_S)).active
    return active


@pytest.mark.asyncio(loop_scope="module")
async def test_processes_give_the_same_frames_and_are_idle_when_a_client_vanishes(
    suite: Suite, two_levels: Path, picture: bytes
) -> None:
    assert len(suite.processes) == 7, "Redis, audio, two denoisers, vae, text, gateway"
    async with connected(suite.gateway) as stub:
        session = await new_session(stub, picture, seed=7)
        streamed = await speak(stub, session.id, speech(SECONDS))
        assert streamed.pixels == rendered(two_levels, picture, speech(SECONDS), seed=7)

        session = await new_session(stub, picture)
        call, _ = await open_stream(stub, session.id)
        await send(call, pieces(speech(SECONDS)))
        assert (await frame(call)).index == 3
        assert set((await active_streams(suite)).values()) == {1}
        call.cancel()
        started = time.monotonic()
        while any((await active_streams(suite)).values()):
            assert time.monotonic() - started < IDLE_S, f"still streaming: {await active_streams(suite)}"
            await asyncio.sleep(0.05)


@pytest.mark.asyncio(loop_scope="module")
async def test_spans_and_metrics_of_all_processes_are_those_in_the_documentation(
    suite: Suite, collector: Collector, picture: bytes
) -> None:
    async with connected(suite.gateway) as stub:
        await speak(stub, (await new_session(stub, picture, prompt="a person who reads")).id, speech(0.96))
    listed, units = rows("Traces"), {name: unit for name, unit, *_ in instruments()}
    usual = {"avatar.block.duration", "avatar.session.capacity", "avatar.session.closed", "avatar.time_to_first_frame"}

    def is_complete() -> bool:
        """Processes export at different times, so children may arrive before their parents."""
        ids = {span.span_id for span in collector.spans}
        needed = {span.parent_span_id for span in collector.spans} - {b""}
        needed |= {link.span_id for span in collector.spans for link in span.links}
        return (
            {span.name for span in collector.spans} == set(listed) and needed <= ids and usual <= set(collector.units)
        )

    async with asyncio.timeout(20):
        while not is_complete():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert collector.units.items() <= units.items()
    named = {span.span_id: span.name for span in collector.spans}
    for span in collector.spans:
        (parent, attributes, links) = listed[span.name]
        assert [named[each] for each in filter(None, [span.parent_span_id])] == parent
        assert sorted(each.key for each in span.attributes) == sorted(attributes)
        assert {named[each.span_id] for each in span.links} == set(links)


@pytest.mark.asyncio(loop_scope="module")
async def test_only_prompts_need_the_text_worker(suite: Suite, picture: bytes) -> None:
    async with connected(suite.gateway) as stub:
        sessions = [await new_session(stub, picture, seed=1, prompt=prompt) for prompt in ("", "a person who smiles")]
        none, one = [(await speak(stub, session.id, speech(0.48))).pixels for session in sessions]
        assert none != one
        suite.processes["text"].kill()
        await suite.processes["text"].wait()
        async with refused("STAGE_LOST") as refusal:
            await new_session(stub, picture, prompt="a person who weeps")
        assert refusal.metadata == {"stage": "text"}
        session = await new_session(stub, picture, seed=1)
        assert (await speak(stub, session.id, speech(0.48))).pixels == none


@pytest.mark.asyncio(loop_scope="module")
async def test_a_lost_worker_without_a_spare_ends_its_streams_with_its_name(suite: Suite, picture: bytes) -> None:
    async with connected(suite.gateway) as stub:
        session = await new_session(stub, picture)
        call, _ = await open_stream(stub, session.id)
        suite.processes["denoiser-1"].kill()
        with pytest.raises(grpc.aio.AioRpcError, match="denoiser-1") as caught:
            await rest(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    del suite.targets["denoiser-1"]
    await asyncio.sleep(0.5)
    assert not any((await active_streams(suite)).values())
