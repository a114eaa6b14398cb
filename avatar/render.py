"""One clip in one process, without any transport: the same models as the services run, called in a row.

    sounds --audio--> blocks --denoisers--> blocks --vae--> chunks

By default the frames are the services', byte for byte. What else can be asked of a clip is in `Options`, and means what
it means in the reference implementation of arXiv 2512.04677 (docs/reference_options.md).

Axes: a actors, c latent channels, t latent frames, h w height and width, s samples, n text tokens, d width.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from avatar.audio import model as audio_model
from avatar.audio.alignment import BLOCK_SAMPLES, SAMPLE_RATE_HZ
from avatar.audio.model import AudioModel
from avatar.audio.whole_file import file_blocks
from avatar.checkpoints.layouts import open_part
from avatar.checkpoints.lora import LoraAdapter
from avatar.denoiser import model as denoiser_model
from avatar.denoiser.config import PATCH, NetworkConfig
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import Network
from avatar.denoiser.sampler import NoiseSource, clip_noise, noise
from avatar.text import model as text_model
from avatar.types import AudioPiece, Block, Conditions, FrameChunk, Session
from avatar.vae import vae as vae_model
from avatar.vae import whole_clip
from avatar.vae.picture import Fit, Size, read_mask
from avatar.vae.pose import pose_latents
from avatar.vae.vae import HIDDEN_FRAMES, Vae, to_bytes

logger = logging.getLogger(__name__)

# Sound is encoded a second at a time, so that a long file's features are never all in memory.
PIECE_S = 1


@dataclass(frozen=True)
class Models:
    """The models of a checkpoint."""

    audio: AudioModel
    network: Network
    config: NetworkConfig
    vae: Vae[Any]


def load(
    checkpoint: Path,
    adapter: LoraAdapter | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Models:
    """The models of a checkpoint folder. ValueError if one of them is not what it should be."""
    network, config = denoiser_model.load(open_part(checkpoint, "denoiser", adapter), dtype=dtype, device=device)
    audio = audio_model.load(open_part(checkpoint, "audio"), dtype=dtype, device=device)
    return Models(audio, network, config, vae_model.load(open_part(checkpoint, "vae"), dtype=dtype, device=device))


def embed(checkpoint: Path, prompt: str) -> Tensor:
    """The embedding (n, d) of a prompt, by an encoder that is let go again. ValueError if the checkpoint has none."""
    return text_model.load(open_part(checkpoint, "text")).embed(prompt)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be asked of a clip. What is None is the checkpoint's choice.

    seed: of all randomness, 0 to 2^63 - 1.
    size: of the video, (width, height), or the area in pixels that it has at most.
    fit: how the picture is brought to this size.
    text: (n, d) embedding of the prompt.
    masks: a picture's file for each actor, white where the portrait shows it.
    pose: frames (h, w, 3) RGB of a pose video, at the video's rate.
    num_blocks: the most blocks that are drawn; None: to the end of the sound.
    clip_frames: pixel frames of the reference's clip: whole blocks, two at least. The window holds a clip, the sink is
        replaced behind the first one, and pose videos, files' features and the reference's noise come in clips.
    sink_update_block, sink_distance, audio_right_frames: as in `Session`.
    schedule: "pipeline", as the services draw; or "offline", as the reference does on one GPU without online decoding:
        the picture stays the sink, and clips are decoded one by one.
    audio: features of "live" sound, as it comes; or of the "whole" file, as the public weights were trained on.
    noise: drawn for each "block"; or for each "clip", as the reference draws it.
    """

    seed: int = 420
    size: Size | int | None = None
    fit: Fit | None = None
    text: Tensor | None = None
    masks: Sequence[bytes] | None = None
    pose: Iterator[NDArray[np.uint8]] | None = None
    num_blocks: int | None = None
    clip_frames: int | None = None
    sink_update_block: int | None = None
    sink_distance: int | tuple[int, int] | None = None
    audio_right_frames: int | None = None
    schedule: Literal["pipeline", "offline"] = "pipeline"
    audio: Literal["live", "whole"] = "live"
    noise: Literal["block", "clip"] = "block"


def render(
    models: Models, sounds: Sequence[Tensor], rate_hz: int, picture: bytes, options: Options | None = None
) -> Iterator[FrameChunk]:
    """The frames of a clip: a chunk for each block, or for each clip of the reference's where it is drawn offline.

    sounds: each actor's, (1 or 2, s) float32 in [-1, 1]. picture: a PNG, JPEG or WebP file.
    ValueError if something cannot be used, or does not go with the rest.
    """
    options = options or Options()
    config, vae = in_clips(models.config, options.clip_frames), models.vae
    rgb = vae.read_picture(picture, options.size, options.fit)
    session, sink = open_session(vae, rgb, picture, options)
    text = torch.zeros(0, 0) if options.text is None else options.text
    blocks = heard(models.audio, sounds, rate_hz, session, config, options)
    if options.pose is not None:
        blocks = posed(blocks, vae, rgb, config, options)
    draw = clip_noise(config.window_blocks) if options.noise == "clip" else noise
    asked = islice(blocks, options.num_blocks)
    drawn = map(DenoisingLoop(models.network, config, session, Conditions(0, sink, text), draw).step, asked)
    if options.schedule == "offline":
        yield from decoded_in_clips(vae, rgb, drawn, config.window_blocks)
    else:
        decoding = vae.open(session)
        for block in drawn:
            yield vae.step(block, decoding)


def in_clips(config: NetworkConfig, frames: int | None) -> NetworkConfig:
    """The configuration with another window, and another block at which the sink is replaced if it ever is."""
    if frames is None:
        return config
    clip_blocks, rest = divmod(frames, config.frames_per_block)
    if rest or clip_blocks < 2:
        # In the reference, frames beyond the last block are lost and its ring comes to stand askew.
        least = 2 * config.frames_per_block
        raise ValueError(f"clip_frames must be a multiple of {config.frames_per_block}, at least {least}: {frames}")
    update = None if config.sink_update_block is None else clip_blocks
    return replace(config, window_blocks=clip_blocks, sink_update_block=update)


def clip_frames(config: NetworkConfig) -> int:
    """Pixel frames of the reference's clip, which its window holds."""
    return config.window_blocks * config.frames_per_block


def open_session(vae: Vae[Any], rgb: Tensor, picture: bytes, options: Options) -> tuple[Session, Tensor]:
    """The session of a picture (h, w, 3) uint8, and its first sink (c, 1, h, w)."""
    update = options.sink_update_block
    if options.schedule == "offline":
        (motion, sink), update = whole_clip.encode_picture(vae, rgb), 0
    else:
        motion = vae.encode_picture(rgb)
        sink = motion[:, :1]
    if notice := vae.notice(rgb, motion):
        logger.warning("notice: %s", notice)
    masks, fit = None, options.fit or vae.config.picture.fit
    if options.masks is not None:
        cell = vae.codec.space_stride * PATCH
        masks = torch.stack([read_mask(mask, picture, size_of(rgb), fit, cell) for mask in options.masks])
    return Session("clip", options.seed, motion, masks, update, options.sink_distance, options.audio_right_frames), sink


def size_of(rgb: Tensor) -> Size:
    return rgb.shape[1], rgb.shape[0]


def heard(
    audio: AudioModel, sounds: Sequence[Tensor], rate_hz: int, session: Session, config: NetworkConfig, options: Options
) -> Iterator[Block]:
    """Blocks of features to the end of the longest sound."""
    actors = 1 if session.masks is None else len(session.masks)
    if len(sounds) != actors:
        raise ValueError(f"{len(sounds)} sounds and {len(options.masks or ())} masks: several actors need a mask each")
    num_samples = max(sound.shape[1] for sound in sounds)
    # Who has finished is silent.
    padded = [functional.pad(sound, (0, num_samples - sound.shape[1])) for sound in sounds]
    if options.audio == "live":
        streams = [listen(audio, sound, rate_hz, session) for sound in padded]
    else:
        streams = [file_blocks(audio.encoder, sound, rate_hz, clip_frames(config)) for sound in padded]
    # A file's features fill whole clips; the film ends with the block that the sound ends in.
    num_blocks = -(-num_samples * SAMPLE_RATE_HZ // (rate_hz * BLOCK_SAMPLES))
    for blocks in islice(zip(*streams, strict=True), num_blocks):
        features = [block.features for block in blocks]
        yield blocks[0] if session.masks is None else replace(blocks[0], features=torch.stack(features))


def listen(audio: AudioModel, samples: Tensor, rate_hz: int, session: Session) -> Iterator[Block]:
    """A sound's blocks as a stream hears them."""
    hearing = audio.open(session)
    for piece in pieces(samples, rate_hz):
        yield from audio.step(piece, hearing)


def pieces(samples: Tensor, rate_hz: int) -> Iterator[AudioPiece]:
    """Sound (channels, s) in pieces, the last one marked."""
    for start in range(0, samples.shape[1], rate_hz * PIECE_S):
        yield AudioPiece(samples[:, start : start + rate_hz * PIECE_S], rate_hz)
    yield AudioPiece(samples[:, :0], rate_hz, is_last=True)


def posed(
    blocks: Iterator[Block], vae: Vae[Any], rgb: Tensor, config: NetworkConfig, options: Options
) -> Iterator[Block]:
    """The blocks with the latents of the pose video."""
    assert options.pose is not None
    fit = options.fit or vae.config.picture.fit
    clips = pose_latents(vae.codec, options.pose, size_of(rgb), fit, clip_frames(config))
    poses = (pose for clip in clips for pose in torch.split(clip, config.num_frames_per_block, dim=1))
    for block, pose in zip(blocks, poses, strict=False):
        yield replace(block, pose=pose)


class DenoisingLoop:
    """A session's blocks through every level in a row; the sink is replaced where session or checkpoint ask for it."""

    def __init__(
        self,
        network: Network,
        config: NetworkConfig,
        session: Session,
        conditions: Conditions,
        draw: NoiseSource = noise,
    ) -> None:
        """conditions: of block 0."""
        self.session, self.conditions = session, conditions
        self.levels = [Denoiser(network, config, level, draw) for level in range(config.num_levels)]
        self.histories = [level.open(session) for level in self.levels]
        self._updated = conditions

    def step(self, block: Block) -> Block:
        """The block with its clean latent; blocks come in order."""
        last = self.levels[-1]
        if block.index == last.sink_update_block(self.session):
            self.conditions = self._updated
        block = replace(block, conditions=self.conditions)
        for level, history in zip(self.levels, self.histories, strict=True):
            block = level.step(block, history)
        if last.updates_sink(block, self.session):
            assert block.latent is not None
            self._updated = self.conditions.with_sink(block.latent)
        return block


def decoded_in_clips(vae: Vae[Any], rgb: Tensor, blocks: Iterator[Block], clip_blocks: int) -> Iterator[FrameChunk]:
    """A chunk for each clip; it carries the index of the clip's first block. The last clip may be shorter."""

    def clips() -> Iterator[Tensor]:
        while clip := [block.latent for block in islice(blocks, clip_blocks) if block.latent is not None]:
            yield torch.cat(clip, dim=1)

    first_frame = HIDDEN_FRAMES
    for clip, frames in enumerate(whole_clip.decode_clips(vae, rgb, clips())):
        yield FrameChunk(clip * clip_blocks, first_frame, to_bytes(frames))
        first_frame += frames.shape[1]
