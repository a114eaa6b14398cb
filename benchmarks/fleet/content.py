"""Sizes and timing of the messages of one block that stand-ins send, and what every worker says of itself."""

from dataclasses import asdict, dataclass
from typing import Any

from avatar.worker.v1 import audio_pb2, denoiser_pb2, vae_pb2

NUM_LEVELS = 4
# Pixel frames of a latent frame, which leave the decoder together.
LATENT_FRAMES = 4
STAGES = ("audio", *(f"denoiser-{level}" for level in range(NUM_LEVELS)), "vae")
RATE_HZ, FRAME_RATE_HZ = 16000, 25
# The decoder consumes a session's first three frames to start.
FIRST_FRAME = 3
DIGEST = "stand-in"
CAPACITY = 1000


@dataclass(frozen=True)
class Sizes:
    """Sizes of one block's messages in bytes, and its pixel frames."""

    features_bytes: int
    latent_bytes: int
    frame_bytes: int
    block_frames: int = 12

    @property
    def block_s(self) -> float:
        """Duration of a block, in seconds."""
        return self.block_frames / FRAME_RATE_HZ

    @property
    def block_bytes(self) -> int:
        """Size of a block's audio: PCM16, one channel."""
        return RATE_HZ * self.block_frames // FRAME_RATE_HZ * 2

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


# A small network at 128x128, and the public 14B network at 720x400; frames are JPEG.
SIZES = {"tiny": Sizes(27_648, 12_288, 3_100), "14B": Sizes(614_400, 432_000, 45_000)}


def info_of(stage: str, sizes: Sizes, active: int) -> Any:
    """Return the answer of a stage's worker to GetInfo."""
    common: dict[str, Any] = {"digest": DIGEST, "capacity": CAPACITY, "active": active}
    if stage == "audio":
        return audio_pb2.AudioServiceGetInfoResponse(encoder=DIGEST, block_frames=sizes.block_frames, **common)
    if stage == "vae":
        return vae_pb2.VaeServiceGetInfoResponse(
            width=64,
            height=64,
            fit="cover",
            frame_rate_hz=FRAME_RATE_HZ,
            block_frames=sizes.block_frames,
            encodings=["jpeg"],
            **common,
        )
    level = int(stage.rpartition("-")[2])
    return denoiser_pb2.DenoiserServiceGetInfoResponse(levels=[level], num_levels=NUM_LEVELS, **common)
