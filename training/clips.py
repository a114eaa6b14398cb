"""The network over whole clips at once: stage 1's training pass, and both score networks of stage 2.

Causal: each block has a noise level of its own and attends to the noisy blocks in its window. Bidirectional: each block
attends to the whole clip.

Axes: b batch, k blocks, c channels, t latent frames, h w of latents; of keys and values n tokens, h heads, d width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from avatar.denoiser.attention import (
    REFERENCE_FRAME,
    apply_rope,
    block_positions,
    condition_positions,
    rope_table,
)
from avatar.denoiser.audio_injection import AudioTokens
from avatar.denoiser.cache import KeysValues
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network, to_velocity
from avatar.types import FRAMES_PER_LATENT
from training.batches import ClipBatch


class ClipHistory:
    """The history of all blocks of a clip at once, with gradients.

    Keys are: a copy of the reference per block, at the position for that block; motion; the clip itself. A block
    attends to its own reference, motion, itself and the window's blocks before it, which may be those of another
    version of the clip.
    Source: teacher forcing with a block-causal mask, as in CausVid (arXiv 2412.07772).
    """

    def __init__(
        self,
        config: NetworkConfig,
        height: int,
        width: int,
        conditions: Sequence[KeysValues],
        reference_frames: Sequence[int | Tensor],
        is_causal: bool = True,
        past: Sequence[KeysValues] = (),
    ) -> None:
        """conditions: from prefill. reference_frames: the reference's frame for each block, or (b,) of them.

        is_causal False: one reference for all blocks, and each attends to the whole clip. past: keys and values, by
        layer, of another version of the clip, whose blocks a block attends to in place of those before it.
        """
        device = conditions[0][0].device
        reference = [block_positions(frame, 1, height, width) for frame in reference_frames]
        self._blocks = len(reference)
        self._reference_tokens = reference[0].shape[-2]
        motion = condition_positions(height, width)[self._reference_tokens :]
        positions = torch.cat([*reference, motion.expand(*reference[0].shape[:-2], -1, -1)], dim=-2)
        self._rope_table = rope_table(positions.to(device), config.head_dim)
        self._conditions, self._past = conditions, past
        self.visible = self._visible(config, motion_tokens=len(motion)) if is_causal else None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        """Return all keys and values of a layer, the clip's own k, v (b, n, h, d) last."""
        condition_k, condition_v = map(self._copy_reference, self._conditions[layer])
        conditions = apply_rope(condition_k, self._rope_table), condition_v
        keys, values = zip(conditions, *self._past[layer : layer + 1], (k, v), strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def _copy_reference(self, x: Tensor) -> Tensor:
        reference, motion = x[:, : self._reference_tokens], x[:, self._reference_tokens :]
        return torch.cat([repeat(reference, "b n h d -> b (blocks n) h d", blocks=self._blocks), motion], dim=1)

    def _visible(self, config: NetworkConfig, motion_tokens: int) -> list[list[slice]]:
        reference, block = self._reference_tokens, self._reference_tokens * config.num_frames_per_block
        motion = self._blocks * reference
        past = motion + motion_tokens
        clip = past + (self._blocks * block if self._past else 0)
        return [
            [
                slice(i * reference, (i + 1) * reference),
                slice(motion, past),
                slice(past + max(0, i + 1 - config.window_blocks) * block, past + i * block),
                slice(clip + i * block, clip + (i + 1) * block),
            ]
            for i in range(self._blocks)
        ]


class KeptHistory(ClipHistory):
    """A history that keeps the clip's own keys and values, by layer, as another version's past."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.own: list[KeysValues] = []

    def extend(self, layer: int, k: Tensor, v: Tensor) -> KeysValues:
        self.own.append((k, v))
        return super().extend(layer, k, v)


def frame_sigmas(sigmas: Tensor, config: NetworkConfig) -> Tensor:
    """Repeat the sigmas of blocks (b, k) for their latent frames, (b, 1, t, 1, 1)."""
    return repeat(sigmas, "b k -> b 1 (k t) 1 1", t=config.num_frames_per_block)


def clean_estimate(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Return x0 = x - sigma v, the clean latents that a velocity at x points to."""
    return x - sigma * velocity


def reference_frames(first_block: Tensor, config: NetworkConfig, distances: Sequence[int]) -> list[int | Tensor]:
    """Return the reference's temporal position for each block of clips that start at first_block (b,): (b,) each."""
    firsts = ((first_block + block) * config.num_frames_per_block for block in range(len(distances)))
    return [(first + distance).clamp(min=REFERENCE_FRAME) for first, distance in zip(firsts, distances, strict=True)]


def encode_inputs(
    network: Network, batch: ClipBatch, frames: slice = slice(None), *, is_whole: bool = False
) -> tuple[AudioTokens, AudioTokens | None, Tensor | None]:
    """Return what a network takes of a span of pixel frames: its own and the other's audio tokens, and face motion.

    A clip without one of the last two computes it too, so that all weights have gradients, and adds nothing of it.
    is_whole: audio is encoded as one, as by the published bidirectional network, and not block by block.
    """
    context, first = network.config.audio_context_frames, frames.start or 0

    def preceding(features: Tensor) -> Tensor | None:
        """Return the columns before the span; the first is repeated where there are too few."""
        if not first or not context:
            return None
        before = features[..., max(0, first - context) : first]
        missing = context - before.shape[-1]
        return torch.cat([before[..., :1].expand(*before.shape[:-1], missing), before], dim=-1)

    together = batch.features.shape[-1] if is_whole else None
    audio = network.encode_audio(batch.features[..., frames], None, preceding(batch.features), together)
    heard = motion = None
    if "heard" in network.config.inputs:
        heard = network.encode_heard(batch.heard[..., frames], batch.has_heard, preceding(batch.heard), together)
    if "face_motion" in network.config.inputs:
        motion = network.embed_face_motion(batch.face_motion[..., frames], batch.has_face_motion)
    return audio, heard, motion


def moved_reference(
    network: Network, batch: ClipBatch, audio: AudioTokens, heard: AudioTokens | None, frames: slice = slice(None)
) -> Tensor:
    """Return the references of clips as their network moves them over a span of pixel frames, (b, c, t or 1, h, w)."""
    if batch.moved is not None:
        start, stop, _ = frames.indices(batch.features.shape[-1])
        return batch.moved[:, :, start // FRAMES_PER_LATENT : stop // FRAMES_PER_LATENT]
    values = batch.face_motion[..., frames] if "face_motion" in network.config.inputs else None
    return network.move(batch.reference, audio, heard, values, batch.has_face_motion)


@torch.no_grad()
def with_moved(network: Network, batch: ClipBatch) -> ClipBatch:
    """Return the batch with its references moved once, for all networks that have the same mover."""
    audio, heard, _ = encode_inputs(network, batch)
    return batch.replace(moved=moved_reference(network, batch, audio, heard))


def predict_velocity(
    network: Network,
    config: NetworkConfig,
    x: Tensor,
    sigmas: Tensor,
    batch: ClipBatch,
    distances: Sequence[int],
    is_causal: bool = True,
) -> Tensor:
    """Predict the velocity at noisy clips x (b, c, t, h, w) whose blocks have sigmas (b, k) in (0, 1].

    batch: the clips' conditions; its latents are not used. distances: of the sink from each block, in latent frames.
    is_causal: False runs the published bidirectional network: each block attends to the whole clip and its audio, the
    clip starts at frame 0, and the reference keeps the position that prefill gives it.
    """
    [velocity] = predict_velocities(network, config, [(x, sigmas)], batch, distances, is_causal)
    return velocity


def predict_velocities(
    network: Network,
    config: NetworkConfig,
    versions: Sequence[tuple[Tensor, Tensor]],
    batch: ClipBatch,
    distances: Sequence[int],
    is_causal: bool = True,
) -> list[Tensor]:
    """Predict the velocities at versions of the same clips, each with noise and sigmas of its own.

    Blocks of the first version have the blocks before them as history, those of a later version the blocks of the
    version before it. versions: (x, sigmas), and other arguments, as in `predict_velocity`.
    """
    height, width = batch.reference.shape[-2:]
    text = network.embed_text(batch.text)
    conditions = network.prefill(batch.reference, batch.motion, text)
    first_block = batch.first_block if is_causal else torch.zeros_like(batch.first_block)
    positions = reference_frames(first_block, config, distances) if is_causal else [REFERENCE_FRAME]
    audio, heard, motion = encode_inputs(network, batch, is_whole=not is_causal)
    reference = moved_reference(network, batch, audio, heard)
    first_frame = first_block * config.num_frames_per_block
    velocities: list[Tensor] = []
    past: Sequence[KeysValues] = ()
    for x, sigmas in versions:
        # The public network's keys and values take gigabytes: they are kept only where a version follows.
        is_last = len(velocities) + 1 == len(versions)
        kind = ClipHistory if is_last else KeptHistory
        history = kind(config, height, width, conditions, positions, is_causal, past)
        pose = torch.zeros_like(x) if config.pose == "zeros" else reference.expand_as(x)
        sigma = frame_sigmas(sigmas, config)
        modulation = network.embed_time(1000 * sigma[:, 0, :, 0, 0])
        output = network(x, modulation, text, audio, pose, first_frame, history, heard, motion)
        velocities.append(to_velocity(output.float(), x, reference, sigma, config))
        past = history.own if isinstance(history, KeptHistory) else ()
    return velocities
