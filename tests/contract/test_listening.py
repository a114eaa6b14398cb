"""Audio of the other person: accepted where the deployment listens, and otherwise refused with a reason."""

from contextlib import nullcontext
from typing import Any

import pytest

from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from tests.conftest import speech
from tests.product import CLOSE, PCM16, Stub, listening, new_session, opening, stream
from tests.refusals import refused

SECONDS = 0.48


async def test_a_deployment_that_does_not_listen_says_so(
    stub: Stub, portrait: bytes, capabilities: pb.GetCapabilitiesResponse
) -> None:
    session = await new_session(stub, portrait)
    expected: Any = nullcontext() if capabilities.listens else refused("LISTEN_UNSUPPORTED")
    async with expected:
        streamed = await stream(stub, [opening(session.id), *listening(speech(SECONDS), speech(SECONDS, 2)), CLOSE])
        assert len(streamed.frames) == 9


@pytest.mark.parametrize(
    ("field", "value"), [("encoding", types.SAMPLE_ENCODING_UNSPECIFIED), ("rate_hz", 7999), ("num_channels", 3)]
)
async def test_a_format_out_of_range_is_refused(stub: Stub, portrait: bytes, field: str, value: int) -> None:
    session = await new_session(stub, portrait)
    heard = types.AudioFormat()
    heard.CopyFrom(PCM16)
    setattr(heard, field, value)
    async with refused("INVALID_AUDIO") as refusal:
        await stream(stub, [opening(session.id, listen=heard)])
    assert refusal.fields == [f"open.listen.{field}"]
