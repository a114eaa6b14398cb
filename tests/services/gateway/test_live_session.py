"""Tests of services.gateway.live_session."""

from unittest.mock import AsyncMock

import grpc.aio
import pytest

from avatar.errors import ConnectionLost
from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.worker.v1.vae_pb2 import DecodeOpened
from services.gateway.live_session import LiveSession
from tests.services.gateway.test_live_stream import SESSION, Pipeline


async def test_a_session_outlives_a_client_that_is_gone_before_the_first_write(store: SessionStore) -> None:
    session = LiveSession(pb.OpenAvatar(), SESSION, Pipeline().stream, DecodeOpened(), store, GatewaySettings())

    describe = AsyncMock(return_value=pb.AvatarOpened())
    write = AsyncMock(side_effect=grpc.aio.UsageError("the call has ended"))
    with pytest.raises(ConnectionLost, match="the client is gone"):
        await session.serve(describe, AsyncMock(), write, None)
    assert not session.ended.done()
    assert not session.stream.is_connected
