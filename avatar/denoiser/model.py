"""The causal speech-to-video transformer of Wan2.2-S2V and Live Avatar (arXiv 2512.04677).

The network has no state. The contributions of a level, a text and a reference are computed once, by `embed_time`,
`embed_text` and `prefill`, and passed to every call; those of earlier blocks come from a history
(`avatar.denoiser.cache`). One call denoises one block, or in training all blocks of a clip, for any batch size.
Classifier-free guidance is not needed: the weights are distilled.

    reference, motion, text --prefill--> condition keys and values --history--+
    noisy latent, pose, audio -----------------------------------> network ---+--> velocity

A network may also take the audio of the other person, whom it listens to, and values of face motion. Both add to the
hidden state, and a network to which nothing of them is given computes what it would without the weights for them.

Module names are the checkpoint's.

Axes: b batch, a actors, c channels, t latent frames, h w of latents, l encoder layers, f pixel frames, n tokens,
s tokens of a latent frame, m values of face motion, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from avatar.checkpoints.part import Part, load_weights
from avatar.denoiser.attention import apply_rope, block_positions, condition_positions, grid_size, rope_table
from avatar.denoiser.audio_injection import AudioInjector, AudioTokens, CausalAudioEncoder, UpcastLinear
from avatar.denoiser.cache import History, KeysValues
from avatar.denoiser.config import PATCH, NetworkConfig
from avatar.denoiser.layers import (
    FaceMotionEmbedding,
    FramePacker,
    Head,
    Layer,
    PatchEmbedding,
    timestep_embedding,
    unpatchify,
)
from avatar.types import FACE_MOTION, FRAMES_PER_LATENT
from avatar.vae.mover import Mover, Texture

# Rows of the token type embedding `trainable_cond_mask`.
NOISY, REFERENCE, MOTION = range(3)


@dataclass(frozen=True, eq=False)
class Modulation:
    """The AdaLN modulation of a timestep, in float32.

    layers: (6, b, t, 1, d) per layer: shift, 1 + scale and gate of self-attention, then of the feed-forward network.
    head: (2, b, t, 1, d) shift and 1 + scale. t is 1 if all latent frames share the timestep.
    """

    layers: list[Tensor]
    head: Tensor


class Network(nn.Module):
    """The network: predicts velocity or x0 residual (`config.output`) of a block from its noisy latent."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.patch_embedding = PatchEmbedding(config.in_dim, dim, 1, PATCH)
        self.cond_encoder = PatchEmbedding(config.cond_dim, dim, 1, PATCH)
        # Not drawn on the meta device: there, drawing imports torch's compiler, for a CPU-second of a start.
        self.trainable_cond_mask = nn.Embedding(3, dim, _weight=torch.empty(3, dim))
        if not self.trainable_cond_mask.weight.is_meta:
            self.trainable_cond_mask.reset_parameters()
        self.frame_packer = FramePacker(config)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(UpcastLinear(config.freq_dim, dim), nn.SiLU(), UpcastLinear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), UpcastLinear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.casual_audio_encoder = CausalAudioEncoder(config)
        self.audio_injector = AudioInjector(config, config.audio_inject_layers)
        if config.heard_inject_layers:
            self.heard_audio_encoder = CausalAudioEncoder(config)
            self.heard_injector = AudioInjector(config, config.heard_inject_layers)
        if config.face_motion:
            self.face_motion_embedding = FaceMotionEmbedding(config)
        self.head = Head(config)
        if config.mover:
            self.mover = Mover(config.mover)
            self.mouth = nn.Linear((config.num_audio_token + 1) * config.dim, FRAMES_PER_LATENT)
            if config.heard_inject_layers:
                self.brows = nn.Linear((config.num_audio_token + 1) * config.dim, FRAMES_PER_LATENT)

    @property
    def layers(self) -> list[Layer]:
        return [layer for layer in self.blocks if isinstance(layer, Layer)]

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def embed_time(self, timesteps: Tensor) -> Modulation:
        """Return the modulation of timesteps (b, t) in [0, 1000]; t = 1 if all latent frames share one."""
        embedded = self.time_embedding(timestep_embedding(timesteps, self.config.freq_dim))
        shared = rearrange(self.time_projection(embedded), "b t (six d) -> six b t 1 d", six=6)
        rows = [rearrange(layer.modulation.to(shared.dtype), "1 six d -> six 1 1 1 d") for layer in self.layers]
        head = rearrange(self.head.modulation.to(shared.dtype), "1 two d -> two 1 1 1 d")
        head = head + rearrange(embedded, "b t d -> 1 b t 1 d")
        # Added once for a timestep, instead of by each use of a scale.
        one = shared.new_zeros(6, 1, 1, 1, 1)
        one[1::3] = 1
        return Modulation([row + shared + one for row in rows], head + one[:2])

    def embed_text(self, text: Tensor) -> list[KeysValues]:
        """Return the keys and values of text (b, n, d), n <= text_len, per layer.

        Text is padded with zeros to text_len, and the padding is attended to, as in the reference.
        """
        assert text.shape[1] <= self.config.text_len, text.shape
        padded = functional.pad(text, (0, 0, 0, self.config.text_len - text.shape[1])).to(self.dtype)
        embedded = self.text_embedding(padded)
        return [layer.cross_attn.keys_values(embedded) for layer in self.layers]

    def prefill(self, reference: Tensor, motion: Tensor, text: list[KeysValues]) -> list[KeysValues]:
        """Return keys (without RoPE) and values of the condition tokens, reference then motion, per layer.

        reference: (b, c, 1, h, w). motion: (b, c, t, h, w), oldest first. text: from `embed_text`.
        """
        types = self.trainable_cond_mask.weight
        still = rearrange(self.patch_embedding(reference.to(self.dtype)), "b 1 s d -> b s d") + types[REFERENCE]
        moving = self.frame_packer(motion.to(self.dtype)) + types[MOTION]
        x = rearrange(torch.cat([still, moving], dim=1), "b n d -> b 1 n d")
        modulation = self.embed_time(torch.zeros(1, 1, device=x.device))
        table = rope_table(condition_positions(*reference.shape[-2:]).to(x.device), self.config.head_dim)
        conditions: list[KeysValues] = []
        for layer, row, text_kv in zip(self.layers, modulation.layers, text, strict=True):
            q, k, v = layer.project(x, row)
            conditions.append((k, v))
            if len(conditions) < self.config.num_layers:
                x = layer(x, (apply_rope(q, table), apply_rope(k, table), v), text_kv, row)
        return conditions

    def encode_audio(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        preceding: Tensor | None = None,
        num_together: int | None = None,
    ) -> AudioTokens:
        """Return the audio tokens of whole blocks.

        features: (b, a, l, d, f). mask: (b, a, t, s, 1) weight of each actor's audio at each token; required if a > 1.
        preceding: (b, a, l, d, audio_context_frames) columns before them; None at a stream's start.
        num_together: columns that see each other; None: a block's, as in a stream.
        """
        assert mask is not None or features.shape[1] == 1, "several actors need a mask"
        return self._tokens(self.casual_audio_encoder, features, mask, preceding, num_together)

    def encode_heard(
        self,
        features: Tensor,
        is_given: Tensor | None = None,
        preceding: Tensor | None = None,
        num_together: int | None = None,
    ) -> AudioTokens:
        """Return the audio tokens of what is heard from the other person, of whole blocks.

        features: (b, 1, l, d, f). is_given: (b,) 0 for clips without a listener, whose features are ignored; None: all.
        preceding: as in `encode_audio`; None also where nobody was heard before. num_together: as in `encode_audio`.
        """
        mask = None if is_given is None else rearrange(is_given, "b -> b 1 1 1 1")
        return self._tokens(self.heard_audio_encoder, features, mask, preceding, num_together)

    def _tokens(
        self,
        encoder: CausalAudioEncoder,
        features: Tensor,
        mask: Tensor | None,
        preceding: Tensor | None,
        num_together: int | None,
    ) -> AudioTokens:
        num_together = num_together or self.config.frames_per_block
        audio = encoder.blocks(features, num_together, self.config.audio_context_frames, preceding)
        return AudioTokens(audio.local, audio.overall, mask)

    def embed_face_motion(self, values: Tensor, is_given: Tensor | None = None) -> Tensor:
        """Return what values of face motion (b, m, f) add to the hidden state: (b, t, 1, d).

        is_given: (b,) 0 for clips whose values are ignored; None: all.
        """
        embedded: Tensor = self.face_motion_embedding(values)
        return embedded if is_given is None else embedded * rearrange(is_given, "b -> b 1 1 1")

    def read_texture(self, reference: Tensor) -> Texture | None:
        """Return what `move` needs of references (b, c, 1, h, w); None for a network without a mover."""
        return self.mover.read(reference[:, :, 0]) if self.config.mover else None

    @torch.no_grad()
    def move(
        self,
        reference: Tensor,
        audio: AudioTokens,
        heard: AudioTokens | None = None,
        values: Tensor | None = None,
        is_given: Tensor | None = None,
        texture: Texture | None = None,
    ) -> Tensor:
        """Return the reference (b, c, 1, h, w) as speech and face motion move it, (b, c, t, h, w), without gradients.

        A network without a mover returns the reference. audio, heard: as in `forward`; they open the mouth and raise
        the brows. values: (b, m, f) of face motion; None: the head and the eyes stay as in the reference. is_given:
        (b,) 0 for clips whose values are ignored; None: all. texture: of the reference, if it was read before.
        """
        texture = texture or self.read_texture(reference)
        if texture is None:
            return reference
        mouths = rearrange(self.mouth(audio.flat), "b a t p -> b a 1 (t p)").float().clamp(0, 1)
        brows = torch.zeros_like(mouths[:, 0])
        if heard is not None:
            raised = self.brows(heard.flat) if heard.mask is None else self.brows(heard.flat) * heard.mask[..., 0]
            brows = rearrange(raised, "b 1 t p -> b 1 (t p)").float().clamp(0, 1)
        if values is None:
            values = mouths.new_zeros(len(mouths), len(FACE_MOTION), mouths.shape[-1])
        elif is_given is not None:
            values = values * rearrange(is_given, "b -> b 1 1")
        moved: list[Tensor] = [
            self.mover(texture, torch.cat([values, mouth, brows], dim=1)) for mouth in mouths.unbind(1)
        ]
        if audio.mask is None:
            return moved[0].to(reference)
        # Each actor's share of the picture moves with that actor's audio.
        rows, columns = grid_size(*reference.shape[-2:])
        shares = rearrange(audio.mask, "b a t (h w) 1 -> a b 1 t h w", h=rows, w=columns)
        shares = repeat(shares, "a b 1 t h w -> a b 1 t (h p) (w q)", p=PATCH, q=PATCH)
        return reference + ((torch.stack(moved).to(reference) - reference) * shares).sum(0)

    def forward(
        self,
        x: Tensor,
        modulation: Modulation,
        text: list[KeysValues],
        audio: AudioTokens,
        pose: Tensor,
        first_frame: int | Tensor,
        history: History,
        heard: AudioTokens | None = None,
        face_motion: Tensor | None = None,
    ) -> Tensor:
        """Return the output for noisy latents x (b, c, t, h, w), of x's shape and dtype.

        modulation: from `embed_time`. text: from `embed_text`. audio: from `encode_audio`. pose: latents of x's shape.
        first_frame: number of x's first latent frame in the stream, or (b,) of them.
        history: the keys and values that x attends to besides text and audio; it is extended by x's own.
        heard: from `encode_heard`; None: nobody is heard. face_motion: from `embed_face_motion`; None: it moves freely.
        """
        config = self.config
        injections = [(self.audio_injector, audio)]
        if heard is not None:
            injections.append((self.heard_injector, heard))
        num_frames, height, width = x.shape[-3:]
        positions = block_positions(first_frame, num_frames, height, width, x.device).to(x.device)
        table = rope_table(positions, config.head_dim)
        hidden = self.patch_embedding(x) + self.cond_encoder(pose) + self.trainable_cond_mask.weight[NOISY]
        if face_motion is not None:
            hidden = hidden + face_motion.to(hidden.dtype)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.project(hidden, modulation.layers[i], table)
            attended = q, *history.extend(i, k, v)
            hidden = layer(hidden, attended, text[i], modulation.layers[i], history.visible)
            for injector, tokens in injections:
                if i in injector.layers:
                    hidden = hidden + injector(injector.layers.index(i), hidden, tokens)
        return unpatchify(self.head(hidden, modulation.head), grid_size(height, width)[0]).to(x.dtype)


def to_velocity(output: Tensor, x: Tensor, reference: Tensor, sigma: float | Tensor, config: NetworkConfig) -> Tensor:
    """Convert the network's output at x (b, c, t, h, w) to a velocity. reference: (b, c, t or 1, h, w).

    sigma: noise level of x, or of each frame, in a shape that broadcasts; in (0, 1].
    With residual output F, x0 = reference + residual_scale F and velocity = (x - x0) / sigma.
    """
    if config.output == "velocity":
        return output
    clean = reference + config.residual_scale * output
    return ((x - clean) / sigma).to(x.dtype)


def with_levels(part: Part, choice: int | Sequence[float] | None) -> Part:
    """Return a denoiser part that runs fewer levels than its weights were trained for; its digest is another one.

    choice: as in `select_levels`; None for all. ValueError if the checkpoint has no such levels.
    """
    with part.naming_config():
        config = NetworkConfig.from_dict(part.config)
    chosen = config.with_levels(choice)
    if chosen.schedule == config.schedule:
        return part
    schedules = {"schedule": chosen.schedule, "trained_schedule": chosen.trained_schedule}
    return replace(part, config={**part.config, **schedules})


def load(part: Part, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Network:
    """Return the network of a checkpoint's denoiser part, in eval mode without gradients.

    ValueError if the configuration is another network's, or the weights do not fit it.
    """
    with torch.device("meta"), part.naming_config():
        network = Network(NetworkConfig.from_dict(part.config)).to(dtype)
    load_weights(network, part, device)
    return network.eval().requires_grad_(False)
