"""The models around the network on a device: VAE and tiny decoder, audio encoders, and the text encoder."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from avatar.audio.alignment import SAMPLE_RATE_HZ
from avatar.audio.statistics import AudioStatistics
from avatar.checkpoints.sizing import WAN, audio_work
from avatar.denoiser.config import base
from benchmarks.one_device.denoiser import measured
from benchmarks.one_device.run import Run, fill
from benchmarks.row import Row, row

DECODING_MS = 200
BLOCK_LATENTS, PICTURE_FRAMES, TEXT_TOKENS = 3, 73, 20
# Seconds of wav2vec2's window, at 16 kHz, and the duration of a block.
WINDOW_S, BLOCK_S = 8.98, 0.48


def wan(run: Run) -> Any:
    """Return Wan's codec with random weights."""
    from avatar.vae.wan import WanCodec, WanConfig

    codec = WanCodec(WanConfig(base_dim=4) if run.is_toy else WanConfig(), run.device, torch.bfloat16)
    fill(codec.network)
    return codec


def latents(run: Run, size: tuple[int, int]) -> Tensor:
    return torch.randn(1, 16, BLOCK_LATENTS, *size, device=run.device)


def decode_seconds(run: Run, codec: Any, size: tuple[int, int]) -> float:
    """Return the time that a block takes in a stream that has begun."""
    state, block = codec.new_state(), latents(run, size)
    codec.decode(block, state)
    return run.seconds(lambda: codec.decode(block, state))


def decoder(run: Run) -> Iterator[Row]:
    """Yield the times of encoding a picture's clip and of decoding a block, by Wan's VAE and by the tiny decoder."""
    from avatar.vae.vae import to_bytes

    codec, size = wan(run), run.sizes[0]
    gpu = measured(run)
    frames = torch.zeros(1, 3, 5 if run.is_toy else PICTURE_FRAMES, 8 * size[0], 8 * size[1], device=run.device)
    yield row("encode the 73 frames of a picture", run.seconds(lambda: codec.encode(frames), 1), "s")
    for height, width in run.sizes:
        seconds = decode_seconds(run, codec, (height, width))
        run.decoding_s[height, width] = seconds
        ceiling = 1000 * WAN.work(base(), height, width).seconds(gpu) if gpu and not run.is_toy else None
        target = DECODING_MS if (height, width) == size else None
        name = f"decode a block at {8 * width}x{8 * height}"
        yield row(name, 1000 * seconds, "ms", at_most=target, bound=ceiling)
    for parameter in codec.network.parameters():
        parameter.data = parameter.data.contiguous()
    yield row("decode a block, channels first", 1000 * decode_seconds(run, codec, size), "ms")
    yield row("decode a block, tiny decoder", 1000 * decode_seconds(run, _tiny(run), size), "ms")
    pixels = torch.rand(3, 4, 8 * size[0], 8 * size[1], device=run.device)
    yield row("frames of a latent to bytes on the host", 1000 * run.seconds(lambda: to_bytes(pixels)), "ms")


def _tiny(run: Run) -> Any:
    from avatar.vae.tiny_decoder import WIDTHS, TinyDecoder, TinyDecoderCodec, TinyDecoderConfig

    network = TinyDecoder((8, 8, 8, 8) if run.is_toy else WIDTHS).to(run.device, torch.bfloat16)
    network.requires_grad_(False)
    fill(network)
    return TinyDecoderCodec(wan(run), network, TinyDecoderConfig("normalised"))


def compiled_decoder(run: Run) -> Iterator[Row]:
    """Yield the time of decoding a block by a compiled decoder, which the services do not use."""
    codec = wan(run)
    backend = "aot_eager" if run.is_toy else "inductor"  # which takes minutes on a CPU
    codec.network.decoder = torch.compile(codec.network.decoder, dynamic=False, backend=backend)
    yield row("decode a block, compiled", 1000 * decode_seconds(run, codec, run.sizes[0]), "ms", at_most=DECODING_MS)


def coders(run: Run) -> Iterator[Row]:
    """Yield the times of the audio encoders for a block, in float32 without TF32, and of a prompt of 20 tokens."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield from _wav2vec2(run)
    yield from _whisper(run)
    run.free()
    yield from _text(run)


def _wav2vec2(run: Run) -> Iterator[Row]:
    from avatar.audio.wav2vec2 import Wav2Vec2, large

    encoder = (Wav2Vec2.tiny() if run.is_toy else Wav2Vec2(large())).to(run.device)
    samples = torch.randn(round((1.0 if run.is_toy else WINDOW_S) * SAMPLE_RATE_HZ))
    seconds = run.seconds(lambda: encoder.hidden_states(samples).cpu())
    gpu = measured(run)
    ceiling = 1000 * audio_work(24, 1024).seconds(gpu) if gpu and not run.is_toy else None
    yield row("wav2vec2, a block's window", 1000 * seconds, "ms", at_most=1000 * BLOCK_S / 4, bound=ceiling)


def _whisper(run: Run) -> Iterator[Row]:
    from avatar.audio.whisper import Whisper, tiny_en

    encoder = (Whisper.tiny() if run.is_toy else Whisper(tiny_en())).to(run.device)
    window = torch.randn(encoder.left_samples + encoder.grid.window_end(0, encoder.right_frames))
    statistics = AudioStatistics().with_samples(window)
    seconds = run.seconds(lambda: encoder.encode(window, statistics, encoder.right_frames)[0].cpu())
    yield row("Whisper tiny.en, a block's window", 1000 * seconds, "ms")


def _text(run: Run) -> Iterator[Row]:
    """Yield the time of a prompt in umT5-XXL's encoder."""
    from avatar.text import model

    sizes: dict[str, int] = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240}
    sizes |= {"num_layers": 24, "num_heads": 64, "relative_attention_num_buckets": 32}
    toy = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    network = model.build(model.TextConfig(network=toy if run.is_toy else sizes), torch.bfloat16)
    network = network.to_empty(device=run.device).eval().requires_grad_(False)
    fill(network)
    ids = torch.arange(TEXT_TOKENS, device=run.device).unsqueeze(0) % 16
    seconds = run.seconds(lambda: network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state)
    num_bytes = sum(each.nbytes for each in network.parameters())
    ceiling = 1000 * num_bytes / run.rates.bandwidth if run.rates.bandwidth else None
    yield row("umT5, a prompt of 20 tokens", 1000 * seconds, "ms", bound=ceiling)
