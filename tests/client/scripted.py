"""A gateway whose streams follow a script, for responses that a real one does not send on demand."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from avatar.errors import AvatarError, ConnectionLost
from avatar.rpc.interceptor import Context, receive_open
from avatar.rpc.server import serving
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from avatar.v1 import types_pb2 as types

Call: TypeAlias = Sequence[pb.StreamAvatarResponse] | AvatarError
VIDEO = types.VideoFormat(width=64, height=64, frame_rate_hz=25)
CLOSED = pb.StreamAvatarResponse(closed=pb.AvatarClosed())


class ScriptedGateway(pb_grpc.AvatarServiceServicer):
    """Sends `opened` and the responses of the next call in the script, or ends the call with its error.

    A call without `closed` ends early, like a lost connection; so do all calls after the last of the script.

    opened: the messages that opened streams. metadata: of the last GetCapabilities. sessions: named for a router by
    calls about a session.
    """

    service_name = "avatar.v1.AvatarService"

    def __init__(self, *calls: Call) -> None:
        self.calls = list(calls)
        self.metadata: dict[str, str] = {}
        self.sessions: list[str] = []
        self.opened: list[pb.OpenAvatar] = []

    def add_to(self, server: Any) -> None:
        pb_grpc.add_AvatarServiceServicer_to_server(self, server)

    async def GetCapabilities(self, request: Any, context: Context) -> pb.GetCapabilitiesResponse:
        self.metadata = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
        return pb.GetCapabilitiesResponse(video=VIDEO, block_frames=12, max_audio_bytes=1 << 20, resume_s=5.0)

    async def CreateReference(self, request: Any, context: Context) -> pb.CreateReferenceResponse:
        return pb.CreateReferenceResponse(reference=types.Reference(id="0" * 64, notice="not a face"))

    async def CreateSession(self, request: Any, context: Context) -> pb.CreateSessionResponse:
        return pb.CreateSessionResponse(session=types.Session(id="session", video=VIDEO, next_frame=3))

    async def UpdateSession(self, request: Any, context: Context) -> pb.UpdateSessionResponse:
        self._record_session(context)
        return pb.UpdateSessionResponse(session=request.session, first_block=7)

    async def DeleteSession(self, request: Any, context: Context) -> pb.DeleteSessionResponse:
        self._record_session(context)
        return pb.DeleteSessionResponse()

    def _record_session(self, context: Context) -> None:
        self.sessions += [str(value) for key, value in context.invocation_metadata() or () if key == "avatar-session"]

    async def StreamAvatar(
        self, requests: AsyncIterator[Any], context: Context
    ) -> AsyncGenerator[pb.StreamAvatarResponse, None]:
        self._record_session(context)
        opened: pb.OpenAvatar = await receive_open(requests)
        self.opened.append(opened)
        call = self.calls.pop(0) if self.calls else ConnectionLost("the script has ended")
        if isinstance(call, AvatarError):
            raise call
        session = types.Session(id=opened.session_id, video=VIDEO, next_frame=3)
        yield pb.StreamAvatarResponse(opened=pb.AvatarOpened(session=session))
        for response in call:
            yield response


def frames(*indexes: int) -> list[pb.StreamAvatarResponse]:
    return [pb.StreamAvatarResponse(frame=types.VideoFrame(index=index, num_frames=1)) for index in indexes]


def notice(number: int, **fields: Any) -> pb.StreamAvatarResponse:
    return pb.StreamAvatarResponse(event=pb.AvatarEvent(number=number, notice=pb.Notice(**fields)))


@asynccontextmanager
async def scripted(*calls: Call) -> AsyncGenerator[tuple[str, ScriptedGateway], None]:
    """HOST:PORT of a gateway with this script, and the gateway."""
    gateway = ScriptedGateway(*calls)  # type: ignore[abstract]  # only what these tests call
    async with serving("127.0.0.1:0", gateway) as port:
        yield f"127.0.0.1:{port}", gateway
