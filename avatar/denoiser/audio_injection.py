"""Audio conditioning: features to audio tokens, and cross-attention from picture tokens to audio tokens.

    features --mix layers, causal convolutions--> local tokens and an overall vector --AdaLN, cross-attention--> hidden

Each latent frame attends to its own few local tokens; its overall vector modulates the queries. The encoder computes in
float32 at least. Source: Wan2.2-S2V. Module names are the checkpoint's.

Axes: b batch, a actors, l encoder layers, f pixel frames, t latent frames, n audio tokens of a latent frame,
s picture tokens of a latent frame, d width, c channels.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from avatar.denoiser.attention import Attention, multiply_add, upcast
from avatar.denoiser.config import NetworkConfig
from avatar.types import FRAMES_PER_LATENT

# Epsilon of the norm before an injection, which differs from the network's.
INJECTION_EPS = 1e-5


@dataclass(frozen=True, eq=False)
class AudioTokens:
    """The audio tokens of a clip's latent frames.

    local: (b, a, t, n, d) keys and values of the cross-attention. overall: (b, a, t, d) for AdaLN.
    mask: weight of each actor's audio at each picture token, a shape that broadcasts to (b, a, t, s, 1); None: all 1.
    """

    local: Tensor
    overall: Tensor
    mask: Tensor | None = None

    @property
    def flat(self) -> Tensor:
        """All tokens of a latent frame but the padding token, and its overall vector: (b, a, t, (n d))."""
        return torch.cat([self.local[..., :-1, :].flatten(-2), self.overall], dim=-1)


class UpcastLinear(nn.Linear):
    """A linear map computed in the input's dtype, whatever the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class CausalConvolution(nn.Module):
    """A causal convolution over three pixel frames, padded by repeating the first; computed in the input's dtype."""

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.conv.weight.to(x.dtype), self.conv.bias
        assert bias is not None
        return functional.conv1d(
            functional.pad(x, (2, 0), mode="replicate"), weight, bias.to(x.dtype), self.conv.stride
        )


class AudioConvolutions(nn.Module):
    """Causal convolutions from features to audio tokens, four pixel frames to a latent frame."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        dim, tokens = config.dim, config.num_audio_token
        self.conv1_local = CausalConvolution(config.audio_dim, tokens * dim // 4)
        self.conv1_global = CausalConvolution(config.audio_dim, dim // 4)
        self.conv2 = CausalConvolution(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConvolution(dim // 2, dim, stride=2)
        self.final_linear = UpcastLinear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.num_tokens, self.eps = tokens, config.eps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (b, d, f) -> local tokens (b, t, n, d), the learned padding token last, and overall (b, t, d)."""
        local = rearrange(self.conv1_local(x), "b (n c) f -> (b n) c f", n=self.num_tokens)
        local = rearrange(self.downsample(local), "(b n) t d -> b t n d", n=self.num_tokens)
        padding = self.padding_tokens.to(local.dtype).expand(*local.shape[:2], -1, -1)
        overall = self.final_linear(self.downsample(self.conv1_global(x)))
        return torch.cat([local, padding], dim=2), overall

    def downsample(self, x: Tensor) -> Tensor:
        """Downsample time by four: (b, c, f) -> (b, t, d)."""
        x = self.conv2(rearrange(self.activate(x), "b f c -> b c f"))
        x = self.conv3(rearrange(self.activate(x), "b f c -> b c f"))
        return self.activate(x)

    def activate(self, x: Tensor) -> Tensor:
        """Norm over channels, then SiLU: (b, c, f) -> (b, f, c)."""
        x = rearrange(x, "b c f -> b f c")
        return functional.silu(functional.layer_norm(x, x.shape[-1:], eps=self.eps))


class CausalAudioEncoder(nn.Module):
    """A learned mixture of the audio encoder's layers, then causal convolutions."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(1, config.num_encoder_layers, 1, 1))
        self.encoder = AudioConvolutions(config)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l, d, f) -> local tokens (b, t, n, d) and overall vectors (b, t, d); t = f / 4, rounded up."""
        shares = functional.silu(self.weights)
        mixed = upcast(features.to(shares.dtype) * shares).sum(1) / upcast(shares).sum()
        local, overall = self.encoder(mixed)
        return local, overall

    def blocks(
        self, features: Tensor, frames_per_block: int, context_frames: int = 0, preceding: Tensor | None = None
    ) -> AudioTokens:
        """Return the tokens of one or more whole blocks, each encoded from its own columns and those before it.

        features: (b, a, l, d, f), f a multiple of frames_per_block. context_frames: columns before a block that it is
        encoded with, a multiple of 4. preceding: (b, a, l, d, context_frames) those before the first block; None:
        copies of its first column.
        """
        b, a = features.shape[:2]
        if preceding is None:
            preceding = features[..., :1].expand(*features.shape[:-1], context_frames)
        windows = torch.cat([preceding, features], dim=-1).unfold(
            -1, context_frames + frames_per_block, frames_per_block
        )
        columns = rearrange(windows, "b a l d blocks f -> (b a blocks) l d f")
        # Outputs end on frames 0, 4, 8 ...: one frame more in front, its output dropped, lets a latent frame end on the
        # last of its four. Further copies would not change results, as the convolutions repeat the first frame anyway.
        first = 1 + context_frames // FRAMES_PER_LATENT
        local, overall = (each[:, first:] for each in self(torch.cat([columns[..., :1], columns], dim=-1)))
        return AudioTokens(
            rearrange(local, "(b a blocks) t n d -> b a (blocks t) n d", b=b, a=a).to(self.weights.dtype),
            rearrange(overall, "(b a blocks) t d -> b a (blocks t) d", b=b, a=a).to(self.weights.dtype),
        )


class AudioAdaLN(nn.Module):
    """AdaLN: a layer norm whose shift and scale come from the overall audio vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, overall: Tensor) -> Tensor:
        """Normalise and modulate x; x and overall: (..., d), of shapes that broadcast."""
        modulation: Tensor = self.linear(functional.silu(overall))
        shift, scale = modulation.chunk(2, dim=-1)
        normed = functional.layer_norm(upcast(x), x.shape[-1:], eps=INJECTION_EPS)
        return multiply_add(normed, 1 + upcast(scale), shift, x.dtype)


class AudioInjector(nn.Module):
    """Cross-attention from picture tokens to the audio tokens of their latent frame, after some of the layers."""

    def __init__(self, config: NetworkConfig, layers: tuple[int, ...]) -> None:
        super().__init__()
        count, self.layers = len(layers), layers
        self.injector = nn.ModuleList(Attention(config.dim, config.num_heads, config.eps) for _ in range(count))
        self.injector_adain_layers = nn.ModuleList(AudioAdaLN(config.dim) for _ in range(count))

    def forward(self, injection: int, x: Tensor, audio: AudioTokens) -> Tensor:
        """Return the residual that audio adds to x (b, t, s, d); injection: index into the injector's layers."""
        attention = self.injector[injection]
        assert isinstance(attention, Attention)
        normed = self.injector_adain_layers[injection](x.unsqueeze(1), audio.overall.unsqueeze(-2))
        b, a, t = normed.shape[:3]
        q = attention.queries(rearrange(normed, "b a t s d -> (b a t) s d"))
        k, v = attention.keys_values(rearrange(audio.local, "b a t n d -> (b a t) n d"))
        residual: Tensor = attention(q, k, v)
        residual = rearrange(residual, "(b a t) s d -> b a t s d", b=b, a=a, t=t)
        if audio.mask is None:
            return residual.squeeze(1)
        return (residual * audio.mask.to(residual.dtype)).sum(1)
