"""Tests of services.text.service: embeddings, their cache in the store, and refusals."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from avatar.checkpoints.layouts import open_part
from avatar.rpc.channel import channel
from avatar.rpc.codec import tensor_from_pb
from avatar.rpc.server import serving
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import TextSettings
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from avatar.text.model import TextEncoder, load
from avatar.worker.v1 import text_pb2 as pb
from avatar.worker.v1 import text_pb2_grpc as pb_grpc
from services.text.__main__ import build
from tests.refusals import refused
from tests.text import tiny

PROMPT = "a person who smiles"


@asynccontextmanager
async def text_worker(
    checkpoint: Path, hashes: RedisHashes, capacity: int = 8
) -> "AsyncGenerator[pb_grpc.TextServiceAsyncStub, None]":
    """Run a text worker over a store while the body runs; yield its stub."""
    settings = TextSettings(checkpoint=checkpoint, capacity=capacity)
    with DeviceQueue() as queue:
        servicer = build(settings, SessionStore(hashes), queue)
        async with serving("127.0.0.1:0", servicer) as port, channel(f"127.0.0.1:{port}") as connection:
            yield pb_grpc.TextServiceStub(connection)


async def answer(stub: "pb_grpc.TextServiceAsyncStub", prompt: str) -> pb.EmbedResponse:
    return await stub.Embed(pb.EmbedRequest(prompt=prompt), timeout=30)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that a model has embedded."""
    prompts: list[str] = []
    embed = TextEncoder.embed

    def recording(self: TextEncoder, prompt: str) -> torch.Tensor:
        prompts.append(prompt)
        return embed(self, prompt)

    monkeypatch.setattr(TextEncoder, "embed", recording)
    return prompts


async def test_remote_equals_local(text_checkpoint: Path, hashes: RedisHashes) -> None:
    async with text_worker(text_checkpoint, hashes) as stub:
        for prompt in (PROMPT, "  a person\nwho &amp; weeps", "", "abc " * 50, "日本 \x00 😀"):
            remote = tensor_from_pb((await answer(stub, prompt)).text)
            local = load(open_part(text_checkpoint, "text")).embed(prompt)
            assert remote.dtype == local.dtype
            assert torch.equal(remote, local)


async def test_info_describes_the_encoder(text_checkpoint: Path, hashes: RedisHashes) -> None:
    async with text_worker(text_checkpoint, hashes, capacity=3) as stub:
        info = await stub.GetInfo(pb.TextServiceGetInfoRequest(), timeout=10)
    digest = open_part(text_checkpoint, "text").digest()
    assert info == pb.TextServiceGetInfoResponse(digest=digest, width=16, max_tokens=tiny.MAX_TOKENS, capacity=3)


async def test_the_same_prompt_is_computed_once(
    text_checkpoint: Path, hashes: RedisHashes, computed: list[str]
) -> None:
    async with text_worker(text_checkpoint, hashes) as stub:
        first = await answer(stub, PROMPT)
        assert await answer(stub, PROMPT) == first
        assert computed == [PROMPT]
        await answer(stub, PROMPT + "!")
        assert computed == [PROMPT, PROMPT + "!"]
    # Another worker with the same encoder finds it, too.
    async with text_worker(text_checkpoint, hashes) as stub:
        assert await answer(stub, PROMPT) == first
        assert len(computed) == 2


async def test_another_encoder_does_not_share_embeddings(
    text_checkpoint: Path, hashes: RedisHashes, tmp_path: Path, computed: list[str]
) -> None:
    tiny.encoder(seed=1).save(tmp_path / "text")
    async with text_worker(text_checkpoint, hashes) as one, text_worker(tmp_path, hashes) as other:
        first, second = await answer(one, PROMPT), await answer(other, PROMPT)
    assert len(computed) == 2
    assert first.digest != second.digest
    assert first.text != second.text


def key_of(checkpoint: Path, prompt: str) -> str:
    digest = open_part(checkpoint, "text").digest()
    name = hashlib.sha256(f"{digest}/torch.float32/{prompt}".encode()).hexdigest()
    return f"avatar:text:{{{name}}}"


@pytest.mark.parametrize(
    "damage",
    [lambda value: value[:-1], lambda value: value[:40] + bytes([value[40] ^ 1]) + value[41:], lambda _: b""],
    ids=["cut short", "one bit", "empty"],
)
async def test_a_damaged_embedding_is_computed_and_written_again(
    text_checkpoint: Path,
    hashes: RedisHashes,
    computed: list[str],
    damage: Callable[[bytes], bytes],
) -> None:
    key = key_of(text_checkpoint, PROMPT)
    async with text_worker(text_checkpoint, hashes) as stub:
        first = await answer(stub, PROMPT)
        [value] = await hashes.read(key, "embedding")
        assert value is not None
        await hashes.create(key, {"embedding": damage(value)}, 60.0)
        assert await answer(stub, PROMPT) == first
        assert await hashes.read(key, "embedding") == [value]
        assert len(computed) == 2
        await answer(stub, PROMPT)
        assert len(computed) == 2


async def test_an_embedding_has_a_time_to_live(text_checkpoint: Path, hashes: RedisHashes) -> None:
    async with text_worker(text_checkpoint, hashes) as stub:
        await answer(stub, PROMPT)
    remaining_s = await hashes.expires_in_s(key_of(text_checkpoint, PROMPT))
    assert TextSettings().embedding_ttl_s - 60 < remaining_s <= TextSettings().embedding_ttl_s


async def test_a_store_that_is_away_is_named_in_the_error(text_checkpoint: Path) -> None:
    hashes = RedisHashes("redis://127.0.0.1:1")
    async with text_worker(text_checkpoint, hashes) as stub, refused("STORE_UNAVAILABLE"):
        await answer(stub, PROMPT)
    await hashes.aclose()


async def test_a_full_worker_refuses_with_a_time_to_retry(
    text_checkpoint: Path, hashes: RedisHashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, loop, computing, free = TextEncoder.embed, asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def slow(self: TextEncoder, prompt: str) -> torch.Tensor:
        loop.call_soon_threadsafe(computing.set)
        assert free.wait(30)
        return embed(self, prompt)

    async with text_worker(text_checkpoint, hashes, capacity=1) as stub:
        await answer(stub, "cached")
        monkeypatch.setattr(TextEncoder, "embed", slow)
        first = asyncio.ensure_future(answer(stub, PROMPT))
        await computing.wait()
        async with refused("NO_CAPACITY") as refusal:
            await answer(stub, "another prompt")
        assert refusal.retry_s
        await answer(stub, "cached")  # needs no computation
        free.set()
        await first
        await answer(stub, "another prompt")


async def test_an_embedding_is_a_span_without_its_prompt(
    text_checkpoint: Path, hashes: RedisHashes, spans: InMemorySpanExporter
) -> None:
    async with text_worker(text_checkpoint, hashes) as stub:
        await answer(stub, PROMPT)
        await answer(stub, PROMPT)
    found = [span for span in spans.get_finished_spans() if span.name == "avatar.text"]
    assert [dict(span.attributes or {}) for span in found] == [{"avatar.kept": False}, {"avatar.kept": True}]
    assert PROMPT not in "".join(span.to_json() for span in found)


def test_a_checkpoint_without_a_text_encoder_stops_the_start(checkpoint: Path, store: SessionStore) -> None:
    with (
        DeviceQueue() as queue,
        pytest.raises(ValueError, match="has no text encoder: expected a folder text"),
    ):
        build(TextSettings(checkpoint=checkpoint), store, queue)
