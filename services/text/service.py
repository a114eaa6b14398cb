"""The text worker's service: prompts in, embeddings out, each computed once."""

import asyncio
import hashlib
import logging
import time

import grpc.aio

from avatar import telemetry
from avatar.errors import NoCapacity, StateCorrupt
from avatar.rpc.codec import tensor_to_pb
from avatar.rpc.interceptor import Context
from avatar.runtime.device_queue import DeviceQueue
from avatar.store.sessions import SessionStore
from avatar.text.model import TextEncoder
from avatar.worker.v1 import text_pb2 as pb
from avatar.worker.v1 import text_pb2_grpc

logger = logging.getLogger(__name__)


class TextServicer(text_pb2_grpc.TextServiceServicer):
    """Serves one text encoder, and caches its embeddings in the store."""

    service_name = "avatar.worker.v1.TextService"
    stage = "text"

    def __init__(
        self, encoder: TextEncoder, digest: str, store: SessionStore, queue: DeviceQueue, capacity: int, ttl_s: float
    ) -> None:
        """digest: of the checkpoint's text part. capacity: prompts at a time. ttl_s: time to live of an embedding."""
        self._encoder = encoder
        self._digest = digest
        self._store = store
        self._queue = queue
        self._capacity = capacity
        self._ttl_s = ttl_s
        self._computing = asyncio.Semaphore(capacity)
        self.changed = asyncio.Event()  # never set: a prompt is no stream

    def add_to(self, server: grpc.aio.Server) -> None:
        text_pb2_grpc.add_TextServiceServicer_to_server(self, server)

    def info(self) -> pb.TextServiceGetInfoResponse:
        """Describe the worker as it is now."""
        return pb.TextServiceGetInfoResponse(
            digest=self._digest,
            width=self._encoder.width,
            max_tokens=self._encoder.config.max_tokens,
            capacity=self._capacity,
        )

    async def GetInfo(self, request: pb.TextServiceGetInfoRequest, context: Context) -> pb.TextServiceGetInfoResponse:
        return self.info()

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        started_ns = time.time_ns()
        name = hashlib.sha256(f"{self._digest}/{self._encoder.dtype}/{request.prompt}".encode()).hexdigest()
        embedding = await self._cached(name)
        is_cached = embedding is not None
        if embedding is None:
            embedding = await self._compute(request.prompt)
            await self._store.put_embedding(name, embedding, self._ttl_s)
        telemetry.text_span(started_ns, time.time_ns(), kept=is_cached)
        return embedding

    async def _cached(self, name: str) -> pb.EmbedResponse | None:
        """Return the stored embedding; None if there is none, or it is damaged, and is to be computed again."""
        try:
            return await self._store.embedding(name)
        except StateCorrupt as error:
            logger.warning("embedding not read", extra={"error": error.message})
            return None

    async def _compute(self, prompt: str) -> pb.EmbedResponse:
        if self._computing.locked():
            raise NoCapacity(f"{self._capacity} prompts are being embedded already", retry_s=1.0)
        async with self._computing:
            text = await self._queue.run(self._encoder.embed, prompt)
        return pb.EmbedResponse(text=tensor_to_pb(text), digest=self._digest)
