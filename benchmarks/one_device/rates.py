"""Ceilings of a device: rates of matrix products, attention and copies at the shapes of the public network."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.one_device.run import Run
from benchmarks.row import Row, row

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
HEADS, HEAD_DIM = 40, 128
# Tokens of a block at 704x384; keys of a full window, of the text, and of audio.
TOKENS, KEYS = 3168, (15312, 512, 5)


def ceilings(run: Run) -> Iterator[Row]:
    """Yield the device's rates; the largest of their kind become the ceilings of later rows."""
    side = 64 if run.is_toy else 8192
    tokens, dim, inner = (64, 32, 64) if run.is_toy else (TOKENS, 5120, 13824)
    run.rates.gemm = _gemm(run, side, side, side)
    yield row(f"matrix product {side}x{side}x{side}, bfloat16", run.rates.gemm / 1e12, "TFLOP/s")
    steps = (tokens, dim, dim), (tokens, dim, inner), (tokens, inner, dim)
    for n, k, m in steps:
        rate = _gemm(run, n, k, m)
        yield row(f"matrix product {n}x{k}x{m}, bfloat16", rate / 1e12, "TFLOP/s", bound=run.rates.gemm / 1e12)
    for shape in ((side, side, side), *steps):
        yield from _float8_rows(run, shape)
    yield from _copies(run)
    for keys in KEYS:
        yield from _attention_rows(run, tokens, min(keys, 128) if run.is_toy else keys)


def random(run: Run, *shape: int) -> Tensor:
    return torch.randn(shape, device=run.device, dtype=torch.bfloat16)


def _gemm(run: Run, n: int, k: int, m: int) -> float:
    a, b = random(run, n, k), random(run, m, k)
    return 2 * n * k * m / run.seconds(lambda: torch.nn.functional.linear(a, b), 10)


def _float8_rows(run: Run, shape: tuple[int, int, int]) -> Iterator[Row]:
    n, k, m = shape
    product: Any = torch._scaled_mm
    scale = torch.ones((), device=run.device)
    try:
        a, b = (random(run, *sides).to(torch.float8_e4m3fn) for sides in ((n, k), (m, k)))
        settings = {"scale_a": scale, "scale_b": scale, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        rate = 2 * n * k * m / run.seconds(lambda: product(a, b.t(), **settings), 10)
    except (RuntimeError, NotImplementedError) as error:
        yield row(f"matrix product {n}x{k}x{m}, float8", 0, "TFLOP/s", note=_first_line(error))
        return
    run.rates.float8 = max(run.rates.float8, rate)
    yield row(f"matrix product {n}x{k}x{m}, float8", rate / 1e12, "TFLOP/s", bound=run.rates.gemm / 1e12)


def _copies(run: Run) -> Iterator[Row]:
    num_bytes = 1 << (20 if run.is_toy else 31)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    run.rates.bandwidth = 2 * num_bytes / run.seconds(lambda: target.copy_(source), 10)
    yield row("copy on the device, read and written", run.rates.bandwidth / 1e9, "GB/s")
    for is_pinned in (False, True) if run.device.type == "cuda" else (False,):
        host = torch.empty(num_bytes >> 4, dtype=torch.uint8, pin_memory=is_pinned)
        part = target[: len(host)]
        rate = len(host) / run.seconds(partial(part.copy_, host, non_blocking=True))
        yield row(f"copy to the device, {'pinned' if is_pinned else 'pageable'}", rate / 1e9, "GB/s")


def _attention_rows(run: Run, tokens: int, keys: int) -> Iterator[Row]:
    heads, width = (2, 16) if run.is_toy else (HEADS, HEAD_DIM)
    q, k, v = (random(run, 1, heads, n, width) for n in (tokens, keys, keys))
    flops = 4 * heads * tokens * keys * width
    for name, backend in BACKENDS.items():
        if name == "math" and not run.is_toy:
            continue  # it would need 40 heads of scores in memory
        try:
            with sdpa_kernel(backend):
                rate = flops / run.seconds(partial(scaled_dot_product_attention, q, k, v), 5)
        except RuntimeError as error:
            yield row(f"attention {tokens}x{keys}, {name}", 0, "TFLOP/s", note=_first_line(error))
            continue
        run.rates.attention = max(run.rates.attention, rate)
        yield row(f"attention {tokens}x{keys}, {name}", rate / 1e12, "TFLOP/s", bound=run.rates.gemm / 1e12)


def _first_line(error: BaseException) -> str:
    return f"not available: {error}".splitlines()[0][:200]
