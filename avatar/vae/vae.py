"""The VAE stage: a session's picture to motion latents, and clean latents to frames.

    picture --read_picture--> rgb --encode_picture--> motion latents
    Block (latent) --latent_frames--> LatentFrame --step--> FrameChunk

A step decodes one latent frame, so its frames leave before the next one is decoded. `open` warms the decoder up on
motion latents, so that the first block continues a still picture instead of starting from an empty state. One decoder
state runs from the first block to the last.

Axes: c channels, t latent frames, f pixel frames, h w height and width of latents, H W of frames.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from avatar.checkpoints.fields import check_ranges, parse_fields
from avatar.checkpoints.part import Part, load_weights
from avatar.types import BLOCK_LATENTS, FRAMES_PER_LATENT, MOTION_LATENTS, Block, FrameChunk, LatentFrame, Session
from avatar.vae import light
from avatar.vae.codec import Codec, State
from avatar.vae.out_of_distribution import OutOfDistributionCheck, picture_descriptor
from avatar.vae.picture.reading import Picture, read_picture, to_pixels
from avatar.vae.picture.rule import Fit, PictureRule, Size, sizes_text

# Pixel frames of the still clip from which motion latents are encoded.
MOTION_FRAMES = 1 + (MOTION_LATENTS - 1) * FRAMES_PER_LATENT
# Motion latents that warm the decoder up, and frames of the first block that are dropped.
# Source: the reference implementation of arXiv 2512.04677.
WARMUP_LATENTS = 7
HIDDEN_FRAMES = FRAMES_PER_LATENT - 1
WARM_BLOCKS = 2


@dataclass(frozen=True)
class VaeConfig:
    """Configuration of a VAE, as in a checkpoint's config.json.

    codec: `light` or `wan`.
    network: the codec's own fields.
    familiar: the out-of-distribution check for pictures; None for a checkpoint without one.
    """

    codec: str
    picture: PictureRule
    frame_rate_hz: int
    network: Mapping[str, Any]
    familiar: OutOfDistributionCheck | None = None

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {self.codec!r}")
        check_ranges(vars(self), {"frame_rate_hz": (1, 1000)})


def tiny() -> VaeConfig:
    """The smallest configuration: the light codec at 128x128."""
    return VaeConfig("light", PictureRule("face", width=128, height=128), 25, asdict(light.tiny()))


@dataclass(eq=False)
class VaeState(Generic[State]):
    """The state of one session's decoder.

    decoder: the codec's state.
    latent_shape: (c, 1, h, w) of every latent frame.
    next_index: index of the next latent frame; None before the first, which may have any index.
    """

    decoder: State
    latent_shape: tuple[int, ...]
    next_index: int | None = None


class Vae(Generic[State]):
    """A streaming model (`avatar.runtime.pipeline.StreamingModel`) of latent frames to frames; also encodes pictures.

    block_latents, block_frames: latent and pixel frames of a block.
    history_blocks: past blocks that rebuild a stream's state exactly: open the session again and step through them.
    """

    def __init__(self, codec: Codec[State], config: VaeConfig, block_latents: int = BLOCK_LATENTS) -> None:
        self.codec = codec
        self.config = config
        self.block_latents, self.block_frames = block_latents, FRAMES_PER_LATENT * block_latents
        self.history_blocks = -(-codec.history // block_latents)

    def limit_sizes(self, sizes: Iterable[Size]) -> None:
        """Make videos of these sizes only; without any of the checkpoint's own. ValueError as in `PictureRule.limited`,
        or if the codec's stride does not divide one.
        """
        rule = self.config.picture.limited(tuple(sizes))
        stride = self.codec.space_stride
        if odd := [size for size in rule.all_sizes if size[0] % stride or size[1] % stride]:
            raise ValueError(f"sizes must be multiples of {stride}, got {sizes_text(odd)}")
        self.config = replace(self.config, picture=rule)

    def read_picture(self, data: bytes, size: Size | int | None = None, fit: Fit | None = None) -> Picture:
        """`picture.reading.read_picture` under this checkpoint's rule."""
        return read_picture(data, self.config.picture, size, fit)

    def encode_picture(self, rgb: Tensor) -> Tensor:
        """Encode a picture to motion latents (c, 19, h, w) float32: of a still clip. Latent 0 is the reference latent.

        rgb: (H, W, 3) uint8. ValueError if it has another shape, or the codec's stride does not divide its sides.
        """
        with torch.inference_mode():
            latents = self.codec.encode(self.still_clip(rgb, MOTION_FRAMES))
        return latents[0].float().cpu()

    def notice(self, picture: Picture, motion: Tensor) -> str:
        """Return what is wrong with a picture and what to do about it; empty if nothing is.

        The notice is about its faces, and about a picture that is unlike the checkpoint's training pictures, if the
        checkpoint has a check for that. motion: the picture's motion latents (c, t, h, w).
        """
        check, notices = self.config.familiar, [picture.notice]
        if check and check.distance(picture_descriptor(self.codec, picture.rgb, motion)) > check.limit:
            notices.append(check.notice)
        return " ".join(filter(None, notices))

    def still_clip(self, rgb: Tensor, num_frames: int) -> Tensor:
        """Repeat a picture (H, W, 3) uint8 to a clip (1, 3, f, H, W) in [-1, 1]. ValueError as in `encode_picture`."""
        stride = self.codec.space_stride
        if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != torch.uint8:
            raise ValueError(f"picture must be (h, w, 3) uint8, got {tuple(rgb.shape)} {rgb.dtype}")
        if rgb.shape[0] % stride or rgb.shape[1] % stride:
            raise ValueError(f"picture's sides must be multiples of {stride}, got {rgb.shape[1]}x{rgb.shape[0]}")
        return repeat(to_pixels(rgb), "c h w -> 1 c f h w", f=num_frames)

    def open(self, session: Session) -> VaeState[State]:
        """Return a decoder state warmed up on the still picture. ValueError if motion latents do not fit the codec."""
        shape = tuple(session.motion.shape)
        if len(shape) != 4 or shape[:2] != (self.codec.channels, MOTION_LATENTS):
            raise ValueError(
                f"motion latents must have the shape ({self.codec.channels}, {MOTION_LATENTS}, h, w), got {shape}"
            )
        state = VaeState(self.codec.new_state(), (shape[0], 1, *shape[2:]))
        with torch.inference_mode():
            for latent in torch.split(session.motion[None, :, :WARMUP_LATENTS], 1, dim=2):
                self.codec.decode(latent, state.decoder)
        return state

    def pixel_bytes(self) -> int:
        """Return the memory of a session's state for each pixel of its latents, with whose number all of it grows."""
        state = self.open(Session("memory", 0, torch.zeros(self.codec.channels, MOTION_LATENTS, 1, 1)))
        return self.codec.state_bytes(state.decoder)

    def warm_encoder(self, width: int, height: int) -> None:
        """Encode a blank picture of this size for as long as a codec's shapes still change."""
        with torch.inference_mode():
            self.codec.encode(self.still_clip(torch.zeros(height, width, 3, dtype=torch.uint8), 1 + FRAMES_PER_LATENT))

    def warm(self, width: int, height: int) -> int:
        """Decode WARM_BLOCKS blocks of zeros for a video of this size, and return that number."""
        stride = self.codec.space_stride
        motion = torch.zeros(self.codec.channels, MOTION_LATENTS, height // stride, width // stride)
        state = self.open(Session("warm", 0, motion))
        for index in range(WARM_BLOCKS):
            for _ in self.decode(Block(index, torch.zeros(0), motion[:, : self.block_latents]), state):
                pass
        return WARM_BLOCKS

    def latent_frames(self, block: Block) -> Iterator[LatentFrame]:
        """Yield the latent frames of a clean block in order. ValueError if its latent is missing or has another shape.

        The first one has the block's deadline. A later one is due a latent frame's duration before its pixel frames
        are, because a step of another stream, which is not interrupted, may delay it.
        """
        shape = None if block.latent is None else tuple(block.latent.shape)
        if block.latent is None or block.latent.ndim != 4 or block.latent.shape[1] != self.block_latents:
            expected = f"({self.codec.channels}, {self.block_latents}, h, w)"
            raise ValueError(f"block {block.index} must have a latent of shape {expected}, got {shape or 'none'}")
        first, latent_s = block.index * self.block_latents, FRAMES_PER_LATENT / self.config.frame_rate_hz
        for number, latent in enumerate(torch.split(block.latent, 1, dim=1)):
            due_s = None if block.due_s is None else block.due_s + max(0, number - 1) * latent_s
            is_last = number == self.block_latents - 1
            yield LatentFrame(first + number, latent, block.index, is_last, block.traceparent, due_s)

    def decode(self, block: Block, state: VaeState[State]) -> Iterator[FrameChunk]:
        """Yield the chunks of a block, each decoded when it is asked for. ValueError as in its two parts."""
        for latent in self.latent_frames(block):
            yield self.step(latent, state)

    def step(self, latent: LatentFrame, state: VaeState[State]) -> FrameChunk:
        """Decode a latent frame to a chunk of frames (f, H, W, 3) uint8. ValueError as in `frames`."""
        rgb = to_bytes(self.frames(latent, state))
        first_frame = max(latent.index * FRAMES_PER_LATENT, HIDDEN_FRAMES)
        return FrameChunk(latent.block, latent.is_last, first_frame, rgb, latent.traceparent)

    def frames(self, latent: LatentFrame, state: VaeState[State]) -> Tensor:
        """Decode a latent frame to frames (3, f, H, W) float32 in [-1, 1]; f = 1 for index 0, 4 for every other.

        ValueError if it is not the next one, or of another shape than the session's.
        """
        of_block = f"latent frame {latent.index}, of block {latent.block},"
        if state.next_index not in (None, latent.index):
            raise ValueError(f"{of_block} is out of order, expected latent frame {state.next_index}")
        if tuple(latent.latent.shape) != state.latent_shape:
            got = tuple(latent.latent.shape)
            raise ValueError(f"{of_block} must have the shape {state.latent_shape}, got {got}")
        with torch.inference_mode():
            frames = self.codec.decode(latent.latent[None], state.decoder)[0].float().clamp(-1, 1)
        state.next_index = latent.index + 1
        return frames[:, HIDDEN_FRAMES if latent.index == 0 else 0 :]


def to_bytes(frames: Tensor) -> Tensor:
    """Convert frames (3, f, H, W) in [-1, 1] to (f, H, W, 3) uint8 on the CPU, truncated as in the reference.

    They leave a GPU once, as bytes in their final order, into pinned memory.
    """
    rgb = rearrange((255 * (frames + 1) / 2).to(torch.uint8), "c f h w -> f h w c").contiguous()
    if rgb.device.type == "cpu":
        return rgb
    return torch.empty(rgb.shape, dtype=rgb.dtype, pin_memory=rgb.is_cuda).copy_(rgb)


def load(part: Part, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Vae[Any]:
    """Return the VAE of a checkpoint's part. ValueError if its config or weights are invalid."""
    with part.naming_config():
        config = parse_config(part.config)
    if part.decoder is not None:
        codec = _with_decoder(part, part.decoder, config, torch.device(device), dtype)
        # The errors of its reconstructions are not those that the check was measured with.
        return Vae(codec, replace(config, familiar=None), part.block_latents)
    make = CODECS[config.codec]
    with part.naming_config():
        codec, network = make(config.network, torch.device("meta"), dtype)
        check_fits(config, codec)
    load_weights(network, part)  # compares shapes, before they take memory
    codec, network = make(config.network, torch.device(device), dtype)
    load_weights(network, part)
    return Vae(codec, config, part.block_latents)


def parse_config(fields: Mapping[str, Any]) -> VaeConfig:
    """Return the configuration in a config.json. TypeError or ValueError if fields are missing or invalid."""
    check = fields.get("familiar")
    nested = {
        "picture": parse_fields(PictureRule, fields.get("picture", {}), "picture."),
        "familiar": check and parse_fields(OutOfDistributionCheck, check, "familiar."),
    }
    return parse_fields(VaeConfig, {**fields, **nested})


def check_fits(config: VaeConfig, codec: Codec[Any]) -> None:
    """Raise ValueError if a configuration's sizes of videos, or its check of pictures, do not fit its codec."""
    stride = codec.space_stride
    if odd := [size for size in config.picture.all_sizes if size[0] % stride or size[1] % stride]:
        raise ValueError(f"picture's sizes must be multiples of {stride}, got {sizes_text(odd)}")
    if config.familiar:
        config.familiar.check_fits(codec.channels)


def _light(fields: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> tuple[Codec[Any], nn.Module]:
    config = parse_fields(light.LightConfig, fields, "network.")
    with device:
        codec = light.LightCodec(config).to(dtype).requires_grad_(False)
    return codec, codec


def _wan(fields: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> tuple[Codec[Any], nn.Module]:
    from avatar.vae.wan import WanCodec, WanConfig

    codec = WanCodec(parse_fields(WanConfig, fields, "network."), device, dtype)
    return codec, codec.network


def _with_decoder(
    part: Part, decoder_part: Part, config: VaeConfig, device: torch.device, dtype: torch.dtype
) -> Codec[Any]:
    """Return the Wan codec of a part, decoding with the tiny decoder of another one."""
    from avatar.vae.tiny_decoder import TinyDecoder, TinyDecoderCodec, TinyDecoderConfig
    from avatar.vae.wan import WanCodec, WanConfig

    if config.codec != "wan":
        raise ValueError(
            f"{decoder_part.folder} decodes latents of Wan's VAE, {part.folder} has those of {config.codec}"
        )
    encoder_part = replace(part, rename=lambda name: _encoders_only(part.rename, name))
    with part.naming_config():
        network = parse_fields(WanConfig, config.network, "network.")
        check_fits(config, shapes := WanCodec(network, "meta", dtype, encodes_only=True))
    load_weights(shapes.network, encoder_part)  # compares shapes, before they take memory
    wan = WanCodec(network, device, dtype, encodes_only=True)
    with torch.device("meta"):
        decoder = TinyDecoder()
    decoder = decoder.to(dtype).to_empty(device=device).requires_grad_(False)
    codec = TinyDecoderCodec(wan, decoder, decoder_part.parse(TinyDecoderConfig))
    load_weights(wan.network, encoder_part)
    load_weights(decoder, decoder_part)
    return codec


def _encoders_only(rename: Callable[[str], str | None] | None, name: str) -> str | None:
    """Return the module's name of a stored tensor of Wan's VAE; None for a tensor of its decoder."""
    renamed = rename(name) if rename else name
    return None if renamed is None or renamed.startswith(("decoder.", "post_quant_conv.")) else renamed


# (network fields of the config, device, dtype) -> codec, and the module that the checkpoint's weights fill.
CODECS: dict[str, Callable[[Mapping[str, Any], torch.device, torch.dtype], tuple[Codec[Any], nn.Module]]] = {
    "light": _light,
    "wan": _wan,
}
