"""What is asked of a checkpoint beside held-out clips: recorded speech, a long session, and what a block costs.

Axes: s samples at 16 kHz, f pixel frames, H W height and width of frames.
"""

import math
from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np
import torch
from tqdm import tqdm

from avatar.audio.whole_file import to_16khz
from avatar.types import BLOCK_FRAMES
from avatar.vae.vae import HIDDEN_FRAMES
from training.data import FRAME_RATE_HZ, SOUND_RATE_HZ
from training.eval.inference import BLOCK_SAMPLES, Models, Pixels, Rollout, Sound, pieces, until
from training.eval.landmarks import Floats
from training.eval.metrics import Curve, Figure, above_chance, correlation, distance, lag_figure
from training.synthetic.motion import loudness

# Blocks at either end of a session that drift compares.
ENDS = 10
# Sessions whose ratios are told one by one.
FEW = 4
# A block costs less before the caches are full.
WARMUP_BLOCKS, TIMED_BLOCKS = 4, 8
DTYPES = {"block_ms": torch.bfloat16, "block_ms_float32": torch.float32}


def sound_from(samples: Floats, rate_hz: int) -> Sound:
    """Sound (a, s) of any rate as one channel at 16 kHz, (s,)."""
    sound: Sound = to_16khz(torch.from_numpy(samples), rate_hz).numpy()
    return sound


def speech_figures(openings: Sequence[Curve], sound: Sound) -> dict[str, Figure]:
    """How lips that are open go with loudness: the lag at which they agree best, r at none, and r against chance.

    openings: (f,) each, of streams of this sound from frame HIDDEN_FRAMES on.
    """
    if not openings:
        return dict.fromkeys(("speech_lag_frames", "speech_ratio"), Figure(None, "no faces were read"))
    loud = [loudness(sound, len(opening) + HIDDEN_FRAMES)[HIDDEN_FRAMES:] for opening in openings]
    pairs = list(zip(openings, loud, strict=True))
    agreement = np.mean([correlation(*pair) for pair in pairs])
    return {
        "speech_lag_frames": lag_figure(pairs),
        "speech_ratio": Figure(above_chance(pairs), f"r is {agreement:.2f}"),
    }


def endure(models: Models, reference: Pixels, sound: Sound, num_blocks: int, deadline: float = math.inf) -> list[float]:
    """How far each block of a long session is from the reference; the sound is said again and again.

    deadline: no block but those of both ends is begun after it, seconds of time.monotonic.
    """
    *whole, _ = pieces(sound[: len(sound) // BLOCK_SAMPLES * BLOCK_SAMPLES])
    assert whole, "sound must fill a block"
    chunks = islice(Rollout(models, reference).speak(cycle(whole)), num_blocks)
    shown = tqdm(chunks, "long session", num_blocks, unit="block", mininterval=5)
    return [distance(chunk.frames.numpy(), reference) for chunk in until(shown, deadline, least=2 * ENDS)]


def drift_figure(sessions: Sequence[Sequence[float]]) -> Figure:
    """Distance in the last blocks by that in the first, mean over sessions of so many blocks' distances."""
    num_blocks = min(map(len, sessions))
    ends = min(ENDS, num_blocks // 2)
    if not ends:
        return Figure(None, "too short to drift")
    ratios = [float(np.mean(each[-ends:]) / np.mean(each[:ends])) for each in sessions]
    seconds = num_blocks * BLOCK_FRAMES / FRAME_RATE_HZ
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios) if len(ratios) <= FEW else f"worst {max(ratios):.2f}"
    return Figure(float(np.mean(ratios)), f"{num_blocks} blocks, {seconds:.0f} s of video, of {len(ratios)}: {each}")


def block_cost(models: Models, reference: Pixels) -> Figure:
    """Milliseconds of one thread that a block takes: sound, all levels, decoding."""
    rollout = Rollout(models, reference)
    noise = np.random.default_rng(0).normal(0, 0.1, (WARMUP_BLOCKS + TIMED_BLOCKS) * BLOCK_SAMPLES + SOUND_RATE_HZ)
    for _ in islice(rollout.speak(pieces(noise.astype(np.float32))), WARMUP_BLOCKS + TIMED_BLOCKS):
        pass
    stages = {stage: 1000 * float(np.median(costs[-TIMED_BLOCKS:])) for stage, costs in rollout.costs_s.items()}
    note = ", ".join(f"{stage} {cost:.0f}" for stage, cost in stages.items())
    return Figure(sum(stages.values()), f"{note}; processor time of one thread")
