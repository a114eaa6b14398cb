"""Memory and time that a checkpoint needs of its devices, by counting: no weight is read and nothing is measured.

Rules of counting:

- An operation is a multiplication or an addition. Matrix products, attention and convolutions are counted apart, since
  devices do them at other rates. The window of blocks is full, and the text is prefilled.
- Traffic is the memory that all other operators read and write, each its arguments and its result once, as an eager
  device does. It is in passes over a block's hidden state; compiled, it is what is left where operators are fused.
- A session's memory is its KV caches, in the network's dtype, and the decoder's state.

Times are estimates, and have not run on a GPU: counts divided by the rates of `Gpu`. `benchmarks/gpu.py` measures them.

Axes of sizes: height and width of latents.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from avatar.denoiser.attention import MOTION_GROUPS, grid_size
from avatar.denoiser.config import NetworkConfig
from avatar.types import FRAME_RATE_HZ

# Passes over a block's hidden state that a layer's elementwise operators make, audio injections included: counted, and
# estimated where torch.compile fuses them.
EAGER_PASSES, COMPILED_PASSES = 69.4, 54
# Widths and heights of videos to choose from; the largest is the one that the public weights are used with. An upright
# video costs what it costs lying.
SIZES = ((704, 384), (512, 512), (512, 384), (448, 448), (512, 320), (320, 320), (384, 256))
# Bytes of a number in bfloat16.
BF16 = 2
# Launches, copies to the device and waits of a step that nothing hides.
STEP_OVERHEAD_S = 3e-3
# Assumed for activations, workspaces and CUDA's context, and the share of a device's memory that stays free beside it.
RESERVE_BYTES, SPARE = 4e9, 0.1
# Share of a device's time that live sessions get (avatar.runtime.admission).
LIVE_SHARE = 0.94
# Operations of wav2vec2-large for a block, and of its layers alone for another size.
AUDIO_FLOPS, AUDIO_LAYERS, AUDIO_WIDTH = 323e9, 24, 1024


@dataclass(frozen=True)
class Gpu:
    """Sustained rates of a device: operations and bytes a second. All are estimates.

    gemm, float8: of large matrix products in bfloat16 and in float8. attention: in bfloat16, by cuDNN's kernel; it is
    340e12 by FlashAttention 2. convolution: in bfloat16. float32: of matrix products, TF32 off.
    """

    name: str
    bandwidth: float
    gemm: float = 650e12
    float8: float = 1100e12
    attention: float = 600e12
    convolution: float = 250e12
    float32: float = 45e12


H100, H200 = Gpu("H100", 2.72e12), Gpu("H200", 3.79e12)


@dataclass(frozen=True)
class Work:
    """Operations by kind, and bytes of traffic beside them."""

    gemm: float = 0.0
    attention: float = 0.0
    convolution: float = 0.0
    float32: float = 0.0
    traffic: float = 0.0

    @property
    def flops(self) -> float:
        """All operations."""
        return self.gemm + self.attention + self.convolution + self.float32

    def seconds(self, gpu: Gpu, *, float8: bool = False) -> float:
        """Return the time on a device, one kind after the other. float8: matrix products are in float8."""
        return (
            self.gemm / (gpu.float8 if float8 else gpu.gemm)
            + self.attention / gpu.attention
            + self.convolution / gpu.convolution
            + self.float32 / gpu.float32
            + self.traffic / gpu.bandwidth
        )


def step_work(config: NetworkConfig, height: int, width: int, *, compiled: bool = False) -> Work:
    """Return the work of one block at one level."""
    rows, columns = grid_size(height, width)
    frame_tokens = rows * columns
    tokens, dim = frame_tokens * config.num_frames_per_block, config.dim
    keys = frame_tokens * config.window_latents + condition_tokens(height, width)
    injections = len(config.audio_inject_layers) + len(config.heard_inject_layers)
    passes = COMPILED_PASSES if compiled else EAGER_PASSES
    patch = 4 * (config.in_dim + config.cond_dim + config.out_dim)
    return Work(
        gemm=tokens * (config.num_layers * _layer_flops(config) + injections * 4 * dim * dim + 2 * dim * patch),
        attention=4 * tokens * dim * (config.num_layers * (keys + _text_keys(config)) + injections * 5),
        traffic=passes * config.num_layers * tokens * dim * BF16,
    )


def prefill_work(config: NetworkConfig, height: int, width: int) -> Work:
    """Return the work of prefill: the condition tokens, and keys and values of the text."""
    tokens, text, dim = condition_tokens(height, width), config.text_len, config.dim
    text_flops = text * (2 * dim * (config.text_dim + dim) + config.num_layers * 4 * dim * dim)
    return Work(
        gemm=config.num_layers * tokens * _layer_flops(config) + text_flops,
        attention=4 * tokens * dim * config.num_layers * (tokens + _text_keys(config)),
        traffic=EAGER_PASSES * config.num_layers * tokens * dim * BF16,
    )


def _layer_flops(config: NetworkConfig) -> int:
    """Return the operations of a layer's matrix products for a token: six of attention, two of the feed-forward net."""
    return 2 * config.dim * (6 * config.dim + 2 * config.ffn_dim)


def _text_keys(config: NetworkConfig) -> int:
    """Return the keys of text that a token attends to; a single one needs no attention."""
    return config.text_len if config.text_len > 1 else 0


def condition_tokens(height: int, width: int) -> int:
    """Return the tokens of picture and motion."""
    rows, columns = grid_size(height, width)
    motion = sum(len(frames) * (height // size) * (width // size) for (_, size), frames in MOTION_GROUPS)
    return rows * columns + motion


@dataclass(frozen=True)
class DecoderCost:
    """A decoder's costs for a latent frame of one latent pixel.

    flops, traffic: operations and bytes. state: numbers that a session keeps, of a latent pixel.
    """

    flops: float = 0.0
    traffic: float = 0.0
    state: float = 0.0

    def work(self, config: NetworkConfig, height: int, width: int) -> Work:
        """Return the work of a block."""
        pixels = config.num_frames_per_block * height * width
        return Work(convolution=pixels * self.flops, traffic=pixels * self.traffic)

    def state_bytes(self, height: int, width: int) -> float:
        """Return the bytes of a session's state in bfloat16."""
        return self.state * height * width * BF16


# Wan's own decoder, and the published tiny ones.
WAN_BASE_DIM = 96
WAN = DecoderCost(flops=2.162e9, traffic=6.99e6, state=151_328)
TINY = DecoderCost(flops=87e6, traffic=0.6e6, state=5_376)


def wan_decoder(base_dim: int) -> DecoderCost:
    """Return the costs of a decoder of Wan's kind with other widths. base_dim: channels at full resolution."""
    ratio = base_dim / WAN_BASE_DIM
    return DecoderCost(WAN.flops * ratio**2, WAN.traffic * ratio, WAN.state * ratio)


def audio_work(num_layers: int, width: int) -> Work:
    """Return the work of a wav2vec2 encoder for a block, in float32: it encodes its whole window again."""
    return Work(float32=AUDIO_FLOPS * (num_layers / AUDIO_LAYERS) * (width / AUDIO_WIDTH) ** 2)


@dataclass(frozen=True)
class Placement:
    """The process of one device: its levels, and whether it has decoder and audio encoder."""

    levels: tuple[int, ...]
    has_decoder: bool = False


def placements(num_devices: int, num_levels: int) -> list[Placement]:
    """Return the process of each device of a pipeline; the last one has decoder and audio encoder.

    Levels are shared out in order, the fewest on the last device. ValueError if there are more devices than levels and
    decoder; they would be a second pipeline.
    """
    if not 1 <= num_devices <= num_levels + 1:
        raise ValueError(
            f"a pipeline of {num_levels} levels uses 1 to {num_levels + 1} devices, got {num_devices}; "
            "more devices are more pipelines"
        )
    shares = [num_levels // num_devices + (device < num_levels % num_devices) for device in range(num_devices)]
    starts = [sum(shares[:device]) for device in range(num_devices)]
    return [
        Placement(tuple(range(start, start + share)), device == num_devices - 1)
        for device, (start, share) in enumerate(zip(starts, shares, strict=True))
    ]


@dataclass(frozen=True)
class Sizing:
    """A checkpoint at one size of its videos.

    network_bytes: weights of the network, once a process. level_bytes, shared_bytes: a session's memory at a level, and
    once for all levels of a process. coder_bytes: weights of decoder and audio encoder. float8_level_bytes: a session's
    memory at a level with a float8 window (AVATAR_KV_DTYPE).
    """

    config: NetworkConfig
    height: int
    width: int
    network_bytes: float
    level_bytes: float
    shared_bytes: float
    decoder: DecoderCost = field(default_factory=DecoderCost)
    audio: Work = field(default_factory=Work)
    coder_bytes: float = 0.0
    float8_level_bytes: float = 0.0

    def with_float8_window(self) -> "Sizing":
        """Return the sizing of sessions with a float8 window."""
        return replace(self, level_bytes=self.float8_level_bytes)

    def session_bytes(self, placement: Placement) -> float:
        """Return a session's memory on a device."""
        state = self.decoder.state_bytes(self.height, self.width) if placement.has_decoder else 0.0
        shared = self.shared_bytes if placement.levels else 0.0
        return len(placement.levels) * self.level_bytes + shared + state

    def fixed_bytes(self, placement: Placement) -> float:
        """Return the memory that a device needs without any session."""
        network = self.network_bytes if placement.levels else 0.0
        return network + (self.coder_bytes if placement.has_decoder else 0.0) + RESERVE_BYTES

    def sessions_that_fit(self, placed: Sequence[Placement], memory_bytes: float) -> int:
        """Return the sessions that fit on every device, a tenth of whose memory stays free."""
        usable = (1 - SPARE) * memory_bytes
        return max(0, min(int((usable - self.fixed_bytes(each)) // self.session_bytes(each)) for each in placed))

    def busy_s(self, placement: Placement, gpu: Gpu, *, compiled: bool = False, float8: bool = False) -> float:
        """Return the time of a device that a block takes."""
        step = step_work(self.config, self.height, self.width, compiled=compiled)
        busy_s = len(placement.levels) * (step.seconds(gpu, float8=float8) + STEP_OVERHEAD_S)
        if placement.has_decoder:
            busy_s += self.decoder.work(self.config, self.height, self.width).seconds(gpu) + self.audio.seconds(gpu)
        return busy_s

    def frame_rate_hz(
        self, placed: Sequence[Placement], gpu: Gpu, *, compiled: bool = False, float8: bool = False
    ) -> float:
        """Return the frames a second of one session, which the busiest device bounds."""
        busiest_s = max(self.busy_s(each, gpu, compiled=compiled, float8=float8) for each in placed)
        return self.config.frames_per_block / busiest_s

    def live_sessions(self, placed: Sequence[Placement], gpu: Gpu) -> int:
        """Return the sessions that the devices keep up with; one that is alone gets all of their time."""
        rate_hz = self.frame_rate_hz(placed, gpu)
        return max(int(LIVE_SHARE * rate_hz / FRAME_RATE_HZ), int(rate_hz >= FRAME_RATE_HZ))


# Columns of frame rates: arguments of `Sizing.frame_rate_hz`.
SPEEDS = {"eager": {}, "compiled": {"compiled": True}, "float8": {"compiled": True, "float8": True}}


# Below the table of `deployment`.
LEGEND = (
    "",
    "a session, GB   its memory on the fullest device, in 10^9 bytes; in brackets with AVATAR_KV_DTYPE=float8_e4m3fn",
    "sessions fit    by memory, at a time; in brackets likewise",
    f"in time         live sessions that keep {FRAME_RATE_HZ} a second, eager, in {LIVE_SHARE} of a device's time;",
    "                one that is alone may have all of it",
    "eager, compiled, float8   frames a second of one session; float8 is of matrix products, and compiled too",
)


def deployment(sizings: Mapping[str, Sizing], num_devices: int, memory_bytes: float, gpu: Gpu = H100) -> Iterator[str]:
    """Yield the lines that say what fits on devices of so much memory, and the frame rates that the counts allow.

    sizings: of one checkpoint, by the name of the size. ValueError as in `placements`, or if memory is not positive.
    """
    if not 0 < memory_bytes < math.inf:
        raise ValueError(f"the memory of a device is a positive number of GB, got {memory_bytes / 1e9:g}")
    placed = placements(num_devices, next(iter(sizings.values())).config.num_levels)
    yield f"a pipeline on {num_devices} x {memory_bytes / 1e9:g} GB, a tenth of which stays free"
    for number, each in enumerate(placed):
        levels = [f"levels {', '.join(map(str, each.levels))}"] * bool(each.levels)
        yield f"device {number}  {', '.join([*levels, *['decoder, audio encoder'] * each.has_decoder])}"
    yield ""
    yield f"frames a second of a session: an estimate from counts for an {gpu.name}; it has not run on a GPU"
    yield f"{'video':10}" + "".join(f"{head:>14}" for head in ("a session, GB", "sessions fit", "in time", *SPEEDS))
    for name, sizing in sizings.items():
        both = sizing, sizing.with_float8_window()
        cells = (
            in_brackets(*(gigabytes(max(map(each.session_bytes, placed))) for each in both)),
            in_brackets(*(str(each.sessions_that_fit(placed, memory_bytes)) for each in both)),
            str(sizing.live_sessions(placed, gpu)),
            *(f"{sizing.frame_rate_hz(placed, gpu, **speed):.1f}" for speed in SPEEDS.values()),
        )
        yield f"{name:10}" + "".join(f"{cell:>14}" for cell in cells)
    yield from LEGEND


def gigabytes(num_bytes: float) -> str:
    """Format bytes as a number of GB, with a decimal place, or two digits if it is less than 1."""
    return f"{num_bytes / 1e9:.1f}" if num_bytes >= 1e9 else f"{num_bytes / 1e9:.2g}"


def in_brackets(value: str, float8: str) -> str:
    """Return a value, and in brackets the one with a float8 window."""
    return f"{value} ({float8})"
