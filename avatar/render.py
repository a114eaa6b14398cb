"""Rendering of a clip in one process, without transport: the services' models, called one after the other.

    speech --audio--> Block (features) --denoiser 0..N-1--> Block (latent) --vae--> FrameChunk of each latent frame

`load` and `render_film` make a film in two lines; `render` yields its frames.

By default the frames equal the services', byte for byte. `RenderOptions` has further options, which mean the same as in
the reference implementation of arXiv 2512.04677 (docs/reference_options.md).

Axes: a actors, c latent channels, t latent frames, h w height and width, s samples, n text tokens, d width.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
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
from avatar.audio.model import AudioModel
from avatar.audio.resample import check_piece
from avatar.audio.whole_file import file_blocks
from avatar.checkpoints.layouts import open_part
from avatar.checkpoints.lora import LoraAdapter
from avatar.denoiser import model as denoiser_model
from avatar.denoiser.cache import Prefills
from avatar.denoiser.config import PATCH, NetworkConfig
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import Network
from avatar.denoiser.sampler import NoiseSource, clip_noise, noise
from avatar.media import Film, read_audio, write_mp4
from avatar.types import AudioPiece, Block, Conditions, FrameChunk, Session
from avatar.vae import vae as vae_model
from avatar.vae import whole_clip
from avatar.vae.picture.reading import Picture, read_mask
from avatar.vae.picture.rule import Fit, Size
from avatar.vae.pose import pose_latents
from avatar.vae.vae import HIDDEN_FRAMES, Vae, to_bytes

logger = logging.getLogger(__name__)

# Audio is encoded one second at a time, so that a long file's features are never all in memory.
PIECE_S = 1


@dataclass(frozen=True)
class Models:
    """The models of a checkpoint that render a clip."""

    audio: AudioModel
    network: Network
    config: NetworkConfig
    vae: Vae[Any]


def load(
    checkpoint: Path | str,
    adapter: LoraAdapter | None = None,
    *,
    levels: int | None = None,
    decoder: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    threads: int = 1,
) -> Models:
    """Load the models of a checkpoint folder. ValueError if a config or weights do not fit, or there are fewer levels.

    levels: how many to run of those that the checkpoint was trained for; None: all. decoder: as in `open_part`.
    threads: CPU threads of torch from now on. Several wait for each other at every small step: on two busy cores the
    embedded default took six times as much CPU time.
    """
    torch.set_num_threads(threads)
    checkpoint = Path(checkpoint)
    part = denoiser_model.with_levels(open_part(checkpoint, "denoiser", adapter), levels)
    network = denoiser_model.load(part, dtype=dtype, device=device)
    audio = audio_model.load(open_part(checkpoint, "audio"), device=device)
    vae = vae_model.load(open_part(checkpoint, "vae", decoder=decoder), dtype=dtype, device=device)
    return Models(audio, network, network.config, vae)


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """Options of a clip; None stands for the checkpoint's default.

    seed: of all randomness, 0 to 2^63 - 1.
    size: (width, height) of the video, or its greatest area in pixels.
    fit: of the picture to this size; with masks, "cover" if the default is "face".
    text: (n, d) embedding of the prompt; None: no prompt.
    masks: a picture file for each actor, white where the portrait shows the actor; None: one actor.
    pose: frames (h, w, 3) RGB of a pose video, at the video's rate; None: no pose video.
    num_blocks: the most blocks to generate; None: to the end of the speech.
    clip_frames: pixel frames of a clip of the reference: whole blocks, two or more. The window holds a clip, the sink
        is replaced after the first clip, and pose videos, features of whole files and clip noise come in clips.
    sink_update_block, sink_distance, audio_right_frames: as in `Session`.
    schedule: "pipeline", as in the services; or "offline", as the reference on one GPU without online decoding: the
        picture stays the sink, and clips are decoded one by one.
    audio: features of "live" audio, as it arrives; or of the "whole" file, as in the public weights' training.
    noise: drawn per "block"; or per "clip", as in the reference.
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
    models: Models, speech: Sequence[Tensor], rate_hz: int, picture: bytes, options: RenderOptions | None = None
) -> Iterator[FrameChunk]:
    """Yield the frames of a clip: a chunk per latent frame, or per clip of the reference with schedule "offline".

    speech: each actor's samples, (1 or 2, s) float32 in [-1, 1]. picture: a file as in `read_picture`.
    ValueError if an input or an option is invalid, or they do not fit together.
    """
    options = options or RenderOptions()
    config, vae = with_clip_frames(models.config, options.clip_frames), models.vae
    options = replace(options, fit=portrait_fit(options.fit, vae.config.picture.fit, bool(options.masks)))
    shown = vae.read_picture(picture, options.size, options.fit)
    rgb = shown.rgb
    session, sink = open_session(vae, shown, picture, options)
    text = torch.zeros(0, 0) if options.text is None else options.text
    blocks = encode_speech(models.audio, speech, rate_hz, session, config, options)
    if options.pose is not None:
        blocks = add_poses(blocks, vae, rgb, config, options)
    noise_source = clip_noise(config.window_blocks) if options.noise == "clip" else noise
    loop = DenoisingLoop(models.network, config, session, Conditions(0, sink, text), noise_source)
    denoised = map(loop.step, islice(blocks, options.num_blocks))
    if options.schedule == "offline":
        yield from decode_in_clips(vae, rgb, denoised, config.window_blocks)
    else:
        state = vae.open(session)
        for block in denoised:
            yield from vae.decode(block, state)


def render_film(
    models: Models, speech: Path | str, portrait: Path | str, out: Path | str, options: RenderOptions | None = None
) -> Film:
    """Render one person's speech and write it as a film.

    speech, portrait, out: files as in `read_audio`, `read_picture` and `write_mp4`. ValueError as of these and of
    `render`; OSError if the film cannot be written.
    """
    samples, rate_hz = read_audio(Path(speech))
    chunks = render(models, [torch.from_numpy(samples)], rate_hz, Path(portrait).read_bytes(), options)
    frames = (chunk.frames.numpy() for chunk in chunks)
    return write_mp4(Path(out), frames, models.vae.config.frame_rate_hz, HIDDEN_FRAMES, samples, rate_hz)


def check_actors(num_speech: int, num_masks: int) -> None:
    """Raise ValueError unless each speech has a mask; a single one needs none."""
    if num_speech != (num_masks or 1):
        raise ValueError(f"got {num_speech} speech files and {num_masks} masks; several actors need a mask each")


def check_speech(samples: Tensor, rate_hz: int) -> None:
    """Raise ValueError unless `render` takes this speech, (1 or 2, s) float32 in [-1, 1]."""
    check_piece(AudioPiece(samples, rate_hz))


def with_clip_frames(config: NetworkConfig, frames: int | None) -> NetworkConfig:
    """Return the configuration with a window of so many pixel frames, and the sink updated after it, if at all.

    None: unchanged. ValueError unless frames are whole blocks, at least two.
    """
    if frames is None:
        return config
    clip_blocks, rest = divmod(frames, config.frames_per_block)
    if rest or clip_blocks < 2:
        # In the reference, frames beyond the last whole block are lost and its ring buffer gets out of step.
        least = 2 * config.frames_per_block
        raise ValueError(f"clip_frames must be a multiple of {config.frames_per_block}, at least {least}: {frames}")
    update = None if config.sink_update_block is None else clip_blocks
    return replace(config, window_latents=clip_blocks * config.num_frames_per_block, sink_update_block=update)


def clip_frames(config: NetworkConfig) -> int:
    """Return the pixel frames of a clip of the reference, which fill the window."""
    return config.window_blocks * config.frames_per_block


def portrait_fit(requested: Fit | None, default: Fit, has_masks: bool) -> Fit:
    """Return the fit of a portrait: the requested one, or the checkpoint's default.

    A portrait with masks shows several actors: its default is "cover" instead of "face", and ValueError is raised if
    "face" is requested.
    """
    if has_masks and requested == "face":
        raise ValueError("the fit `face` shows one person; with masks, request `cover` or `reference`")
    return requested or ("cover" if has_masks and default == "face" else default)


def open_session(vae: Vae[Any], shown: Picture, file: bytes, options: RenderOptions) -> tuple[Session, Tensor]:
    """Return the session of a picture, and its first sink (c, 1, h, w).

    shown: the picture at the video's size. file: its file, for the masks.
    """
    rgb, update = shown.rgb, options.sink_update_block
    if options.schedule == "offline":
        (motion, sink), update = whole_clip.encode_picture(vae, rgb), 0
    else:
        motion = vae.encode_picture(rgb)
        sink = motion[:, :1]
    if notice := vae.notice(shown, motion):
        logger.warning("notice: %s", notice)
    masks, fit = None, options.fit or vae.config.picture.fit
    if options.masks is not None:
        cell = vae.codec.space_stride * PATCH
        masks = torch.stack([read_mask(mask, file, size_of(rgb), fit, cell) for mask in options.masks])
    return Session("clip", options.seed, motion, masks, update, options.sink_distance, options.audio_right_frames), sink


def size_of(rgb: Tensor) -> Size:
    """Return (width, height) of a picture (h, w, 3)."""
    return rgb.shape[1], rgb.shape[0]


def encode_speech(
    audio: AudioModel,
    speech: Sequence[Tensor],
    rate_hz: int,
    session: Session,
    config: NetworkConfig,
    options: RenderOptions,
) -> Iterator[Block]:
    """Yield blocks of features to the end of the longest speech; (a, l, d, f) if the session has masks."""
    check_actors(len(speech), 0 if session.masks is None else len(session.masks))
    num_samples = max(samples.shape[1] for samples in speech)
    # An actor whose speech has ended is silent.
    padded = [functional.pad(samples, (0, num_samples - samples.shape[1])) for samples in speech]
    if options.audio == "live":
        streams = [stream_blocks(audio, samples, rate_hz, session, config.inputs) for samples in padded]
    else:
        streams = [file_blocks(audio.encoder, samples, rate_hz, clip_frames(config)) for samples in padded]
    # Features of a file fill whole clips; the video ends with the block in which the speech ends.
    for blocks in islice(zip(*streams, strict=True), audio.grid.num_blocks(num_samples, rate_hz)):
        features = [block.features for block in blocks]
        yield blocks[0] if session.masks is None else replace(blocks[0], features=torch.stack(features))


def stream_blocks(
    audio: AudioModel, samples: Tensor, rate_hz: int, session: Session, inputs: Collection[str]
) -> Iterator[Block]:
    """Yield the blocks of samples (1 or 2, s), encoded as a stream; inputs: those of `NetworkConfig.inputs`."""
    state = audio.open(session, inputs)
    for start in range(0, samples.shape[1], rate_hz * PIECE_S):
        yield from audio.step(AudioPiece(samples[:, start : start + rate_hz * PIECE_S], rate_hz), state)
    yield from audio.step(AudioPiece(samples[:, :0], rate_hz, is_last=True), state)


def add_poses(
    blocks: Iterator[Block], vae: Vae[Any], rgb: Tensor, config: NetworkConfig, options: RenderOptions
) -> Iterator[Block]:
    """Yield the blocks with the latents of the pose video."""
    assert options.pose is not None
    fit = options.fit or vae.config.picture.fit
    clips = pose_latents(vae.codec, options.pose, size_of(rgb), fit, clip_frames(config))
    poses = (pose for clip in clips for pose in torch.split(clip, config.num_frames_per_block, dim=1))
    for block, pose in zip(blocks, poses, strict=False):
        yield replace(block, pose=pose)


class DenoisingLoop:
    """The denoising loop of a session: every block passes through all levels in order.

    The sink is updated from block 0's result at the session's or checkpoint's `sink_update_block`.
    """

    def __init__(
        self,
        network: Network,
        config: NetworkConfig,
        session: Session,
        conditions: Conditions,
        noise_source: NoiseSource = noise,
    ) -> None:
        """conditions: of block 0."""
        self.session, self.conditions = session, conditions
        prefills = Prefills()
        self.levels = [
            Denoiser(network, config, level, noise_source, prefills=prefills) for level in range(config.num_levels)
        ]
        self.states = [level.open(session) for level in self.levels]
        self._updated_conditions = conditions

    def step(self, block: Block) -> Block:
        """Return the block with its clean latent. Blocks come in order."""
        last = self.levels[-1]
        if block.index == last.sink_update_block(self.session):
            self.conditions = self._updated_conditions
        block = replace(block, conditions=self.conditions)
        for level, state in zip(self.levels, self.states, strict=True):
            block = level.step(block, state)
        if block.index == 0 and last.updates_sink(self.session):
            assert block.latent is not None
            self._updated_conditions = self.conditions.with_sink(block.latent)
        return block


def decode_in_clips(vae: Vae[Any], rgb: Tensor, blocks: Iterator[Block], clip_blocks: int) -> Iterator[FrameChunk]:
    """Yield a chunk per clip, with the index of the clip's first block. The last clip may be shorter."""
    first_frame = HIDDEN_FRAMES
    for clip, frames in enumerate(whole_clip.decode_clips(vae, rgb, clip_latents(blocks, clip_blocks))):
        yield FrameChunk(clip * clip_blocks, True, first_frame, to_bytes(frames))
        first_frame += frames.shape[1]


def clip_latents(blocks: Iterator[Block], clip_blocks: int) -> Iterator[Tensor]:
    """Join the latents of each clip_blocks blocks: (c, t, h, w)."""
    while clip := [block.latent for block in islice(blocks, clip_blocks) if block.latent is not None]:
        yield torch.cat(clip, dim=1)
