"""The public contract: references, sessions and streams, kept in the store and made by the workers.

The gateway relays messages. It opens no tensor and decodes no picture.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from avatar import telemetry
from avatar.errors import (
    InvalidAudio,
    InvalidField,
    MessageTooLarge,
    NotStreaming,
    SessionClosed,
    SessionNotFound,
    StoreUnavailable,
)
from avatar.rpc.server import Context, opening, reason_of
from avatar.session import CLAIM_TTL_S, SessionStore
from avatar.settings import GatewaySettings
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc
from avatar.v1 import types_pb2 as types
from avatar.worker.v1 import audio_pb2, types_pb2, vae_pb2
from services.gateway.choices import context_s, set_choices, show_choices
from services.gateway.conversation import Conversation
from services.gateway.workers import Workers

logger = logging.getLogger(__name__)

MIN_RATE_HZ, MAX_RATE_HZ = 8000, 48000
MIN_TTL_S, MAX_TTL_S = 1.0, 86400.0
FIRST_FRAME = 3
ENCODINGS = {types.SAMPLE_ENCODING_PCM16: "pcm16", types.SAMPLE_ENCODING_FLOAT32: "float32"}
FITS = {types.FIT_UNSPECIFIED: "", types.FIT_COVER: "cover", types.FIT_REFERENCE: "reference"}
FIT_OF = {name: fit for fit, name in FITS.items()}


class AvatarServicer(avatar_service_pb2_grpc.AvatarServiceServicer):
    """Serves the public contract over a store and workers."""

    service_name = "avatar.v1.AvatarService"

    def __init__(self, settings: GatewaySettings, store: SessionStore, workers: Workers) -> None:
        self._settings = settings
        self._store = store
        self._workers = workers
        self._conversations: dict[str, Conversation] = {}

    def add_to(self, server: grpc.aio.Server) -> None:
        avatar_service_pb2_grpc.add_AvatarServiceServicer_to_server(self, server)

    async def GetCapabilities(self, request: pb.GetCapabilitiesRequest, context: Context) -> pb.GetCapabilitiesResponse:
        workers = await self._workers.describe()
        video = types.VideoFormat(
            width=workers.vae.width, height=workers.vae.height, frame_rate_hz=workers.vae.frame_rate_hz
        )
        return pb.GetCapabilitiesResponse(
            video=video,
            fit=FIT_OF[workers.vae.fit],
            sizes_free=workers.vae.sizes_free,
            max_audio_context_s=context_s(workers.audio.max_right_frames),
            prompts=workers.text is not None,
            max_prompt_bytes=self._settings.max_prompt_bytes if workers.text is not None else 0,
            min_rate_hz=MIN_RATE_HZ,
            max_rate_hz=MAX_RATE_HZ,
            max_picture_bytes=self._settings.max_picture_bytes,
            max_audio_bytes=self._settings.max_audio_bytes,
            max_audio_ahead_s=self._settings.audio_ahead_s,
            block_frames=workers.vae.block_frames,
            num_levels=workers.denoisers[0].num_levels,
        )

    async def CreateReference(self, request: pb.CreateReferenceRequest, context: Context) -> pb.CreateReferenceResponse:
        size = len(request.picture)
        if size > self._settings.max_picture_bytes:
            raise MessageTooLarge(f"the picture has {size} bytes, the limit is {self._settings.max_picture_bytes}")
        if request.fit not in FITS:
            raise InvalidField.at("fit", f"{request.fit} is no fit")
        if request.area and (request.width or request.height):
            raise InvalidField.at("area", "leave it out where width and height are set")
        reference = await self._workers.encode_reference(
            vae_pb2.EncodeReferenceRequest(
                picture=request.picture,
                width=request.width,
                height=request.height,
                fit=FITS[request.fit],
                area=request.area,
            )
        )
        await self._store.put_reference(reference, self._settings.reference_ttl_s)
        return pb.CreateReferenceResponse(reference=_reference(reference, self._settings.reference_ttl_s))

    async def GetReference(self, request: pb.GetReferenceRequest, context: Context) -> pb.GetReferenceResponse:
        reference = await self._store.reference(request.reference_id)
        left_s = await self._store.reference_expires_in_s(request.reference_id)
        return pb.GetReferenceResponse(reference=_reference(reference, left_s))

    async def DeleteReference(self, request: pb.DeleteReferenceRequest, context: Context) -> pb.DeleteReferenceResponse:
        await self._store.delete_reference(request.reference_id)
        return pb.DeleteReferenceResponse()

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Context) -> pb.CreateSessionResponse:
        prompt_bytes, limit = len(request.prompt.encode()), self._settings.max_prompt_bytes
        if prompt_bytes > limit:
            raise MessageTooLarge(f"the prompt has {prompt_bytes} bytes, the limit is {limit}")
        if request.seed >= 1 << 63:
            raise InvalidField.at("seed", f"{request.seed} is not below 2^63")
        ttl_s = _ttl_s("ttl", request.ttl) if request.HasField("ttl") else None
        reference = await self._store.reference(request.reference_id)
        text = await self._workers.embed(request.prompt) if request.prompt else None
        session = types_pb2.Session(
            id=secrets.token_urlsafe(24),
            seed=request.seed if request.HasField("seed") else secrets.randbits(63),
            reference_id=reference.id,
            width=reference.width,
            height=reference.height,
            motion=reference.motion,
            frame_rate_hz=reference.frame_rate_hz,
            block_frames=reference.block_frames,
        )
        await set_choices(session, request, self._workers.max_right_frames)
        position = types_pb2.Position(next_frame=FIRST_FRAME, ttl_s=ttl_s or self._settings.session_ttl_s)
        conditions = types_pb2.Conditions(version=0, sink=reference.sink, text=text)
        await self._store.create(session, conditions, position)
        return pb.CreateSessionResponse(session=await self._session(session.id))

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        return pb.GetSessionResponse(session=await self._session(request.session_id))

    async def UpdateSession(self, request: pb.UpdateSessionRequest, context: Context) -> pb.UpdateSessionResponse:
        unknown = [path for path in request.update_mask.paths if path != "ttl"]
        if unknown or not request.update_mask.paths:
            raise InvalidField.at("update_mask", f"names {', '.join(unknown) or 'nothing'}; only ttl can be changed")
        ttl_s = _ttl_s("session.ttl", request.session.ttl)
        conversation = self._conversations.get(request.session.id)
        position = conversation.position if conversation else await self._store.position(request.session.id)
        position.ttl_s = ttl_s
        await self._store.renew(request.session.id, position)
        return pb.UpdateSessionResponse(session=await self._session(request.session.id))

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Context) -> pb.DeleteSessionResponse:
        await self._store.delete(request.session_id)
        if conversation := self._conversations.get(request.session_id):
            conversation.advanced.set()  # its stream looks at the store, and ends
        return pb.DeleteSessionResponse()

    async def Interrupt(self, request: pb.InterruptRequest, context: Context) -> pb.InterruptResponse:
        conversation = self._conversations.get(request.session_id)
        if conversation is None:
            await self._store.expires_in_s(request.session_id)
            raise NotStreaming(f"no stream of session {request.session_id!r} is open at this gateway")
        return pb.InterruptResponse(next_frame=conversation.interrupt())

    async def StreamAvatar(  # type: ignore[override]  # writes through its context, from more than one task
        self, requests: AsyncIterator[pb.StreamAvatarRequest], context: Context
    ) -> None:
        opened: pb.OpenAvatar = await opening(requests)
        sound = _sound(opened)
        session = await self._store.session(opened.session_id)
        sound.traceparent = telemetry.session_span(session.id)
        async with self._claimed(session.id) as owner:
            if session.HasField("audio_right_frames"):
                sound.right_frames = session.audio_right_frames
            position = await self._store.position(session.id)
            if position.is_closed:
                raise SessionClosed(f"the stream of session {session.id!r} has ended; create another session")
            async with self._workers.open(sound, first_block=0) as streams:
                conversation = Conversation(streams, sound, session, position, self._settings, context.write)
                self._conversations[session.id] = conversation
                try:
                    await self._converse(session.id, owner, conversation, requests, context)
                finally:
                    del self._conversations[session.id]

    async def _converse(
        self,
        session_id: str,
        owner: str,
        conversation: Conversation,
        requests: AsyncIterator[pb.StreamAvatarRequest],
        context: Context,
    ) -> None:
        session = await self._session(session_id)
        await context.write(pb.StreamAvatarResponse(opened=pb.AvatarOpened(session=session)))
        try:
            async with asyncio.TaskGroup() as tasks:
                keeping = tasks.create_task(self._keep(session_id, owner, conversation))
                await conversation.run(requests)
                keeping.cancel()
        finally:
            # However it ended, its history is gone: it cannot be streamed again.
            conversation.position.is_closed = True
            with suppress(StoreUnavailable, SessionNotFound):
                await self._store.renew(session_id, conversation.position)
        closed = pb.AvatarClosed(
            num_frames=conversation.num_frames, num_blocks=conversation.num_blocks, stages=conversation.usage()
        )
        await context.write(pb.StreamAvatarResponse(closed=closed))

    async def _keep(self, session_id: str, owner: str, conversation: Conversation) -> None:
        """Renew the session with every block, and the claim on it. SessionNotFound ends the stream if it is gone."""
        while True:
            # Not asyncio.wait_for: before Python 3.12 it swallows a cancellation that comes with the event.
            with suppress(TimeoutError):
                async with asyncio.timeout(CLAIM_TTL_S / 3):
                    await conversation.advanced.wait()
            try:
                await self._store.claim(session_id, owner)
                if conversation.advanced.is_set():
                    conversation.advanced.clear()
                    await self._store.renew(session_id, conversation.position)
                else:
                    await self._store.expires_in_s(session_id)
            except StoreUnavailable:
                # The workers have what they need; a stream that runs outlives its store.
                logger.warning("session not renewed", extra={"session": telemetry.tag(session_id)})
                await asyncio.sleep(1)

    @asynccontextmanager
    async def _claimed(self, session_id: str) -> AsyncGenerator[str, None]:
        """Be the session's only stream; gives the name it is claimed under. SessionBusy if there is another stream."""
        owner = secrets.token_hex(8)
        await self._store.claim(session_id, owner)
        telemetry.SESSIONS_ACTIVE.add(1, {"service": "gateway"})
        started, reason = time.monotonic(), "CLOSED"
        try:
            yield owner
        except BaseException as error:
            reason = reason_of(error)
            raise
        finally:
            telemetry.SESSIONS_ACTIVE.add(-1, {"service": "gateway"})
            telemetry.SESSIONS_CLOSED.add(1, {"reason": reason})
            duration_s = round(time.monotonic() - started, 3)
            logger.info(
                "stream ended", extra={"session": telemetry.tag(session_id), "reason": reason, "duration_s": duration_s}
            )
            with suppress(StoreUnavailable):
                await self._store.release(session_id, owner)

    async def _session(self, session_id: str) -> types.Session:
        kept = await self._store.session(session_id)
        position = await self._store.position(session_id)
        state = types.Session.STATE_IDLE
        if position.is_closed:
            state = types.Session.STATE_CLOSED
        elif await self._store.is_claimed(session_id):
            state = types.Session.STATE_STREAMING
        session = types.Session(
            id=kept.id,
            state=state,
            reference_id=kept.reference_id,
            seed=kept.seed,
            video=types.VideoFormat(width=kept.width, height=kept.height, frame_rate_hz=kept.frame_rate_hz),
            next_frame=position.next_frame,
        )
        show_choices(kept, session)
        session.ttl.FromMilliseconds(round(position.ttl_s * 1000))
        expires_in_s = await self._store.expires_in_s(session_id)
        session.expire_time.FromMilliseconds(round((time.time() + expires_in_s) * 1000))
        return session


def _reference(reference: types_pb2.Reference, left_s: float) -> types.Reference:
    message = types.Reference(
        id=reference.id, width=reference.width, height=reference.height, fit=FIT_OF[reference.fit]
    )
    message.notice = reference.notice
    message.expire_time.FromMilliseconds(round((time.time() + left_s) * 1000))
    return message


def _ttl_s(field: str, ttl: Duration) -> float:
    seconds = ttl.seconds + ttl.nanos / 1e9
    if not MIN_TTL_S <= seconds <= MAX_TTL_S or not 0 <= ttl.nanos < 1_000_000_000:
        raise InvalidField.at(field, f"{seconds:g} s, expected {MIN_TTL_S:g} to {MAX_TTL_S:g}")
    return seconds


def _sound(opened: pb.OpenAvatar) -> audio_pb2.OpenEncode:
    """The format of a client's sound. InvalidAudio if there is none such."""
    given = opened.audio
    if given.encoding not in ENCODINGS:
        raise InvalidAudio.at("open.audio.encoding", "expected PCM16 or FLOAT32")
    if not MIN_RATE_HZ <= given.rate_hz <= MAX_RATE_HZ:
        raise InvalidAudio.at("open.audio.rate_hz", f"{given.rate_hz} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    if given.num_channels not in (1, 2):
        raise InvalidAudio.at("open.audio.num_channels", f"{given.num_channels}, expected 1 or 2")
    return audio_pb2.OpenEncode(
        session_id=opened.session_id,
        encoding=ENCODINGS[given.encoding],
        rate_hz=given.rate_hz,
        num_channels=given.num_channels,
    )
