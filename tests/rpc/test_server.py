"""Tests of avatar.rpc.server."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from avatar.rpc.channel import channel
from avatar.rpc.interceptor import Context
from avatar.rpc.server import Servicer, serving, until_stopped
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import AudioSettings, DenoiserSettings, GatewaySettings, TextSettings, VaeSettings
from avatar.store.sessions import SessionStore
from avatar.worker.v1 import audio_pb2_grpc
from services.audio.__main__ import build as build_audio
from services.denoiser.__main__ import build as build_denoiser
from services.gateway.access.quotas import Quotas
from services.gateway.cell import Cell
from services.gateway.live_sessions import LiveSessions
from services.gateway.service import AvatarServicer
from services.gateway.workers import Workers
from services.text.__main__ import build as build_text
from services.vae.__main__ import build as build_vae
from tests.rpc.conftest import CLOSE, OPEN, OPENED, WAIT_S, Requests, Responses, Worker, numbered

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(connection: grpc.aio.Channel) -> Any:
    """Return a stub of the standard health service, which has no types."""
    return health_pb2_grpc.HealthStub(connection)


async def test_a_second_server_at_the_same_port_is_refused(worker: Worker) -> None:
    with pytest.raises(ValueError, match=f"cannot listen at {worker.target}"):
        async with serving(worker.target, Worker()):
            pass


async def test_open_streams_get_time_to_end() -> None:
    worker, going_on = Worker(), asyncio.Event()

    async def slow(requests: Requests, context: Context) -> Responses:
        async for response in numbered(requests, context):
            yield response
            await going_on.wait()

    worker.encode = slow
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(serving("127.0.0.1:0", worker, drain_s=WAIT_S))
        async with channel(f"127.0.0.1:{port}") as connection:
            watching = health(connection).Watch(health_pb2.HealthCheckRequest())
            assert (await watching.read()).status == SERVING
            call = audio_pb2_grpc.AudioServiceStub(connection).Encode(iter([OPEN, CLOSE]))
            assert await anext(aiter(call)) == OPENED
            stopping = asyncio.ensure_future(stack.aclose())
            assert (await watching.read()).status == NOT_SERVING
            watching.cancel()
            await asyncio.sleep(0.05)
            assert not stopping.done()
            going_on.set()
            assert [response.WhichOneof("part") async for response in call] == ["closed"]
            assert await call.code() is grpc.StatusCode.OK
            await stopping


async def test_every_service_answers_health_and_reflection(text_checkpoint: Path, store: SessionStore) -> None:
    settings = GatewaySettings()
    registry, quotas = store.workers(settings.cell), Quotas(store.usage)
    workers, cell = Workers(settings, registry), Cell(settings, registry)
    live_sessions = LiveSessions(settings, store, workers, quotas, cell)
    with DeviceQueue() as queue:
        services: list[Servicer] = [
            build_audio(AudioSettings(checkpoint=text_checkpoint), queue),
            build_denoiser(DenoiserSettings(checkpoint=text_checkpoint), store, queue),
            build_text(TextSettings(checkpoint=text_checkpoint), store, queue),
            build_vae(VaeSettings(checkpoint=text_checkpoint), queue),
            AvatarServicer(settings, store, workers, live_sessions, quotas, cell),
        ]
        names = [service.service_name for service in services]
        async with serving("127.0.0.1:0", *services) as port, channel(f"127.0.0.1:{port}") as connection:
            checks = health(connection)
            for name in ["", *names]:
                assert (
                    await checks.Check(health_pb2.HealthCheckRequest(service=name), timeout=WAIT_S)
                ).status == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await checks.Check(health_pb2.HealthCheckRequest(service="another"), timeout=WAIT_S)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND

            requests = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in names),
            ]
            reflection: Any = reflection_pb2_grpc.ServerReflectionStub
            listed, *files = [
                answer async for answer in reflection(connection).ServerReflectionInfo(iter(requests), timeout=WAIT_S)
            ]
            assert {*names, "grpc.health.v1.Health"} <= {each.name for each in listed.list_services_response.service}
            assert len(files) == len(names)
            for answer in files:
                assert answer.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_process_is_stopped_by_a_signal(number: signal.Signals) -> None:
    stopping = asyncio.ensure_future(until_stopped())
    await asyncio.sleep(0)
    assert not stopping.done()
    os.kill(os.getpid(), number)
    await asyncio.wait_for(stopping, WAIT_S)
