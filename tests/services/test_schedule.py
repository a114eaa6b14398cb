"""Fewer levels than a checkpoint was trained for, as a choice of the deployment that every part says."""

import logging
from pathlib import Path

import pytest
import torch

from avatar.render import RenderOptions, load, render
from avatar.settings import DenoiserSettings, GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from services.denoiser.loading import load_denoisers
from services.local.suite import gateway, suite, workers
from tests.conftest import RATE_HZ, speech
from tests.product import connected, new_session, speak
from tests.refusals import refused

TWO_LEVELS = GatewaySettings(listen="127.0.0.1:0", schedule=2)


async def test_fewer_levels_are_served_and_said(checkpoint: Path, store: SessionStore, picture: bytes) -> None:
    async with suite(checkpoint, store, TWO_LEVELS, denoisers=("0", "1")) as target, connected(target) as stub:
        capabilities = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
        session = await new_session(stub, picture, seed=1)
        streamed = await speak(stub, session.id, speech(1.0))
    assert (capabilities.num_levels, capabilities.num_trained_levels) == (2, 3)
    assert list(capabilities.schedule) == [1.0, 0.5]
    samples = torch.frombuffer(bytearray(speech(1.0)), dtype=torch.int16)[None] / 32768
    rendered = render(load(checkpoint, levels=2), [samples], RATE_HZ, picture, RenderOptions(seed=1))
    assert streamed.pixels == [frame.numpy().tobytes() for chunk in rendered for frame in chunk.frames]


async def test_denoisers_of_another_schedule_than_the_gateways_are_named(checkpoint: Path, store: SessionStore) -> None:
    async with workers(checkpoint, store, TWO_LEVELS, denoisers=("0",)) as first:
        others = first.model_copy(update={"schedule": (1.0, 0.75)})
        async with workers(checkpoint, store, others, denoisers=("1",)) as second:
            both = second.model_copy(update={"denoisers": first.denoisers + second.denoisers})
            for chosen, said in (
                (3, "the gateway's AVATAR_SCHEDULE is 3 levels, denoisers run levels of sigma 1, 0.5 and levels of"),
                ((1.0, 0.5), "AVATAR_SCHEDULE is levels of sigma 1, 0.5, denoisers run levels of sigma 1, 0.75"),
                (None, "different checkpoints or schedules: "),
            ):
                settings = both.model_copy(update={"schedule": chosen})
                async with gateway(store, settings) as target, connected(target) as stub:
                    async with refused("CONFIG_MISMATCH") as refusal:
                        await stub.GetCapabilities(pb.GetCapabilitiesRequest())
                    assert said in refusal.message
            # All processes are still there: a gateway with the schedule of a complete set serves.
            async with workers(checkpoint, store, TWO_LEVELS, denoisers=("1",)) as third:
                complete = both.model_copy(update={"denoisers": both.denoisers + third.denoisers, "schedule": None})
                async with gateway(store, complete) as target, connected(target) as stub:
                    capabilities = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
                    assert list(capabilities.schedule) == [1.0, 0.5]


def test_a_denoiser_with_fewer_levels_says_so_at_its_start(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, digest = load_denoisers(DenoiserSettings(checkpoint=checkpoint), [])
        assert not caplog.records
        _, chosen = load_denoisers(DenoiserSettings(checkpoint=checkpoint, schedule=2), [])
    [record] = caplog.records
    assert record.message == "fewer levels than the checkpoint was trained for"
    assert vars(record)["levels"] == "2 of the 3 trained: sigma 1, 0.5, 0"
    assert chosen != digest
    with pytest.raises(ValueError, match="AVATAR_SCHEDULE: the number of levels must be 1 to 3, got 4"):
        load_denoisers(DenoiserSettings(checkpoint=checkpoint, schedule=4), [])
