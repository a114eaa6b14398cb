"""The public contract, `avatar.v1.AvatarService`: references, sessions and streams over the store and the workers.

The gateway relays messages; it opens no tensor and decodes no picture.
"""

import asyncio
import hashlib
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from avatar.aio import uncancelled
from avatar.errors import (
    InvalidField,
    MessageTooLarge,
    NotStreaming,
    ProtocolOrder,
    QuotaExceeded,
    SessionClosed,
    SessionNotFound,
    StoreUnavailable,
)
from avatar.rpc.interceptor import Context, receive_open
from avatar.settings import GatewaySettings
from avatar.store.claims import Outcome
from avatar.store.sessions import SessionStatus, SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import avatar_service_pb2_grpc
from avatar.v1 import types_pb2 as types
from avatar.worker.v1 import types_pb2, vae_pb2
from services.gateway.access.picture_slots import PictureSlots
from services.gateway.access.quotas import Quotas
from services.gateway.access.tenants import caller
from services.gateway.capabilities import FIT_OF, FITS, describe_capabilities
from services.gateway.cell import Cell
from services.gateway.live_sessions import LiveSessions
from services.gateway.options import (
    set_session_options,
    show_session_options,
    stream_options,
)
from services.gateway.stream.in_flight import FIRST_FRAME
from services.gateway.workers import Workers

# Streams that wait for their `open` message.
MAX_UNOPENED = 1000
MIN_TTL_S, MAX_TTL_S = 1.0, 86400.0
CHANGEABLE = {"prompt", "ttl"}


class AvatarServicer(avatar_service_pb2_grpc.AvatarServiceServicer):
    """Serves the public contract over a store and workers."""

    service_name = "avatar.v1.AvatarService"

    def __init__(
        self,
        settings: GatewaySettings,
        store: SessionStore,
        workers: Workers,
        live_sessions: LiveSessions,
        quotas: Quotas,
        cell: Cell,
    ) -> None:
        self._settings = settings
        self._store = store
        self._workers = workers
        self._live_sessions = live_sessions
        self._quotas = quotas
        self._cell = cell
        self._picture_slots = PictureSlots(lambda: len(workers.vae.answering(lambda _: True)))
        self._unopened: deque[asyncio.Timeout] = deque()

    def add_to(self, server: grpc.aio.Server) -> None:
        avatar_service_pb2_grpc.add_AvatarServiceServicer_to_server(self, server)

    async def GetCapabilities(self, request: pb.GetCapabilitiesRequest, context: Context) -> pb.GetCapabilitiesResponse:
        info = await self._workers.describe()
        num_free = self._workers.free_sessions(info)
        languages = self._workers.voice_languages()
        return describe_capabilities(info, self._settings, num_free, languages, is_draining=self._cell.is_drained)

    async def CreateReference(self, request: pb.CreateReferenceRequest, context: Context) -> pb.CreateReferenceResponse:
        size = len(request.picture)
        if size > self._settings.max_picture_bytes:
            raise MessageTooLarge(f"the picture has {size} bytes, the limit is {self._settings.max_picture_bytes}")
        if request.fit not in FITS:
            raise InvalidField.at("fit", f"{request.fit} is no fit")
        if request.area and (request.width or request.height):
            raise InvalidField.at("area", "leave it out where width and height are set")
        encoding = vae_pb2.EncodeReferenceRequest(
            picture=request.picture,
            width=request.width,
            height=request.height,
            fit=FITS[request.fit],
            area=request.area,
        )
        # The reference's own name depends on what the worker makes of the picture; quotas are checked before.
        counted_as = hashlib.sha256(encoding.SerializeToString(deterministic=True)).hexdigest()
        async with self._quotas.reference(counted_as) as reservation:
            async with self._picture_slots.slot():
                reference = await self._workers.encode_reference(encoding)
            reference.id = caller().prefix + reference.id[len(caller().prefix) :]
            await self._put_reference(reference, counted_as, reservation)
        return pb.CreateReferenceResponse(reference=_reference(reference, self._settings.reference_ttl_s))

    async def _put_reference(self, reference: types_pb2.Reference, counted_as: str, reservation: str) -> None:
        ttl_s = self._settings.reference_ttl_s
        await self._quotas.lease_reference(counted_as, ttl_s, reservation)
        try:
            former = await self._store.references.put(reference, ttl_s, counted_as)
        except StoreUnavailable:
            if reservation:  # it did not count before
                with suppress(StoreUnavailable):
                    await self._quotas.release_reference(counted_as)
            raise
        if former not in ("", counted_as):  # the same reference by another size or fit
            await self._quotas.release_reference(former)

    async def GetReference(self, request: pb.GetReferenceRequest, context: Context) -> pb.GetReferenceResponse:
        reference = await self._store.references.get(caller().reference(request.reference_id))
        remaining_s = await self._store.references.expires_in_s(reference.id)
        return pb.GetReferenceResponse(reference=_reference(reference, remaining_s))

    async def DeleteReference(self, request: pb.DeleteReferenceRequest, context: Context) -> pb.DeleteReferenceResponse:
        reference_id = caller().reference(request.reference_id)
        counted_as = await self._store.references.delete(reference_id)
        await self._quotas.release_reference(counted_as)
        return pb.DeleteReferenceResponse()

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Context) -> pb.CreateSessionResponse:
        if request.seed >= 1 << 63:
            raise InvalidField.at("seed", f"{request.seed} is not below 2^63")
        ttl_s = _ttl_s("ttl", request.ttl) if request.HasField("ttl") else None
        reference = await self._store.references.get(caller().reference(request.reference_id))
        text = await self._embed(request.prompt)
        session = types_pb2.Session(
            id=caller().prefix + secrets.token_urlsafe(24),
            seed=request.seed if request.HasField("seed") else secrets.randbits(63),
            reference_id=reference.id,
            width=reference.width,
            height=reference.height,
            frame_rate_hz=reference.frame_rate_hz,
            block_frames=reference.block_frames,
            prompt=request.prompt,
            tenant=caller().name,
            label=request.label or caller().label,
        )
        await set_session_options(session, request, self._workers.max_right_frames)
        position = types_pb2.Position(next_frame=FIRST_FRAME, ttl_s=ttl_s or self._settings.session_ttl_s)
        conditions = types_pb2.Conditions(version=0, text=text)
        try:
            await uncancelled(self._create(session, conditions, position))
        except BaseException:  # nobody learns its id
            await uncancelled(self._forget(session.id))
            raise
        status = SessionStatus(session, position, place=None, expires_in_s=position.ttl_s)
        return pb.CreateSessionResponse(session=self._show(status))

    async def _create(
        self, session: types_pb2.Session, conditions: types_pb2.Conditions, position: types_pb2.Position
    ) -> None:
        """Count a session, then write it."""
        await self._lease_session(session.id, position.ttl_s)
        await self._store.create(session, conditions, position)

    async def _forget(self, session_id: str) -> None:
        """Delete a session and stop counting it; if the store is away and may have it, it counts until it expires."""
        with suppress(StoreUnavailable):
            with suppress(SessionNotFound):
                await self._store.delete(session_id)
            await self._quotas.release_session(session_id)

    async def _lease_session(self, session_id: str, ttl_s: float) -> None:
        """Count a session. In a full quota it takes the place of one whose stream has ended."""
        try:
            await self._quotas.lease_session(session_id, ttl_s)
        except QuotaExceeded:
            for each in await self._quotas.sessions():
                if await self._store.delete_closed(each):
                    await self._quotas.release_session(each)
                    await self._quotas.lease_session(session_id, ttl_s)
                    return
            raise

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        status = await self._store.status(caller().session(request.session_id))
        if status.place and not self._live_sessions.get(request.session_id):
            # Only the gateway where the session streams can tell whether its client is connected.
            with suppress(NotStreaming):
                forwarded: pb.GetSessionResponse
                forwarded = await self._cell.forward("GetSession", request, status.place, context)
                return forwarded
        return pb.GetSessionResponse(session=self._show(status))

    async def UpdateSession(self, request: pb.UpdateSessionRequest, context: Context) -> pb.UpdateSessionResponse:
        paths, session_id = set(request.update_mask.paths), caller().session(request.session.id)
        if not paths or paths - CHANGEABLE or len(request.update_mask.paths) > len(CHANGEABLE):
            expected = f"expected {' and '.join(sorted(CHANGEABLE))}, or one of them"
            raise InvalidField.at("update_mask", f"{len(request.update_mask.paths)} paths, {expected}")
        ttl_s = _ttl_s("session.ttl", request.session.ttl) if "ttl" in paths else None
        first_block = None
        if "prompt" in paths:
            try:
                first_block = await self._change_prompt(session_id, request.session.prompt)
            except NotStreaming:
                forwarded: pb.UpdateSessionResponse
                forwarded = await self._forward("UpdateSession", request, session_id, context)
                return forwarded
        if ttl_s is not None:
            await self._store.set_ttl(session_id, ttl_s)
            await self._quotas.lease_session(session_id, ttl_s)
        return pb.UpdateSessionResponse(session=await self._session(session_id), first_block=first_block)

    async def _change_prompt(self, session_id: str, prompt: str) -> int:
        """Put conditions with a new prompt in force; return the first block that is made under them."""
        session = await self._store.session(session_id)
        text = await self._embed(prompt)
        session.prompt = prompt

        async def under_prompt(newest: int, version: int) -> types_pb2.Conditions:
            conditions = await self._store.conditions(session_id, newest)
            conditions.version = version
            conditions.ClearField("text")
            if text is not None:
                conditions.text.CopyFrom(text)
            return conditions

        async def write(newest: int, version: int) -> types_pb2.Conditions:
            conditions = await under_prompt(newest, version)
            await self._store.put_prompt(session, conditions)
            return conditions

        if live := self._live_sessions.get(session_id):
            first_block = await live.stream.versions.change(write)
            live.session.prompt = prompt
            live.stream.advanced.set()  # the record then names the version
            return first_block
        while True:
            position = await self._store.position(session_id)
            if position.is_closed:
                raise SessionClosed(f"the stream of session {session_id!r} has ended; its prompt cannot be changed")
            changed = types_pb2.Position()
            changed.CopyFrom(position)
            if position.coming_conditions:  # a version that the session's last stream wrote, and has not used yet
                newest, first_block = position.coming_conditions, position.coming_block
                changed.coming_conditions = newest + 1
            else:
                newest, first_block = position.conditions, position.next_block
                changed.conditions = newest + 1
            conditions = await under_prompt(newest, newest + 1)
            outcome = await self._store.put_idle_prompt(session, conditions, position, changed, newest)
            if outcome is Outcome.TAKEN:
                raise NotStreaming("the session streams at another gateway")
            if outcome is Outcome.DONE:
                return first_block

    async def _embed(self, prompt: str) -> types_pb2.Tensor | None:
        """Return a prompt's embedding, None if the prompt is empty."""
        num_bytes, limit = len(prompt.encode()), self._settings.max_prompt_bytes
        if num_bytes > limit:
            raise MessageTooLarge(f"the prompt has {num_bytes} bytes, the limit is {limit}")
        return await self._workers.embed(prompt) if prompt else None

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Context) -> pb.DeleteSessionResponse:
        session_id = caller().session(request.session_id)
        await self._store.delete(session_id)
        await self._quotas.release_session(session_id)
        return pb.DeleteSessionResponse()

    async def Interrupt(self, request: pb.InterruptRequest, context: Context) -> pb.InterruptResponse:
        session_id = caller().session(request.session_id)
        if live := self._live_sessions.get(session_id):
            return live.stream.interrupt()
        response: pb.InterruptResponse = await self._forward("Interrupt", request, session_id, context)
        return response

    async def _forward(self, method: str, request: Any, session_id: str, context: Context) -> Any:
        """Pass a call on to the gateway where its session streams. Raises as `Cell.forward` does."""
        return await self._cell.forward(method, request, (await self._store.status(session_id)).place, context)

    async def StreamAvatar(  # type: ignore[override]  # writes through its context, from more than one task
        self, requests: AsyncIterator[pb.StreamAvatarRequest], context: Context
    ) -> None:
        opened = await self._receive_open(requests)
        caller().session(opened.session_id)
        is_resumed = opened.HasField("resume")
        session = await (self._live_sessions.resume(opened) if is_resumed else self._live_sessions.start(opened))
        next_frame = opened.resume.next_frame if is_resumed else None
        if caller().max_audio_s is None:
            await session.serve(self._opened, requests, context.write, next_frame)
            return
        options = stream_options(session.opened)
        bytes_per_s = [each.rate_hz * each.sample_bytes for each in (options, options.heard)]
        async with aclosing(self._quotas.metered(requests, *bytes_per_s)) as metered:
            await session.serve(self._opened, metered, context.write, next_frame)

    async def _receive_open(self, requests: AsyncIterator[pb.StreamAvatarRequest]) -> pb.OpenAvatar:
        """Return the `open` of a stream. Of more than MAX_UNOPENED streams that wait for theirs the oldest one ends."""
        if len(self._unopened) >= MAX_UNOPENED:
            self._unopened.popleft().reschedule(asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(None) as waiting:
                self._unopened.append(waiting)
                opened: pb.OpenAvatar = await receive_open(requests)
        except TimeoutError as error:
            raise ProtocolOrder(f"more than {MAX_UNOPENED} streams were not opened; this was the oldest") from error
        finally:
            with suppress(ValueError):
                self._unopened.remove(waiting)
        opened.DiscardUnknownFields()  # the session's record keeps the rest
        return opened

    async def _opened(self, session_id: str) -> pb.AvatarOpened:
        return pb.AvatarOpened(session=await self._session(session_id))

    async def _session(self, session_id: str) -> types.Session:
        return self._show(await self._store.status(session_id))

    def _show(self, status: SessionStatus) -> types.Session:
        stored, position = status.session, status.position
        state = types.Session.STATE_IDLE
        if position.is_closed:
            state = types.Session.STATE_CLOSED
        elif status.place:
            live = self._live_sessions.get(stored.id)
            is_detached = live is not None and not live.stream.is_connected
            state = types.Session.STATE_DETACHED if is_detached else types.Session.STATE_STREAMING
        session = types.Session(
            id=stored.id,
            state=state,
            reference_id=stored.reference_id,
            seed=stored.seed,
            video=types.VideoFormat(width=stored.width, height=stored.height, frame_rate_hz=stored.frame_rate_hz),
            next_frame=position.next_frame,
        )
        show_session_options(stored, session)
        session.ttl.FromMilliseconds(round(position.ttl_s * 1000))
        session.expire_time.FromMilliseconds(round((time.time() + status.expires_in_s) * 1000))
        return session


def _reference(reference: types_pb2.Reference, remaining_s: float) -> types.Reference:
    message = types.Reference(
        id=reference.id,
        width=reference.width,
        height=reference.height,
        fit=FIT_OF[reference.fit],
        notice=reference.notice,
        num_faces=reference.num_faces,
        face_share=reference.face_share,
    )
    message.expire_time.FromMilliseconds(round((time.time() + remaining_s) * 1000))
    return message


def _ttl_s(field: str, ttl: Duration) -> float:
    seconds = ttl.seconds + ttl.nanos / 1e9
    if not MIN_TTL_S <= seconds <= MAX_TTL_S or not 0 <= ttl.nanos < 1_000_000_000:
        raise InvalidField.at(field, f"{seconds:g} s, expected {MIN_TTL_S:g} to {MAX_TTL_S:g}")
    return seconds
