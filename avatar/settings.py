"""Settings of the services: one frozen class a service, whose fields come from the environment's `AVATAR_<FIELD>`.

Durations are float seconds; a list is separated by commas; an optional path is None where its variable is empty. `load`
reads the environment, construction does not.
"""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

Loaded = TypeVar("Loaded", bound="Settings")
PREFIX = "AVATAR_"
MAX_PORT = 65535
ADDRESS = f"HOST:PORT with a port of at most {MAX_PORT}"
# A client's message holds names, numbers and tags beside its picture, audio or prompt.
OTHER_BYTES = 64 << 10
# The gateway passes pictures, audio and prompts on to workers, which receive messages of 64 MiB
# (avatar.rpc.channel.MAX_MESSAGE_BYTES).
MAX_CONTENT_BYTES = (64 << 20) - OTHER_BYTES
# Characters of text in the turns of a stream that are not over; gateway and voice workers share it.
MAX_TEXT_CHARS = 10_000
# A year. Clocks, Redis and protobuf's durations have limits, which values beyond would meet only while serving.
MAX_SECONDS = 365 * 86400
# Streams and threads: more than any machine has, and what a message of a worker's state can carry.
MAX_COUNT = 1 << 16
# Expected values of pydantic's own checks, by its types of error.
EXPECTED = {
    "bool_parsing": "true or false",
    "float_parsing": "float",
    "int_parsing": "int",
    "finite_number": "a finite number",
}


def _accept(is_valid: Callable[[Any], object], expected: str) -> AfterValidator:
    """Return a check whose error is the text that follows `expected` in the message of `load`."""

    def check(value: Any) -> Any:
        if not is_valid(value):
            raise ValueError(expected)
        return value

    return AfterValidator(check)


def _match(pattern: str, expected: str) -> AfterValidator:
    return _accept(re.compile(pattern).fullmatch, expected)


def _split(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",")] if value.strip() else []


def _parse_schedule(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    expected = "a number of levels, or the sigmas to keep, such as `1,0.75`"
    try:
        numbers = tuple(map(float, _split(value)))
    except ValueError as error:
        raise ValueError(expected) from error
    if len(numbers) == 1 and numbers[0] >= 1 and numbers[0].is_integer():
        return int(numbers[0])
    if not all(0 < number <= 1 for number in numbers):
        raise ValueError(expected)
    return numbers or None


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(re.fullmatch(r"\S+", host) and re.fullmatch(r"[0-9]{1,5}", port)) and int(port) <= MAX_PORT


Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0)]
ContentBytes = Annotated[int, Field(ge=0, le=MAX_CONTENT_BYTES)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: value or None)]
# gRPC allows `dns:///` in front.
Address = Annotated[str, _accept(_is_address, ADDRESS)]
OptionalAddress = Annotated[str, _accept(lambda text: not text or _is_address(text), ADDRESS)]
Addresses = Annotated[tuple[Address, ...], BeforeValidator(_split)]
SomeAddresses = Annotated[Addresses, _accept(len, "at least one HOST:PORT")]
# Fewer levels than a checkpoint was trained for: their number, or the sigmas to keep; None for all.
Schedule = Annotated[int | tuple[float, ...] | None, BeforeValidator(_parse_schedule)]
LogLevel = Annotated[
    str, _accept(lambda name: name.upper() in logging.getLevelNamesMapping(), "DEBUG, INFO, WARNING or ERROR")
]


class Settings(BaseSettings):
    """Settings of all services.

    listen: HOST:PORT to serve at; port 0 takes a free one.
    advertise: HOST:PORT at which the other services reach this process; by default the host of `listen`, or the address
        of this machine on the route to Redis if that is a wildcard, and the port that it serves at.
    cell: name of the cell that this process belongs to; a gateway uses the workers of its own cell.
    redis_url: the Redis server that keeps sessions, and in which workers register.
    log_level: DEBUG, INFO, WARNING or ERROR.
    drain_s: seconds for open streams to end when the process is asked to stop.
    tls_cert, tls_key: PEM files of the server's certificate and its key; plain text without them.
    tls_client_ca: PEM file of the authority that signs clients' certificates; callers without one are then refused.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, enable_decoding=False, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    listen: Address
    advertise: OptionalAddress = ""
    cell: Annotated[
        str, _match(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "lower-case letters, digits and -, 63 at most")
    ] = "main"
    redis_url: Annotated[str, _match(r"(redis|rediss|unix)://.*", "redis://HOST:PORT, rediss:// or unix://")] = (
        "redis://127.0.0.1:6379"
    )
    log_level: LogLevel = "INFO"
    drain_s: Seconds = 5.0
    tls_cert: OptionalPath = None
    tls_key: OptionalPath = None
    tls_client_ca: OptionalPath = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        *_: Any,
        **__: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take the values that the constructor is given, and nothing else."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        return self._check_pairs(("tls_cert", "tls_key"), ("tls_key", "tls_cert"), ("tls_client_ca", "tls_cert"))

    def _check_pairs(self, *pairs: tuple[str, str]) -> Self:
        for name, needed in pairs:
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"{PREFIX}{name.upper()} is set and {PREFIX}{needed.upper()} is not; it needs both")
        return self


class WorkerSettings(Settings):
    """Settings of all workers.

    checkpoint: folder in our layout, with a folder for each part, or in the published one.
    capacity: streams at a time, of a denoiser per level; more are refused, and so is a live stream that its device has
        no time for.
    memory_gb: GB of the device's memory for streams of denoisers; more are refused. By default, on a GPU, nine tenths
        of what is free once the weights are loaded, and on a CPU no limit.
    threads: CPU threads of one computation.
    device: the device that computes: `cpu`, `cuda`, or one of several such as `cuda:1`.
    dtype: dtype of weights and states: float32, or bfloat16 where the device has instructions for it. The audio encoder
        computes in float32, whatever it is.
    sizes: WIDTHxHEIGHT of the videos that denoisers and VAE workers prepare for at the start; a picture gets the one
        nearest to its shape. By default those of the checkpoint: `python -m avatar inspect` names them.
    """

    checkpoint: Path = Path("models/tiny")
    capacity: Count = 8
    memory_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    threads: Count = 1
    device: Annotated[str, _match(r"cpu|cuda(:\d+)?", "cpu, cuda or cuda:N")] = "cpu"
    dtype: Annotated[str, _match("float32|bfloat16", "float32 or bfloat16")] = "float32"
    sizes: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()

    def video_sizes(self) -> list[tuple[int, int]]:
        """Return the sizes as widths and heights in pixels. ValueError if one is not WIDTHxHEIGHT."""
        found = [re.fullmatch(r"(\d+)x(\d+)", size) for size in self.sizes]
        if not all(found):
            raise unusable("sizes", ",".join(self.sizes), "a list such as `704x384,512x512`")
        return [(int(each[1]), int(each[2])) for each in found if each]


class AudioSettings(WorkerSettings):
    """Settings of the audio worker."""

    listen: Address = "127.0.0.1:7001"


class DenoiserSettings(WorkerSettings):
    """Settings of a denoiser.

    levels: the levels that this process serves, noisiest is 0: a list such as `0` or `0,1`, or `all`.
    schedule: fewer levels than the checkpoint was trained for: their number, or the sigmas to keep, such as `1,0.75`;
        all levels without it. Levels are numbered within the schedule.
    adapter: LoRA adapter to merge into the network's weights, a file or a folder that PEFT saved; none where they are
        merged already.
    adapter_alpha: alpha of a file's training (64 if it is not set); the product is scaled by alpha / rank. A folder
        states its own.
    attention: the attention kernel: `auto`, or torch's `math`, `flash`, `efficient` or `cudnn`.
    compile: compile the layers with torch.compile at the start; only `sizes` are served then.
    float8: compute linear maps in float8; needs `compile`, bfloat16 and a device that has it.
    kv_dtype: dtype of the keys and values of past blocks: `auto` for `dtype`, or `float8_e4m3fn`, which halves the
        window's memory.
    chain: HOST:PORT where the denoisers of a chain meet, to hand latents to each other: the one of level 0 listens
        there; none where latents travel through the gateway.
    chain_backend: how a chain's latents travel: `gloo`, through the host's memory, or `nccl`, from GPU to GPU, which
        has not run yet.
    """

    listen: Address = "127.0.0.1:7010"
    levels: str = "all"
    schedule: Schedule = None
    adapter: OptionalPath = None
    adapter_alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    attention: str = "auto"
    compile: bool = False
    float8: bool = False
    kv_dtype: Annotated[str, _match(r"auto|float8_e4m3fn", "auto or float8_e4m3fn")] = "auto"
    chain: OptionalAddress = ""
    chain_backend: Annotated[str, _match("gloo|nccl", "gloo or nccl")] = "gloo"

    def served_levels(self, num_levels: int) -> list[int]:
        """Return the levels as numbers. ValueError if the checkpoint has no such level."""
        if self.levels == "all":
            return list(range(num_levels))
        try:
            levels = [int(part) for part in self.levels.split(",")]
        except ValueError as error:
            raise unusable("levels", self.levels, "`all` or a list such as `0,1`") from error
        if len({*levels}) < len(levels):
            raise unusable("levels", self.levels, "each level once")
        if unknown := [level for level in levels if not 0 <= level < num_levels]:
            raise ValueError(f"{PREFIX}LEVELS names level {unknown[0]}, the schedule has 0 to {num_levels - 1}")
        return levels


class VaeSettings(WorkerSettings):
    """Settings of the VAE worker.

    decoder: the decoder of frames, a file called taew2_1 or lighttaew2_1 or a folder with its config.json; by default
        the one in the checkpoint's folder, or else the VAE's own.
    """

    listen: Address = "127.0.0.1:7002"
    decoder: OptionalPath = None


class TextSettings(WorkerSettings):
    """Settings of the text worker; its capacity is the number of prompts that it computes at a time.

    embedding_ttl_s: seconds that the store keeps a prompt's embedding.
    """

    listen: Address = "127.0.0.1:7003"
    embedding_ttl_s: Seconds = 86400.0


class VoiceSettings(Settings):
    """Settings of the voice worker. Either `voice_url` or `voice_command` is set.

    capacity: turns that are spoken at a time; more are refused.
    voice_url: address of an OpenAI-compatible speech endpoint, without `/audio/speech`, such as
        `https://api.openai.com/v1`.
    voice_key: file that holds the endpoint's key; read for each request.
    voice_model, voice_name: the endpoint's model and voice.
    voice_command: command that speaks `{text}` into the WAV file `{wav}`, such as `flite -t {text} -o {wav}`. It runs
        once a sentence, without a shell.
    voice_languages: BCP 47 tags of the languages that the engine speaks, such as `en,pt-BR`; other languages are
        refused. Any language without it.
    voice_timeout_s: seconds that a sentence's sound, or its next part, may take.
    """

    listen: Address = "127.0.0.1:7004"
    capacity: Count = 8
    voice_url: Annotated[str, _match(r"(https?://\S+)?", "https://HOST/PATH or http://HOST/PATH")] = ""
    voice_key: OptionalPath = None
    voice_model: str = "tts-1"
    voice_name: str = "alloy"
    voice_command: str = ""
    voice_languages: Annotated[tuple[str, ...], BeforeValidator(_split)] = ()
    voice_timeout_s: Annotated[float, Field(ge=0.1, le=MAX_SECONDS, allow_inf_nan=False)] = 15.0


class GatewaySettings(Settings):
    """Settings of the gateway.

    audio, vae: HOST:PORT of each of the stage's workers; a name that has several addresses is several workers.
    denoisers: HOST:PORT of all denoisers, in any order: each reports the levels that it serves.
    text: HOST:PORT of each text worker; empty if there is none, and prompts are refused.
    voice: HOST:PORT of each voice worker; empty if there is none, and text to speak is refused.
    schedule: the denoisers' schedule, as they have it in theirs: others are not used. Without it, the gateway takes the
        schedule of the denoisers that serve all levels of one.
    stall_s: seconds, added to four times a step, after which a worker that owes a live block counts as lost.
    rebuild_s: seconds to open the stream of a lost worker at another one, and for a stream's first answer at a worker.
    session_ttl_s: seconds that a session is kept without a stream.
    reference_ttl_s: seconds that a reference is kept after its creation.
    audio_ahead_s: seconds of offline audio accepted ahead of the blocks in the pipeline.
    live_ahead_s: seconds of live audio that may wait; audio beyond it is refused.
    slow_live: what becomes of a live stream that the devices cannot keep up with: `notice` opens it with a notice that
        it will lag, `refuse` refuses it. Offline streams are not affected.
    patience_s: seconds that a live block waits for the rest of its speech before it is idle, or filled with silence.
    max_unread_s: seconds after which a stream whose client reads nothing is closed.
    silent_s: seconds after which an offline stream ends whose client sends no audio and is owed no frames, and 60 times
        as many for a live stream without any message; 0 disables it.
    resume_s: seconds that a session waits to be resumed after its connection broke; 0 disables it.
    kept_s: seconds of video that are kept to be sent again on resume.
    kept_bytes: bytes of frames and audio that are kept to be sent again on resume.
    max_picture_bytes: largest picture file.
    max_audio_bytes: largest piece of audio in one message.
    max_prompt_bytes: largest prompt, in UTF-8.
    worker_ca: PEM file of the authority that signed the workers' certificates; plain text to workers without it.
    worker_cert, worker_key: PEM files of the certificate that the gateway shows to workers, and of its key.
    tenants: TOML file of the tenants, their tokens and quotas; without it everybody may call, without limits.
    marks: mark frames as made by a machine, for machines, in every encoding that can carry it.
    """

    listen: Address = "127.0.0.1:7000"
    audio: SomeAddresses = ("127.0.0.1:7001",)
    denoisers: SomeAddresses = ("127.0.0.1:7010", "127.0.0.1:7011")
    vae: SomeAddresses = ("127.0.0.1:7002",)
    text: Addresses = ()
    voice: Addresses = ()
    schedule: Schedule = None
    stall_s: Seconds = 2.0
    # A worker on two cores with a load of 14 took up to 35 s to start again: 2.5 to 5 CPU-seconds.
    rebuild_s: Seconds = 60.0
    session_ttl_s: Seconds = 300.0
    reference_ttl_s: Seconds = 86400.0
    audio_ahead_s: Seconds = 4.0
    live_ahead_s: Seconds = 30.0
    slow_live: Annotated[str, _match("notice|refuse", "notice or refuse")] = "notice"
    patience_s: Seconds = 0.25
    max_unread_s: Seconds = 10.0
    silent_s: Seconds = 60.0
    resume_s: Seconds = 10.0
    kept_s: Seconds = 2.0
    kept_bytes: Bytes = 64 << 20
    max_picture_bytes: ContentBytes = 8 << 20
    max_audio_bytes: ContentBytes = 1 << 20
    max_prompt_bytes: ContentBytes = 8 << 10
    worker_ca: OptionalPath = None
    worker_cert: OptionalPath = None
    worker_key: OptionalPath = None
    tenants: OptionalPath = None
    marks: bool = True

    @model_validator(mode="after")
    def _check_worker_tls(self) -> Self:
        pairs = ("worker_cert", "worker_key"), ("worker_key", "worker_cert"), ("worker_cert", "worker_ca")
        return self._check_pairs(*pairs)

    @property
    def max_message_bytes(self) -> int:
        """The largest message of a client: the largest picture, audio or prompt, and everything else in it."""
        return max(self.max_picture_bytes, self.max_audio_bytes, self.max_prompt_bytes) + OTHER_BYTES


def load(cls: type[Loaded], environ: Mapping[str, str]) -> Loaded:
    """Return the settings that the environment gives, with defaults for the rest.

    ValueError names, in one line, a variable that is not set and has no default, or whose value cannot be used.
    """
    source = EnvSettingsSource(cls)
    source.env_vars = {name.lower(): value for name, value in environ.items() if name == name.upper()}
    try:
        return cls(**source())
    except ValidationError as error:
        raise _as_value_error(error.errors()[0]) from error


def unusable(name: str, value: str, expected: str) -> ValueError:
    """Return the error that names the variable of a field whose value cannot be used."""
    return ValueError(f"{PREFIX}{name.upper()} is {value!r}, expected {expected}")


def _as_value_error(details: ErrorDetails) -> ValueError:
    """Return one of pydantic's errors in our words; one of a whole object is in our words already."""
    kind, context = details["type"], details.get("ctx", {})
    if not details["loc"]:
        return ValueError(context["error"])
    name, value = str(details["loc"][0]), details["input"]
    if kind == "missing":
        return ValueError(f"{PREFIX}{name.upper()} is not set")
    if name == "redis_url":
        value = value.rpartition("@")[2]  # a password precedes it
    if kind == "greater_than_equal":
        return unusable(name, value, f"at least {context['ge']:g}")
    if kind == "less_than_equal":
        return unusable(name, value, f"at most {context['le']:.0f}")
    return unusable(name, value, EXPECTED.get(kind) or str(context.get("error", details["msg"])))
