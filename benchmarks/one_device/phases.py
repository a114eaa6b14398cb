"""Times of a step's phases, by events in the device's own order of work: CUDA events, or a clock on the CPU."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from avatar.denoiser.denoiser import Denoiser, DenoiserState
from avatar.types import Block
from benchmarks.one_device.run import Run

Marks = dict[str, list[tuple[Any, Any]]]


def phase_methods(level: Denoiser, state: DenoiserState) -> Iterator[tuple[str, Any, str]]:
    """Yield each phase's name, with the object and the method that compute it; a phase has several."""
    network = level.network
    yield "inputs, waited for", level._uploader, "wait"
    yield "audio tokens", network, "encode_audio"
    yield "cache: reference moved", state.cache, "start_block"
    yield "cache: keys and values written", state.cache, "extend"
    for layer in network.layers:
        yield "projections and RoPE", layer, "project"
        yield "self-attention and its output", layer.self_attn, "forward"
        yield "attention to text", layer, "attend_to_text"
        yield "feed-forward network", layer.ffn, "forward"
    yield "audio injections", network.audio_injector, "forward"
    yield "head", network.head, "forward"


def phase_times(run: Run, level: Denoiser, block: Block, state: DenoiserState) -> dict[str, float]:
    """Return the seconds of each phase of a block's step, of `all` of it, and of the `rest` between them.

    The network must not be compiled: its layers are then one function each.
    """
    marks: Marks = defaultdict(list)
    with ExitStack() as restoring:
        for name, owner, method in phase_methods(level, state):
            setattr(owner, method, partial(_marked, run, marks[name], getattr(owner, method)))
            restoring.callback(delattr, owner, method)
        _marked(run, marks["all"], level.step, block, state)
    run.synchronize()
    found = {name: sum(run.seconds_between(*pair) for pair in pairs) for name, pairs in marks.items()}
    return {**found, "rest": 2 * found["all"] - sum(found.values())}


def _marked(run: Run, pairs: list[tuple[Any, Any]], work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call work between two marks."""
    before = run.mark()
    result = work(*arguments, **options)
    pairs.append((before, run.mark()))
    return result
