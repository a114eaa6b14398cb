"""Command-line options of the test suite, and shared fixtures: checkpoints, Redis, audio, a picture, telemetry."""

import asyncio
import functools
import gc
import json
import math
import pickle
import shutil
import wave
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import repeat
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from PIL import Image
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from avatar.audio.whisper import Whisper
from avatar.checkpoints import files as checkpoints
from avatar.denoiser import config as denoiser_config
from avatar.denoiser.model import Network
from avatar.errors import StoreUnavailable
from avatar.settings import GatewaySettings
from avatar.store.redis import RedisHashes
from avatar.store.sessions import SessionStore
from avatar.vae import light, vae
from avatar.vae.picture import reading
from avatar.vae.picture.reading import Picture
from avatar.vae.picture.rule import PictureRule
from services.local.processes import local_redis
from services.local.suite import gateway as run_gateway
from tests import published as as_published
from tests.blocks import BLOCK_LATENTS
from tests.text import tiny as tiny_text
from tests.workers import workers_in_thread

torch.set_num_threads(1)

RATE_HZ = 16000
ASSETS = Path(__file__).parents[1] / "assets"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        type=Path,
        default=Path(__file__).parent / "goldens",
        help="folder of recorded runs of the reference, for tests/parity",
    )
    parser.addoption(
        "--target",
        help="HOST:PORT of a running gateway for tests/contract and tests/web; without it they start their own",
    )
    parser.addoption("--screenshot", type=Path, help="PNG file for the screenshot that tests/web takes")


def pytest_configure() -> None:
    """Spare the collector what stays until the end: modules and tests. That is 5 s of CPU time of every process."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of the embedded default's kind, with random weights that no layer maps to zero.

    Three levels, 64x64 pixels, a sink update after 0.96 s, no text.
    """
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def short_blocks(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with blocks of one latent, and the sink update at the same frame."""
    folder = tmp_path_factory.mktemp("checkpoint") / "short-blocks"
    shutil.copytree(checkpoint, folder)
    config = folder / "denoiser/config.json"
    fields = {**json.loads(config.read_text()), "num_frames_per_block": 1, "sink_update_block": 6}
    config.write_text(json.dumps(fields))
    return folder


@pytest.fixture
def one_level(checkpoint: Path, tmp_path: Path) -> Path:
    """The same checkpoint with one level, for the smallest number of processes."""
    shutil.copytree(checkpoint, tmp_path / "one-level")
    config = tmp_path / "one-level/denoiser/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "schedule": [1.0, 0.0]}))
    return tmp_path / "one-level"


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a text encoder, and a network that takes its embeddings."""
    folder = tmp_path_factory.mktemp("text-checkpoint")
    encoder = tiny_text.encoder()
    write_checkpoint(folder, encoder.width, encoder.config.max_tokens)
    encoder.save(folder / "text")
    return folder


@pytest.fixture(scope="session")
def two_levels(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with text, at two levels: one process less."""
    folder = tmp_path_factory.mktemp("checkpoint") / "two-levels"
    shutil.copytree(text_checkpoint, folder)
    config = folder / "denoiser/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "schedule": [1.0, 0.5, 0.0]}))
    return folder


@pytest.fixture(scope="session")
def listening_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first checkpoint's kind, with a network that listens and takes face motion."""
    folder = tmp_path_factory.mktemp("listening-checkpoint")
    write_checkpoint(folder, heard_inject_layers=(1,), face_motion=True, audio_context_frames=8)
    return folder


def write_checkpoint(folder: Path, text_width: int = 8, text_rows: int = 1, **fields: Any) -> None:
    """Write a checkpoint. fields: of the network's configuration."""
    torch.manual_seed(0)
    audio = Whisper.tiny()
    audio.save(folder / "audio")
    config = replace(
        denoiser_config.tiny(),
        dim=32,
        num_heads=2,
        num_layers=2,
        ffn_dim=48,
        audio_dim=audio.width,
        num_encoder_layers=audio.num_states,
        audio_inject_layers=(0,),
        num_frames_per_block=BLOCK_LATENTS,
        schedule=(1.0, 0.75, 0.5, 0.0),
        sink_update_block=2 * 3 // BLOCK_LATENTS,
        sink_distance=(4, 30),
        text_dim=text_width,
        text_len=text_rows,
        **fields,
    )
    network = Network(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    checkpoints.save(folder / "denoiser", config.to_dict(), network)
    sizes = light.LightConfig(wide=8, mid=8, thin=8, latent_scale=1.0)
    picture = PictureRule("cover", width=64, height=64)
    checkpoints.save(folder / "vae", asdict(vae.VaeConfig("light", picture, 25, asdict(sizes))), mean_colours(sizes))


def mean_colours(sizes: light.LightConfig) -> light.LightCodec:
    """Return a codec whose latents are mixtures of the mean colours of patches: its frames compress well."""
    codec = light.LightCodec(sizes)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in codec.state_dict().items()}
    mixtures = torch.randn(3, light.CHANNELS) / 64  # nearly orthonormal
    pixels = math.prod(light.patch_sizes().values()) // 3
    tensors["encoder.linear.weight"] = repeat(mixtures, "c z -> z (c n) 1 1", n=pixels)
    tensors["decoder.linear.weight"] = repeat(mixtures, "c z -> (c n) z 1 1", n=pixels)
    codec.load_state_dict(tensors)
    return codec


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in the published layout, with every tensor name, and a LoRA adapter in its folder."""
    folder = tmp_path_factory.mktemp("published") / "Wan2.2-S2V-14B"
    as_published.write(folder)
    return folder


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A small PNG."""
    rows, columns = torch.meshgrid(torch.arange(80), torch.arange(60), indexing="ij")
    pixels = torch.stack([rows * 3, columns * 4, (rows + columns) * 2], -1).to(torch.uint8)
    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


def speech(seconds: float, seed: int = 0) -> bytes:
    """Return noise with a silent quarter of a second, which stands for speech, as 16 kHz mono PCM16."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(round(seconds * RATE_HZ), generator=generator) * 3000
    samples[4000:8000] = 0
    return samples.clamp(-32768, 32767).to(torch.int16).numpy().tobytes()


def write_speech(path: Path, seconds: float, seed: int = 0) -> Path:
    """Write `speech` to a WAV file; return its path."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE_HZ, 0, "NONE", ""))
        file.writeframes(speech(seconds, seed))
    return path


@contextmanager
def redis_in(folder: Path) -> Iterator[str]:
    """Run a Redis server while the body runs; gives its URL."""
    with asyncio.Runner() as runner:
        server = local_redis(folder)
        yield runner.run(server.__aenter__())
        runner.run(server.__aexit__(None, None, None))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis server that all tests of this process share."""
    with redis_in(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def redis(redis_server: str) -> str:
    """The URL of a Redis server, empty at the start of each test."""
    with Redis.from_url(redis_server) as client:
        client.flushdb()
    return redis_server


@pytest.fixture
async def redis_client(redis: str) -> AsyncGenerator[AsyncRedis, None]:
    async with AsyncRedis.from_url(redis) as client:
        yield client


@pytest.fixture
async def hashes(redis: str) -> AsyncGenerator[RedisHashes, None]:
    hashes = RedisHashes(redis)
    yield hashes
    await hashes.aclose()


class UnreliableHashes(RedisHashes):
    """Hashes in a Redis server that is unreachable while `is_lost`. num_failures: calls that have failed."""

    is_lost = False
    num_failures = 0

    @asynccontextmanager
    async def _call(self, *, is_logged: bool = True) -> AsyncGenerator[None, None]:
        if self.is_lost:
            self.num_failures += 1
            raise StoreUnavailable("the session store cannot be reached", retry_s=1.0)
        async with super()._call(is_logged=is_logged):
            yield


@pytest.fixture
async def unreliable(redis: str) -> AsyncGenerator[UnreliableHashes, None]:
    hashes = UnreliableHashes(redis)
    yield hashes
    await hashes.aclose()


@pytest.fixture
def store(hashes: RedisHashes) -> SessionStore:
    return SessionStore(hashes)


@pytest.fixture(scope="session")
def shared_workers(checkpoint: Path, redis_server: str) -> Iterator[GatewaySettings]:
    """Settings of a gateway over workers that tests of this process share."""
    own_cell = GatewaySettings(listen="127.0.0.1:0", cell="shared")
    with workers_in_thread(checkpoint, redis_server, own_cell) as settings:
        yield settings


@pytest.fixture
async def gateway(shared_workers: GatewaySettings, store: SessionStore) -> AsyncGenerator[str, None]:
    """HOST:PORT of a gateway over the shared workers, which are idle when it has stopped."""
    async with run_gateway(store, shared_workers) as target:
        yield target


@functools.cache
def picture_by(program: object, *arguments: Any) -> Picture:
    """Read a picture by a decoder's program."""
    assert program is reading.PROGRAM
    return reading.read_picture(*arguments)


@pytest.fixture(scope="session", autouse=True)
def pictures_are_read_once() -> Iterator[None]:
    """Let checkpoints remember pictures that they have read: hundreds of sessions show the same, at 0.2 s each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "read_picture", lambda *arguments: picture_by(reading.PROGRAM, *arguments))
        yield


class Exploit:
    """An object whose unpickling writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def exploit(tmp_path: Path) -> Exploit:
    return Exploit(tmp_path / "unpickled")


@pytest.fixture
def pickled(exploit: Exploit) -> tuple[bytes, Path]:
    """A pickle, and the file that its unpickling writes."""
    return pickle.dumps(exploit), exploit.path


@pytest.fixture(scope="session")
def exporter() -> InMemorySpanExporter:
    """The exporter of all spans of this process; OpenTelemetry takes a provider only once."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    """The exporter, with no spans from earlier tests."""
    exporter.clear()
    return exporter


@pytest.fixture(scope="session")
def measured() -> InMemoryMetricReader:
    """The reader of all metrics that this process records."""
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))
    return reader
