"""How sound reaches the network: features to audio tokens, and audio tokens into the hidden state.

Each latent frame hears its own few local tokens, and one overall vector that shifts and scales what listens.
Everything here is computed in float32 at least until tokens leave the encoder.

Axes: b batch, a actors, l encoder layers, f pixel frames, t latent frames, n audio tokens of a latent frame,
s picture tokens of a latent frame, d width, c channels.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from avatar.denoiser.attention import Attention, widen
from avatar.denoiser.config import NetworkConfig

# The norm before an injection has an epsilon of its own.
INJECTION_EPS = 1e-5


@dataclass(frozen=True, eq=False)
class AudioTokens:
    """What a clip of latent frames hears.

    local: (b, a, t, n, d). overall: (b, a, t, d).
    mask: (b, a, t, s, 1) weight of each actor's sound at each picture token; None where there is one actor.
    """

    local: Tensor
    overall: Tensor
    mask: Tensor | None = None


class WideLinear(nn.Linear):
    """A linear map computed in the input's dtype, whatever dtype its weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class CausalConvolution(nn.Module):
    """A convolution over three columns, the current one and the two before it; the first column stands in for earlier
    ones. Computed in the input's dtype."""

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
    """Columns of features to audio tokens, four columns to a latent frame."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        dim, tokens = config.dim, config.num_audio_token
        self.conv1_local = CausalConvolution(config.audio_dim, tokens * dim // 4)
        self.conv1_global = CausalConvolution(config.audio_dim, dim // 4)
        self.conv2 = CausalConvolution(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConvolution(dim // 2, dim, stride=2)
        self.final_linear = WideLinear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.num_tokens, self.eps = tokens, config.eps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (b, d, f) -> local tokens (b, t, n, d), the learned padding token last, and overall (b, t, d)."""
        local = rearrange(self.conv1_local(x), "b (n c) f -> (b n) c f", n=self.num_tokens)
        local = rearrange(self.shorten(local), "(b n) t d -> b t n d", n=self.num_tokens)
        padding = self.padding_tokens.to(local.dtype).expand(*local.shape[:2], -1, -1)
        overall = self.final_linear(self.shorten(self.conv1_global(x)))
        return torch.cat([local, padding], dim=2), overall

    def shorten(self, x: Tensor) -> Tensor:
        """(b, c, f) -> (b, t, d)."""
        x = self.conv2(rearrange(self.activate(x), "b f c -> b c f"))
        x = self.conv3(rearrange(self.activate(x), "b f c -> b c f"))
        return self.activate(x)

    def activate(self, x: Tensor) -> Tensor:
        """Norm over channels, then SiLU: (b, c, f) -> (b, f, c)."""
        x = rearrange(x, "b c f -> b f c")
        return functional.silu(functional.layer_norm(x, x.shape[-1:], eps=self.eps))


class AudioEncoder(nn.Module):
    """A learned mixture of the encoder's layers, then convolutions."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(1, config.num_encoder_layers, 1, 1))
        self.encoder = AudioConvolutions(config)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l, d, f) -> local tokens (b, t, n, d) and overall vectors (b, t, d); t = f / 4, rounded up."""
        shares = functional.silu(self.weights)
        mixed = widen(features.to(shares.dtype) * shares).sum(1) / widen(shares).sum()
        local, overall = self.encoder(mixed)
        return local, overall

    def blocks(self, features: Tensor, frames_per_block: int) -> AudioTokens:
        """Tokens of one or more whole blocks, each heard by itself: no sound crosses from block to block.

        features: (b, a, l, d, f), f a multiple of frames_per_block.
        """
        b, a = features.shape[:2]
        columns = rearrange(features, "b a l d (blocks f) -> (b a blocks) l d f", f=frames_per_block)
        # Outputs end on columns 0, 4, 8 ...: one column in front, its output dropped, lets a latent frame end on the
        # last of its four. More copies would change nothing, as the convolutions repeat the first column themselves.
        local, overall = (each[:, 1:] for each in self(torch.cat([columns[..., :1], columns], dim=-1)))
        return AudioTokens(
            rearrange(local, "(b a blocks) t n d -> b a (blocks t) n d", b=b, a=a).to(self.weights.dtype),
            rearrange(overall, "(b a blocks) t d -> b a (blocks t) d", b=b, a=a).to(self.weights.dtype),
        )


class InjectionNorm(nn.Module):
    """A norm whose shift and scale are read from the overall audio vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, overall: Tensor) -> Tensor:
        """x and overall (..., d) of shapes that broadcast."""
        moved: Tensor = self.linear(functional.silu(overall))
        shift, scale = moved.chunk(2, dim=-1)
        return functional.layer_norm(widen(x), x.shape[-1:], eps=INJECTION_EPS) * (1 + widen(scale)) + shift


class AudioInjector(nn.Module):
    """Cross-attention from picture tokens to the audio tokens of their own latent frame, after some of the layers."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        count = len(config.audio_inject_layers)
        self.injector = nn.ModuleList(Attention(config.dim, config.num_heads, config.eps) for _ in range(count))
        self.injector_adain_layers = nn.ModuleList(InjectionNorm(config.dim) for _ in range(count))

    def forward(self, injection: int, x: Tensor, audio: AudioTokens) -> Tensor:
        """What sound adds to x (b, t, s, d); injection: index of the injected layer among the injected ones."""
        attention = self.injector[injection]
        assert isinstance(attention, Attention)
        listening = self.injector_adain_layers[injection](x.unsqueeze(1), audio.overall.unsqueeze(-2)).to(x.dtype)
        b, a, t = listening.shape[:3]
        q = attention.queries(rearrange(listening, "b a t s d -> (b a t) s d"))
        k, v = attention.keys_values(rearrange(audio.local, "b a t n d -> (b a t) n d"))
        heard: Tensor = attention(q, k, v)
        heard = rearrange(heard, "(b a t) s d -> b a t s d", b=b, a=a, t=t)
        return (heard if audio.mask is None else heard * audio.mask.to(heard.dtype)).sum(1)
