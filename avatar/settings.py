"""What every service reads from its environment: one frozen dataclass a service, its fields from `AVATAR_<FIELD>`."""

import logging
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

Loaded = TypeVar("Loaded", bound="Settings")
PREFIX = "AVATAR_"
BOOLEANS = {"true": True, "false": False}
DTYPES = ("float32", "bfloat16")
# Of a client's message: names, numbers and tags beside a picture, a piece of sound or a prompt.
OTHER_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all services have in common.

    listen: HOST:PORT to serve at; port 0 takes a free one.
    redis_url: where sessions are kept.
    log_level: DEBUG, INFO, WARNING or ERROR.
    drain_s: seconds that open streams are given when the process is asked to stop.
    tls_cert, tls_key: PEM files of the server's certificate and its key; plain text without them.
    tls_client_ca: PEM file of the authority that signs clients' certificates; callers without one are then refused.
    """

    listen: str
    redis_url: str = "redis://127.0.0.1:6379"
    log_level: str = "INFO"
    drain_s: float = 5.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise unusable(each.name, value, "a number from 0")
        if self.log_level.upper() not in logging.getLevelNamesMapping():
            raise unusable("log_level", self.log_level, "DEBUG, INFO, WARNING or ERROR")
        if not self.redis_url.startswith(("redis://", "rediss://", "unix://")):
            host = self.redis_url.rpartition("@")[2]  # before it stands a password
            raise unusable("redis_url", host, "redis://HOST:PORT, rediss:// or unix://")
        check_addresses("listen", self.listen)
        self._check_needs("tls_cert", "tls_key")
        self._check_needs("tls_key", "tls_cert")
        self._check_needs("tls_client_ca", "tls_cert")

    def _check_needs(self, name: str, other: str) -> None:
        if getattr(self, name) is not None and getattr(self, other) is None:
            raise ValueError(f"{PREFIX}{name.upper()} is set and {PREFIX}{other.upper()} is not; it needs both")


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(Settings):
    """What all workers have in common.

    checkpoint: folder in our layout, with a folder for each part, or in the published one.
    capacity: streams at a time; one more is refused, and a live one that its device has no time for.
    threads: CPU threads of one computation.
    device: where it computes: `cpu`, `cuda`, or one of several such as `cuda:1`.
    dtype: what weights and states are kept in: float32, or bfloat16 where the device has instructions for it.
    """

    checkpoint: Path = Path("models/tiny")
    capacity: int = 8
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("capacity", "threads"):
            if getattr(self, name) < 1:
                raise unusable(name, getattr(self, name), "at least 1")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise unusable("device", self.device, "cpu, cuda or cuda:N")
        if self.dtype not in DTYPES:
            raise unusable("dtype", self.dtype, " or ".join(DTYPES))


@dataclass(frozen=True, kw_only=True)
class AudioSettings(WorkerSettings):
    """The audio worker's settings."""

    listen: str = "127.0.0.1:7001"


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings(WorkerSettings):
    """A denoiser's settings.

    levels: the levels that this process serves, noisiest is 0: a list such as `0` or `0,1`, or `all`.
    adapter: file of adapter matrices to merge into the network's weights; none where they are merged already.
    adapter_alpha: what the adapter was trained with; its product is scaled by alpha / rank.
    sizes: WIDTHxHEIGHT of the videos to be ready for at the start; by default the size that the checkpoint fixes.
    attention: the kernel of attention: `auto`, or torch's `math`, `flash`, `efficient` or `cudnn`.
    compile: have torch.compile make the layers' code at the start; only `sizes` are served then.
    float8: keep the weights of linear maps in float8; needs the extra `float8` and a device that has it.
    chain: HOST:PORT where the denoisers of a chain meet, to hand latents to each other: the one of level 0 listens
        there; none where latents travel through the gateway.
    """

    listen: str = "127.0.0.1:7010"
    levels: str = "all"
    adapter: Path | None = None
    adapter_alpha: float = 64.0
    sizes: tuple[str, ...] = ()
    attention: str = "auto"
    compile: bool = False
    float8: bool = False
    chain: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chain:
            check_addresses("chain", self.chain)

    def served(self, num_levels: int) -> list[int]:
        """The levels as numbers. ValueError if the checkpoint has no such level."""
        if self.levels == "all":
            return list(range(num_levels))
        try:
            levels = [int(part) for part in self.levels.split(",")]
        except ValueError as error:
            raise ValueError(f"{PREFIX}LEVELS is {self.levels!r}, expected `all` or a list such as `0,1`") from error
        if unknown := [level for level in levels if not 0 <= level < num_levels]:
            raise ValueError(f"{PREFIX}LEVELS names level {unknown[0]}, the checkpoint has 0 to {num_levels - 1}")
        return levels

    def pictures(self) -> list[tuple[int, int]]:
        """The sizes as widths and heights. ValueError if one is none."""
        found = [re.fullmatch(r"(\d+)x(\d+)", size) for size in self.sizes]
        if not all(found):
            raise ValueError(f"{PREFIX}SIZES is {','.join(self.sizes)!r}, expected a list such as `704x384,512x512`")
        return [(int(each[1]), int(each[2])) for each in found if each]


@dataclass(frozen=True, kw_only=True)
class VaeSettings(WorkerSettings):
    """The VAE worker's settings."""

    listen: str = "127.0.0.1:7002"


@dataclass(frozen=True, kw_only=True)
class TextSettings(WorkerSettings):
    """The text worker's settings; its capacity is how many prompts it computes at a time.

    embedding_ttl_s: seconds that a prompt's embedding is kept in the store.
    """

    listen: str = "127.0.0.1:7003"
    embedding_ttl_s: float = 86400.0


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(Settings):
    """The gateway's settings.

    audio, vae: HOST:PORT of each of the stage's workers; a name that has several addresses is several workers.
    denoisers: HOST:PORT of all denoisers, in any order: each says which levels it serves.
    text: HOST:PORT of each text worker; empty if there is none, and prompts are refused.
    stall_s: seconds that a live block may be due at a worker, beside four times what a step takes; then it is lost.
    rebuild_s: seconds in which the stream of a lost worker has to be open at another.
    session_ttl_s, reference_ttl_s: seconds that a session or reference is kept when nothing happens.
    audio_ahead_s: seconds of sound that are taken ahead of the blocks that have been started.
    live_ahead_s: the same in live mode, where more is not taken.
    patience_s: seconds that a live block waits for the rest of its speech before it is idle, or filled with silence.
    max_unread_s: seconds that a stream whose client takes nothing is kept.
    resume_s: seconds that a session waits to be resumed after its connection broke; 0 if it does not.
    kept_s, kept_bytes: how much of what was sent is kept to be sent again, in seconds of video and in bytes.
    max_picture_bytes, max_audio_bytes, max_prompt_bytes: largest picture, piece of sound and prompt.
    worker_ca: PEM file of the authority that signed the workers' certificates; they are sent plain text without it.
    worker_cert, worker_key: PEM files of the certificate that the gateway shows to workers, and of its key.
    tenants: TOML file of who may call, and how much each; everybody may, any amount, without it.
    """

    listen: str = "127.0.0.1:7000"
    audio: tuple[str, ...] = ("127.0.0.1:7001",)
    denoisers: tuple[str, ...] = ("127.0.0.1:7010", "127.0.0.1:7011", "127.0.0.1:7012", "127.0.0.1:7013")
    vae: tuple[str, ...] = ("127.0.0.1:7002",)
    text: tuple[str, ...] = ()
    stall_s: float = 2.0
    rebuild_s: float = 30.0
    session_ttl_s: float = 300.0
    reference_ttl_s: float = 86400.0
    audio_ahead_s: float = 4.0
    live_ahead_s: float = 30.0
    patience_s: float = 0.25
    max_unread_s: float = 10.0
    resume_s: float = 10.0
    kept_s: float = 2.0
    kept_bytes: int = 64 << 20
    max_picture_bytes: int = 8 << 20
    max_audio_bytes: int = 1 << 20
    max_prompt_bytes: int = 8 << 10
    worker_ca: Path | None = None
    worker_cert: Path | None = None
    worker_key: Path | None = None
    tenants: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("audio", "denoisers", "vae", "text"):
            check_addresses(name, *getattr(self, name))
            if name != "text" and not getattr(self, name):
                raise unusable(name, "", "at least one HOST:PORT")
        self._check_needs("worker_cert", "worker_key")
        self._check_needs("worker_key", "worker_cert")
        self._check_needs("worker_cert", "worker_ca")

    @property
    def max_message_bytes(self) -> int:
        """The largest message of a client: the largest of what it carries, and everything else in it."""
        return max(self.max_picture_bytes, self.max_audio_bytes, self.max_prompt_bytes) + OTHER_BYTES


def unusable(name: str, value: object, expected: str) -> ValueError:
    """The error that names the variable of a field whose value cannot be used."""
    return ValueError(f"{PREFIX}{name.upper()} is {value!r}, expected {expected}")


def check_addresses(name: str, *addresses: str) -> None:
    """ValueError if one is not HOST:PORT; `dns:///` may stand before it, as gRPC has it."""
    for each in addresses:
        if not re.fullmatch(r"\S+:\d{1,5}", each):
            raise unusable(name, each, "HOST:PORT")


def load(cls: type[Loaded], environ: Mapping[str, str]) -> Loaded:
    """The settings that the environment gives, the defaults elsewhere. ValueError names a value that cannot be used."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for each in fields(cls):
        name = PREFIX + each.name.upper()
        if name in environ:
            values[each.name] = _parse(name, environ[name], hints[each.name])
        elif each.default is MISSING:
            raise ValueError(f"{name} is not set")
    return cls(**values)


def _parse(name: str, text: str, kind: Any) -> Any:
    if isinstance(kind, types.GenericAlias) and kind.__origin__ is tuple:
        parts = text.split(",") if text.strip() else []
        return tuple(_parse(name, part.strip(), kind.__args__[0]) for part in parts)
    if isinstance(kind, types.UnionType):  # something, or None where it is not set or empty
        if not text:
            return None
        kind = kind.__args__[0]
    if kind is bool:
        if text not in BOOLEANS:
            raise ValueError(f"{name} is {text!r}, expected {' or '.join(BOOLEANS)}")
        return BOOLEANS[text]
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}, expected {kind.__name__}") from error
