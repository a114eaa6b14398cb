"""The network on a device: goldens, random weights, steps in each precision, memory, and a device's queue."""

import asyncio
import json
import statistics
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avatar.checkpoints.sizing import H100, STEP_OVERHEAD_S, Gpu, prefill_work, step_work
from avatar.denoiser.attention import reference_frame
from avatar.denoiser.cache import KVCache
from avatar.denoiser.config import NetworkConfig, base
from avatar.denoiser.denoiser import Denoiser, DenoiserState
from avatar.denoiser.model import Network
from avatar.types import Block, Conditions, Session
from benchmarks.one_device.phases import phase_times
from benchmarks.one_device.run import Run, fill
from benchmarks.row import Row, row

GOLDENS = Path(__file__).parents[2] / "tests/goldens"
# Relative RMS of bfloat16 to the recorded float32.
HALF_PRECISION = 2e-2
NUM_BLOCKS, NUM_CYCLES, MAX_SESSIONS = 8, 20, 64
# Targets on an H100 at 704x384, in ms.
EAGER_MS, COMPILED_MS, FLOAT8_MS, IDLE_SHARE = 300, 230, 185, 0.02
MOTION_LATENTS = 19


def config_of(run: Run) -> NetworkConfig:
    """Return the public network's configuration, or one of a few layers and toy widths."""
    if not run.is_toy:
        return base()
    return replace(
        base(),
        dim=48,
        num_heads=2,
        num_layers=2,
        ffn_dim=64,
        freq_dim=16,
        text_dim=16,
        text_len=8,
        audio_dim=16,
        num_encoder_layers=3,
        audio_inject_layers=(0,),
    )


def build(run: Run) -> Network:
    """Return the network in bfloat16 with random weights, made on the device."""
    with torch.device("meta"):
        network = Network(config_of(run)).bfloat16()
    network = network.to_empty(device=run.device).eval().requires_grad_(False)
    fill(network)
    return network


def goldens(run: Run) -> Iterator[Row]:
    """Yield the errors of the recorded run `dit_main` on the device, in float32 without TF32 and in bfloat16."""
    from safetensors.torch import load_file

    info = json.loads((GOLDENS / "dit_main.json").read_text(encoding="utf-8"))
    tensors = load_file(GOLDENS / "dit_main.safetensors")
    uses_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    limit = info["tolerance"]["velocity"]["rel_rms"]
    for dtype, at_most in ((torch.float32, limit), (torch.bfloat16, HALF_PRECISION)):
        error = max(_golden_errors(run, info, tensors, dtype))
        yield row(f"relative RMS to the goldens, {str(dtype)[6:]}", error, "", at_most=at_most)
    torch.backends.cuda.matmul.allow_tf32 = uses_tf32


def _golden_errors(run: Run, info: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> Iterator[float]:
    """Yield the relative RMS of each block's velocity."""
    frames, size = info["layout"]["frames_per_block"], (info["layout"]["latent_h"], info["layout"]["latent_w"])
    config = NetworkConfig.from_dict(info["config"])
    config = replace(config, num_frames_per_block=frames, window_latents=frames * config.window_blocks)
    network = Network(config)
    weights = {name.removeprefix("weights."): each for name, each in tensors.items() if name.startswith("weights.")}
    network.load_state_dict(weights)
    network = network.to(run.device, dtype).eval().requires_grad_(False)
    given = {name: each.to(run.device) for name, each in tensors.items() if name.startswith("in.")}
    for call in info["calls"]:
        if call["kind"] == "new_cache":
            ring = replace(config, window_latents=call["cache_blocks"] * frames)
            cache = KVCache(ring, *size, dtype=dtype, device=run.device)
        elif call["kind"] == "prefill":
            text = network.embed_text(given[call["context"]][None])
            cache.set_sink(network.prefill(given[call["ref"]], given[call["motion"]], text))
        elif call["kind"] == "block":
            first = call["start_frame"]
            cache.start_block(first // frames, reference_frame(first, call["relative_dist"]))
            audio = network.encode_audio(given[call["audio"]].unsqueeze(0))
            pose = given[call["cond_states"]].to(dtype)
            modulation = network.embed_time(given[call["t"]])
            x = given[call["x"]].to(dtype)[None]
            velocity = network(x, modulation, text, audio, pose, first, cache)[0].cpu().double()
            expected = tensors[call["velocity"]].double()
            yield float((velocity - expected).square().mean().sqrt() / expected.std(correction=0))


def weights(run: Run) -> Iterator[Row]:
    """Make the network that later sections use; yield its time and bytes."""
    started_s = time.perf_counter()
    run.network = build(run)
    run.synchronize()
    yield row("random weights made on the device", time.perf_counter() - started_s, "s")
    num_bytes = sum(each.nbytes for each in run.network.state_dict().values())
    yield row("weights", num_bytes / 1e9, "GB")
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.device)
        yield row("peak memory while they were made", peak / 1e9, "GB", bound=num_bytes / 1e9)


class Stream:
    """One session's stream through levels: blocks of noise as audio and latents.

    levels: of one network. size: (height, width) of latents.
    """

    def __init__(self, run: Run, levels: list[Denoiser], size: tuple[int, int], name: str = "gpu") -> None:
        config = levels[0].config
        self.run, self.levels, self.config = run, levels, config
        generator = torch.Generator().manual_seed(0)
        shape = (config.num_encoder_layers, config.audio_dim, config.frames_per_block)
        self.features = torch.randn(shape, generator=generator)
        self.latent = torch.randn(config.in_dim, config.num_frames_per_block, *size, generator=generator)
        motion = torch.randn(config.in_dim, MOTION_LATENTS, *size, generator=generator)
        self.session = Session(name, 0, motion)
        self.conditions = Conditions(
            0, motion[:, :1], torch.randn(min(20, config.text_len), config.text_dim, generator=generator)
        )
        self.states: list[DenoiserState] = [level.open(self.session) for level in levels]
        self.latest: Tensor | None = None

    def block(self, index: int) -> Block:
        return Block(index, self.features, self.latent, self.conditions)

    def step(self, index: int) -> Tensor:
        """Return a block's latent after all levels, on the host."""
        block = self.block(index)
        for level, state in zip(self.levels, self.states, strict=True):
            block = level.step(block, state)
        assert block.latent is not None
        return block.latent.cpu()

    def times(self, num_blocks: int) -> list[float]:
        """Return the seconds of each of the next blocks."""
        found = []
        for index in range(num_blocks):
            self.run.synchronize()
            started_s = time.perf_counter()
            self.latest = self.step(index)
            found.append(time.perf_counter() - started_s)
        return found


def measured(run: Run) -> Gpu | None:
    """Return the rates of this run as a device for the estimates; None if some are missing."""
    if not run.rates.are_known:
        return None
    rates = run.rates
    return Gpu("measured", rates.bandwidth, rates.gemm, rates.float8 or H100.float8, rates.attention)


def step_ceiling_ms(run: Run, size: tuple[int, int], *, compiled: bool = False, float8: bool = False) -> float | None:
    """Return the least time of a step by counts and this run's rates."""
    gpu = measured(run)
    work = step_work(config_of(run), *size, compiled=compiled)
    return None if gpu is None else 1000 * (work.seconds(gpu, float8=float8) + STEP_OVERHEAD_S)


def step_rows(run: Run, name: str, target_ms: float | None, **speed: bool) -> Iterator[Row]:
    """Yield the time of a step with a full window, and of the blocks before it."""
    size, level = run.sizes[0], Denoiser(run.network, run.network.config, 1)
    stream = Stream(run, [level], size)
    times = stream.times(NUM_BLOCKS)
    full_ms = 1000 * statistics.median(times[level.config.window_blocks :])
    growing = ", ".join(f"{1000 * each:.0f}" for each in times)
    ceiling = step_ceiling_ms(run, size, **speed)
    yield row(f"step, {name}", full_ms, "ms", at_most=target_ms, bound=ceiling, note=f"blocks: {growing} ms")
    assert stream.latest is not None
    run.latents.append(stream.latest)


def eager(run: Run) -> Iterator[Row]:
    """Yield the time of an eager step, of prefill, of a step's phases, and of the kernels of one block."""
    yield from step_rows(run, "eager", EAGER_MS)
    network, size = run.network, run.sizes[0]
    stream = Stream(run, [Denoiser(network, network.config, 1)], size)
    reference = stream.conditions.sink.to(run.device).unsqueeze(0)
    motion = stream.session.motion.to(run.device).unsqueeze(0)
    text = network.embed_text(stream.conditions.text.to(run.device).unsqueeze(0))
    gpu = measured(run)
    ceiling = None if gpu is None else 1000 * prefill_work(config_of(run), *size).seconds(gpu)
    seconds = run.seconds(lambda: network.prefill(reference, motion, text))
    yield row("prefill", 1000 * seconds, "ms", bound=ceiling)
    rows = stream.conditions.text.to(run.device).unsqueeze(0)
    yield row("keys and values of a text", 1000 * run.seconds(lambda: network.embed_text(rows)), "ms")
    features = stream.features.to(run.device)[None, None]
    yield row("audio tokens of a block", 1000 * run.seconds(lambda: network.encode_audio(features)), "ms")
    stream.times(network.config.window_blocks + 2)
    yield from _phases(run, stream)
    yield from _profile(run, stream)


def _phases(run: Run, stream: Stream) -> Iterator[Row]:
    """Yield the time of each phase of a step with a full window, beside that of the whole step."""
    (level,), (state,) = stream.levels, stream.states
    times = phase_times(run, level, stream.block(stream.config.window_blocks + 2), state)
    for name, seconds in times.items():
        yield row(f"phase of a step: {name}", 1000 * seconds, "ms", bound=1000 * times["all"])


def _profile(run: Run, stream: Stream) -> Iterator[Row]:
    """Yield the idle share and the slowest kernels of one block."""
    from torch.profiler import ProfilerActivity, profile

    is_cuda = run.device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    index = stream.config.window_blocks + 3
    run.synchronize()
    with profile(activities=[activity]) as profiled:
        stream.step(index)
        run.synchronize()
    kernels = [event for event in profiled.events() if not is_cuda or event.device_type.name == "CUDA"]
    if not kernels:
        yield row("kernels of a block", 0, "", note="the profiler has seen none")
        return
    first, last = (
        pick(getattr(each.time_range, side) for each in kernels) for pick, side in ((min, "start"), (max, "end"))
    )
    spent: dict[str, float] = {}
    for each in kernels:
        spent[each.name] = spent.get(each.name, 0.0) + each.time_range.elapsed_us()
    busy = sum(spent.values())
    yield row("kernels of a block", len(kernels), "")
    yield row("share of a block that the device is idle", max(0.0, 1 - busy / (last - first)), "", at_most=IDLE_SHARE)
    for name, us in sorted(spent.items(), key=lambda each: -each[1])[:8]:
        yield row(f"kernel {name[:45]}", us / 1000, "ms", bound=busy / 1000)
    attention = sorted(name for name in spent if any(part in name.lower() for part in ("flash", "fmha", "attention")))
    yield row("attention kernels", len(attention), "", note="; ".join(attention)[:300])


def memory(run: Run) -> Iterator[Row]:
    """Yield how many sessions open before the device refuses, and whether memory is flat over cycles of mixed sizes."""
    if run.device.type != "cuda":
        yield row("states of a level that open", 0, "", note="only CUDA refuses")
        return
    size = run.sizes[0]
    level = Denoiser(run.network, run.network.config, 1)
    states: list[Any] = []
    before = torch.cuda.memory_allocated(run.device)
    free, _ = torch.cuda.mem_get_info(run.device)
    refusal = "no refusal"
    session = Session("memory", 0, torch.zeros(16, MOTION_LATENTS, *size))
    while len(states) < MAX_SESSIONS:
        try:
            states.append(level.open(replace(session, id=f"memory-{len(states)}")))
        except torch.OutOfMemoryError:
            refusal = "OutOfMemoryError"
            break
    taken = torch.cuda.memory_allocated(run.device) - before
    each_gb = taken / max(1, len(states)) / 1e9
    yield row("states of a level that open", len(states), "", bound=free / 1e9 / each_gb, note=f"then {refusal}")
    yield row("memory of a session and level", each_gb, "GB")
    states.clear()
    run.free()
    yield row("memory left after they are closed", (torch.cuda.memory_allocated(run.device) - before) / 1e9, "GB")
    reserved = []
    for cycle in range(NUM_CYCLES):
        held = [
            level.open(Session(f"{cycle}-{number}", 0, torch.zeros(16, MOTION_LATENTS, *run.sizes[number % 3])))
            for number in (cycle, cycle + 1)
        ]
        del held
        reserved.append(torch.cuda.memory_reserved(run.device))
    growth = (reserved[-1] - reserved[2]) / 1e9
    yield row("growth of reserved memory over 20 cycles of mixed sizes", growth, "GB", at_most=0.1)


def sizes(run: Run) -> Iterator[Row]:
    """Yield the time of an eager step at the smaller sizes, and the frames a second of all levels on this device."""
    for height, width in run.sizes[1:]:
        stream = Stream(run, [Denoiser(run.network, run.network.config, 1)], (height, width))
        step_s = statistics.median(stream.times(NUM_BLOCKS)[stream.config.window_blocks :])
        name = f"{8 * width}x{8 * height}"
        ceiling = step_ceiling_ms(run, (height, width))
        yield row(f"step at {name}, eager", 1000 * step_s, "ms", bound=ceiling)
        decoding_s = run.decoding_s.get((height, width), 0.0)
        rate = stream.config.frames_per_block / (stream.config.num_levels * step_s + decoding_s)
        note = "" if decoding_s else "without decoding, which was not measured"
        yield row(f"frames a second at {name}, all levels and decoder", rate, "Hz", at_least=25, note=note)


def queue(run: Run) -> Iterator[Row]:
    """Yield the interval of blocks of two sessions through four levels on one queue, and the queue's idle share."""
    from avatar.runtime.device_queue import DeviceQueue
    from avatar.runtime.pipeline import StreamUsage, local

    size, config = run.sizes[-1], run.network.config
    levels = [Denoiser(run.network, config, level) for level in range(config.num_levels)]
    steps: list[tuple[int, int]] = []
    ends: list[list[float]] = [[], []]

    class Recording(StreamUsage):
        def add_step(self, start_ns: int, end_ns: int, waited_s: float | None = None) -> None:
            super().add_step(start_ns, end_ns, waited_s)
            steps.append((start_ns, end_ns))

    async def stream(number: int, device: DeviceQueue) -> None:
        given = Stream(run, levels, size, f"queue-{number}")
        given.states.clear()  # the stages open their own

        async def blocks() -> AsyncGenerator[Block, None]:
            for index in range(NUM_BLOCKS):
                yield given.block(index)

        items: Any = blocks()
        for level in levels:
            items = local(level, given.session, device, Recording(), then=_on_host)(items)
        async for _ in items:
            ends[number].append(time.perf_counter())

    async def both() -> None:
        with DeviceQueue(run.synchronize) as device:
            async with asyncio.TaskGroup() as tasks:
                for number in range(2):
                    tasks.create_task(stream(number, device))

    asyncio.run(both())
    # From the middle on both windows are full, and both sessions have blocks at every level.
    intervals = [later - earlier for each in ends for earlier, later in pairwise(each[NUM_BLOCKS // 2 :])]
    ceiling = step_ceiling_ms(run, size)
    yield row(
        "interval of blocks of two sessions on four levels",
        1000 * statistics.median(intervals),
        "ms",
        bound=ceiling and 2 * config.num_levels * ceiling,
    )
    steps.sort()
    steady = steps[len(steps) // 4 : -len(steps) // 4]
    busy_ns = sum(end - start for start, end in steady)
    idle = max(0.0, 1 - busy_ns / (steady[-1][1] - steady[0][0]))
    yield row("share of the time that the queue is idle", idle, "", at_most=IDLE_SHARE)


def _on_host(block: Block) -> Block:
    assert block.latent is not None
    return replace(block, latent=block.latent.cpu())


def compiled(run: Run) -> Iterator[Row]:
    """Compile the network's layers; yield the time to warm up, recompilations, a step, and its distance from eager."""
    from avatar.denoiser.speed import compile_layers

    compile_layers(run.network)
    yield from _compiled_rows(run, "compiled", COMPILED_MS, compiled=True)
    if len(run.latents) > 1:
        first, second = (each.double() for each in run.latents[:2])
        distance = float((first - second).square().mean().sqrt() / first.std())
        yield row("relative RMS of compiled to eager", distance, "", at_most=HALF_PRECISION)


def float8(run: Run) -> Iterator[Row]:
    """Quantise the network to float8; yield the time of a step, eager and compiled."""
    from avatar.denoiser.speed import compile_layers, use_float8

    run.network = None
    run.free()
    run.network = build(run)
    use_float8(run.network)
    yield from step_rows(run, "float8, eager", None, float8=True)
    compile_layers(run.network)
    yield from _compiled_rows(run, "float8, compiled", FLOAT8_MS, compiled=True, float8=True)


def _compiled_rows(run: Run, name: str, target_ms: float, **speed: bool) -> Iterator[Row]:
    level = Denoiser(run.network, run.network.config, 1)
    started_s = time.perf_counter()
    level.warm(*run.sizes[0])
    yield row(f"time to compile and warm up, {name}", time.perf_counter() - started_s, "s")
    with torch.compiler.set_stance("fail_on_recompile"):
        yield from step_rows(run, name, target_ms, **speed)
    yield row(f"recompilations after it, {name}", 0, "", at_most=0, note="one would have ended this section")
