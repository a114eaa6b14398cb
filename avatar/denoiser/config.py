"""The network's configuration: the fields of a checkpoint's config.json.

Names are those of the public class `WanModel_S2V`; a field missing from the file has the value of the public 14B
network. Our own fields follow after them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from avatar.checkpoints.fields import EPSILON, MAX_LAYERS, MAX_SIZE, Range, check_ranges, parse_fields
from avatar.checkpoints.files import CLASS_NAME
from avatar.denoiser.sampler import SAMPLERS, flow_match_schedule, select_levels
from avatar.types import BLOCK_LATENTS, FRAME_RATE_HZ, FRAMES_PER_LATENT, MAX_BLOCK_LATENTS
from avatar.vae.light import LightConfig

PATCH = 2  # latent rows and columns of one token

# Fields of public checkpoints that have no effect here.
IGNORED = {
    "_class_name",
    "_diffusers_version",
    "enable_tsm",
    "motion_token_num",
    "trainable_token_pos_emb",
    "zero_init",
}
# The window in blocks, in files of versions that had no `window_latents`.
WINDOW_BLOCKS = "window_blocks"
# Fields of public checkpoints with their only supported value; another value means another network.
FIXED = {
    "model_type": "s2v",
    "patch_size": [1, PATCH, PATCH],
    "window_size": [-1, -1],
    "local_attn_size": -1,
    "qk_norm": True,
    "cross_attn_norm": True,
    "enable_adain": True,
    "adain_mode": "attn_norm",
    "zero_timestep": True,
    "enable_motioner": False,
    "enable_framepack": True,
    "framepack_drop_mode": "padd",
    "add_last_motion": True,
    "slide_motion_frames": False,
}
# Latent frames of a window: 2.7 minutes.
MAX_WINDOW_LATENTS = 1 << 10
# Of an index or a distance in blocks or frames, which have 32 bits on the wire.
MAX_INDEX = (1 << 32) - 1
LEAST_SIGMA = 1e-6
# The public network's largest size is 13824.
RANGES: dict[str, Range] = {
    **dict.fromkeys(("in_dim", "out_dim", "cond_dim", "dim", "num_heads", "ffn_dim", "freq_dim"), (1, MAX_SIZE)),
    **dict.fromkeys(("text_dim", "text_len", "audio_dim", "num_audio_token"), (1, MAX_SIZE)),
    **dict.fromkeys(("num_layers", "num_encoder_layers"), (1, MAX_LAYERS)),
    **dict.fromkeys(("audio_inject_layers", "heard_inject_layers"), (0, MAX_LAYERS)),
    "eps": EPSILON,
    "num_frames_per_block": (1, MAX_BLOCK_LATENTS),
    "window_latents": (1, MAX_WINDOW_LATENTS),
    WINDOW_BLOCKS: (1, MAX_WINDOW_LATENTS),
    **dict.fromkeys(("schedule", "trained_schedule", "noise_scale"), (0.0, 1.0)),
    "trained_noise_scale": (LEAST_SIGMA, 1.0),
    "noise_correlation": (0.0, 1.0),
    "sink_distance": (0, MAX_INDEX),
    "sink_update_block": (1, MAX_INDEX),
    "residual_scale": (-1e6, 1e6),
}


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the network, and the constants of the rollout for which its weights were trained.

    in_dim, out_dim, cond_dim: channels of noisy latent, output and pose latent.
    text_len: text tokens that are always attended to; shorter text is padded with zeros.
    audio_dim, num_encoder_layers: width and number of the audio encoder's states, embedding output included.
    audio_inject_layers: ascending indexes of the layers after which audio is injected.
    heard_inject_layers: those after which audio of the other person is injected; none: the network does not listen.
    face_motion: the network takes values of face motion.
    mover: sizes of the codec between whose halves a mover moves the reference, which is the pose input and what the
        output adds to; None: the reference stays still.
    audio_context_frames: columns of features before a block that its audio tokens see. Tokens of 8 are those of the
        whole stream; without any, blocks are encoded independently.
    """

    in_dim: int = 16
    out_dim: int = 16
    cond_dim: int = 16
    dim: int = 5120
    num_heads: int = 40
    num_layers: int = 40
    ffn_dim: int = 13824
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    audio_dim: int = 1024
    num_audio_token: int = 4
    audio_inject_layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
    eps: float = 1e-6

    heard_inject_layers: tuple[int, ...] = ()
    face_motion: bool = False
    mover: LightConfig | None = None
    audio_context_frames: int = 0
    num_encoder_layers: int = 25
    num_frames_per_block: int = BLOCK_LATENTS
    # Latent frames that a block attends to, its own included: whole blocks.
    window_latents: int = 12
    # Descending sigmas, the last one 0: level i moves a block from schedule[i] to schedule[i + 1].
    schedule: tuple[float, ...] = flow_match_schedule(4, shift=3.0)
    # The schedule that the weights were trained for, if `schedule` leaves some of its levels out; None: `schedule`.
    trained_schedule: tuple[float, ...] | None = None
    sampler: str = "euler"
    # Standard deviation of a block's initial noise; below 1, blocks vary less around the most likely one.
    noise_scale: float = 1.0
    # The deviation with which the weights were distilled; a smaller `noise_scale` is a temperature of serving.
    trained_noise_scale: float = 1.0
    # Correlation of the initial noise of neighbouring latent frames, within blocks and between them; 0: independent.
    noise_correlation: float = 0.0
    # Latent frames from a block's first frame to the sink ahead of it: fixed, or drawn from low..high.
    sink_distance: int | tuple[int, int] = (4, 30)
    # The first block whose sink is block 0's result; None keeps the reference as the sink.
    sink_update_block: int | None = 4
    # The pose input: "zeros", or the "reference" latent repeated over the block's frames.
    pose: str = "zeros"
    # "velocity", or "x0_residual": the output F gives x0 = reference + residual_scale F.
    output: str = "velocity"
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(vars(self), RANGES)
        heads, block = 2 * self.num_heads, self.num_frames_per_block
        trained = self.trained_schedule or self.schedule
        rules = (
            ("dim", self.dim % 4 == 0 and self.dim % heads == 0, f"a multiple of 4 and of 2 num_heads, {heads}"),
            ("freq_dim", self.freq_dim % 2 == 0, "even"),
            *(
                (name, is_ascending((-1, *getattr(self, name), self.num_layers)), f"ascending, below {self.num_layers}")
                for name in ("audio_inject_layers", "heard_inject_layers")
            ),
            (
                "audio_context_frames",
                self.audio_context_frames in range(0, 65, FRAMES_PER_LATENT),
                f"a multiple of {FRAMES_PER_LATENT}, 0 to 64",
            ),
            ("window_latents", self.window_latents % block == 0, f"whole blocks of {block} latents"),
            *(
                (name, is_schedule(getattr(self, name)), "two or more sigmas that descend from at most 1 to 0")
                for name in ("schedule", *["trained_schedule"] * (self.trained_schedule is not None))
            ),
            ("schedule", {*self.schedule} <= {*trained}, "some of trained_schedule's sigmas"),
            ("sampler", self.sampler in SAMPLERS, f"one of {', '.join(sorted(SAMPLERS))}"),
            ("noise_correlation", self.noise_correlation < 1, "below 1"),
            ("sink_distance", is_sink_distance(self.sink_distance), "a number of frames or [low, high]"),
            ("pose", self.pose in ("zeros", "reference"), "zeros or reference"),
            (
                "cond_dim",
                self.pose == "zeros" or self.cond_dim == self.in_dim,
                f"in_dim, {self.in_dim}, unless pose is zeros",
            ),
            ("output", self.output in ("velocity", "x0_residual"), "velocity or x0_residual"),
            (
                "mover",
                self.mover is None
                or (self.face_motion, self.output, self.pose, self.mover.channels)
                == (True, "x0_residual", "reference", self.in_dim),
                f"null, or of {self.in_dim} channels beside face_motion true, output x0_residual and pose reference",
            ),
            ("out_dim", self.out_dim == self.in_dim, f"in_dim, {self.in_dim}"),
        )
        broken = [
            f"{name} must be {expected}, got {getattr(self, name)}" for name, holds, expected in rules if not holds
        ]
        if broken:
            raise ValueError("; ".join(broken))

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.dim // self.num_heads

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs of blocks, beside features and latent, that the network takes."""
        return ("heard",) * bool(self.heard_inject_layers) + ("face_motion",) * self.face_motion

    @property
    def num_levels(self) -> int:
        """Denoising steps of a block."""
        return len(self.schedule) - 1

    @property
    def num_trained_levels(self) -> int:
        """Denoising steps that the weights were trained for."""
        return len(self.trained_schedule or self.schedule) - 1

    @property
    def levels_text(self) -> str:
        """The levels in words, such as `2 of the 4 trained: sigma 1, 0.5`."""
        chosen, trained = self.num_levels, self.num_trained_levels
        count = str(chosen) if chosen == trained else f"{chosen} of the {trained} trained"
        return f"{count}: sigma {', '.join(f'{sigma:g}' for sigma in self.schedule)}"

    def with_levels(self, choice: int | Sequence[float] | None) -> "NetworkConfig":
        """Return the configuration with fewer levels; choice: as in `select_levels`, or None for all."""
        if choice is None:
            return self
        trained = self.trained_schedule or self.schedule
        schedule = select_levels(trained, choice)
        return replace(self, schedule=schedule, trained_schedule=trained if schedule != trained else None)

    @property
    def frames_per_block(self) -> int:
        """Pixel frames, and columns of audio features, of one block."""
        return FRAMES_PER_LATENT * self.num_frames_per_block

    @property
    def window_blocks(self) -> int:
        """Blocks that a block attends to, itself included."""
        return self.window_latents // self.num_frames_per_block

    @property
    def block_s(self) -> float:
        """Duration of a block, in seconds."""
        return self.frames_per_block / FRAME_RATE_HZ

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NetworkConfig":
        """Return the configuration in a config.json. ValueError names fields of another network."""
        for name, value in FIXED.items():
            if values.get(name, value) != value:
                raise ValueError(f"{name} is {values[name]!r}; only {value!r} is supported")
        ours = {name: to_tuple(value) for name, value in values.items() if name not in IGNORED | FIXED.keys()}
        if WINDOW_BLOCKS in ours:
            check_ranges(ours, {name: RANGES[name] for name in (WINDOW_BLOCKS, "num_frames_per_block")})
            ours["window_latents"] = ours.pop(WINDOW_BLOCKS) * ours.get("num_frames_per_block", BLOCK_LATENTS)
        if ours.get("mover"):
            ours["mover"] = parse_fields(LightConfig, ours["mover"], "mover.")
        return parse_fields(cls, ours)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for config.json, as `from_dict` reads them."""
        fields = asdict(self)
        for name in ("trained_schedule", "mover"):
            if fields[name] is None:
                del fields[name]
        return {"_class_name": CLASS_NAME, **fields}


def is_sink_distance(value: int | tuple[int, ...]) -> bool:
    """Return True for a number of frames from 0 to MAX_INDEX, or a pair low <= high of them."""
    low, high = (value, value) if isinstance(value, int) else value if len(value) == 2 else (1, 0)
    return 0 <= low <= high <= MAX_INDEX


def is_schedule(sigmas: tuple[float, ...]) -> bool:
    """Return True for sigmas that descend to 0, from at most 1."""
    has_ends = len(sigmas) > 1 and sigmas[-1] == 0 and LEAST_SIGMA <= sigmas[-2] <= sigmas[0] <= 1
    return has_ends and is_ascending(sigmas[::-1])


def is_ascending(values: tuple[float, ...]) -> bool:
    """Return True if the values increase strictly."""
    return all(low < high for low, high in pairwise(values))


def to_tuple(value: Any) -> Any:
    """Convert a JSON list to a tuple; return other values unchanged."""
    return tuple(value) if isinstance(value, list) else value


def tiny() -> NetworkConfig:
    """A small network of blocks of 3 latents and four levels, for Whisper tiny.en's four layers and embedding output.

    The sink stands two frames ahead of a block's last one and stays the reference: the network is trained on such
    portraits, and an update would lose sharpness.
    """
    return NetworkConfig(
        dim=256,
        num_heads=4,
        num_layers=8,
        ffn_dim=768,
        text_dim=8,
        text_len=1,
        audio_dim=384,
        audio_inject_layers=(0, 2, 4, 6),
        num_encoder_layers=5,
        schedule=(1.0, 0.9, 0.75, 0.5, 0.0),
        noise_scale=0.5,
        sink_distance=4,
        sink_update_block=None,
        pose="reference",
        output="x0_residual",
    )


def tiny_256() -> NetworkConfig:
    """The embedded default: latents of 48 channels, blocks of 1, two levels, a listener, face motion, and a mover."""
    return replace(
        tiny(),
        in_dim=48,
        out_dim=48,
        cond_dim=48,
        heard_inject_layers=(1, 3, 5, 7),
        face_motion=True,
        mover=LightConfig(wide=128, mid=64, thin=24, latent_scale=2.0, scale=2, channels=48, encoder_depth=3),
        num_frames_per_block=1,
        window_latents=8,
        audio_context_frames=8,
        schedule=(1.0, 0.4, 0.0),
        noise_scale=1.0,
    )


def base() -> NetworkConfig:
    """The public 14B network with its causal LoRA adapter: four levels, a sink that rolls 4 to 30 frames ahead."""
    return NetworkConfig()
