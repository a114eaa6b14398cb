"""Metrics of a checkpoint beyond held-out clips: recorded speech, drift in long sessions, and the cost of a block.

Axes: s samples at 16 kHz, f pixel frames, H W height and width of frames.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from tqdm import tqdm

from avatar.audio.whole_file import to_16khz
from avatar.vae.vae import HIDDEN_FRAMES
from training.data import AUDIO_RATE_HZ, FRAME_RATE_HZ
from training.eval.inference import Audio, Models, Pixels, SessionRenderer, pieces, until
from training.eval.metrics import Curve, Metric, correlation, distance, lag_metric, ratio_to_chance
from training.eval.readers.identity import Identity
from training.eval.readers.landmarks import Floats, Landmarks
from training.synthetic.motion.lips import loudness

# Blocks of MEDIA_S at the start and at the end of a session that drift compares.
END_BLOCKS = 10
# With more sessions, only the worst ratio is listed.
MAX_LISTED = 4
# A block costs less before the caches are full.
WARMUP_BLOCKS, TIMED_BLOCKS = 4, 8
# Media whose cost is reported, and the unit of a session's length, for blocks of every length.
MEDIA_S = 0.48
DTYPES = {"block_ms": torch.bfloat16, "block_ms_float32": torch.float32}


def to_mono_16k(samples: Floats, rate_hz: int) -> Audio:
    """Convert audio (channels, s) of any rate to one channel at 16 kHz, (s,)."""
    audio: Audio = to_16khz(torch.from_numpy(samples), rate_hz).numpy()
    return audio


def speech_metrics(openings: Sequence[Curve], audio: Audio) -> dict[str, Metric]:
    """Compare the mouth with loudness: the lag of highest correlation, and the correlation over that of chance.

    openings: (f,) each, of streams with this audio from frame HIDDEN_FRAMES on.
    """
    if not openings:
        return dict.fromkeys(("speech_lag_frames", "speech_ratio"), Metric(None, "no faces were found"))
    loud = [loudness(audio, len(opening) + HIDDEN_FRAMES)[HIDDEN_FRAMES:] for opening in openings]
    pairs = list(zip(openings, loud, strict=True))
    mean_r = np.mean([correlation(*pair) for pair in pairs])
    return {
        "speech_lag_frames": lag_metric(pairs),
        "speech_ratio": Metric(ratio_to_chance(pairs), f"r is {mean_r:.2f}"),
    }


@dataclass(frozen=True)
class LongSession:
    """Measurements of a long session.

    distances: of each block's colours from the reference. identity: distance of the embedding of the last blocks' faces
    from the reference's; None without faces or the packages to read them.
    """

    distances: list[float]
    identity: float | None = None


def blocks_of(num_media: int, block_frames: int) -> int:
    """Return the number of blocks in so many times MEDIA_S of media, rounded. block_frames: pixel frames of a block."""
    return round(num_media * MEDIA_S * FRAME_RATE_HZ / block_frames)


def long_session(
    models: Models,
    reference: Pixels,
    audio: Audio,
    num_blocks: int,
    deadline: float = math.inf,
    readers: tuple[Landmarks | None, Identity | None] = (None, None),
) -> LongSession:
    """Render a long session with repeated audio, and measure how far it leaves the reference.

    num_blocks: its length, in blocks of MEDIA_S. deadline: seconds of time.monotonic; after it no block is started,
    except those of the first 2 * END_BLOCKS.
    """
    num_blocks, ends = (blocks_of(each, models.block_frames) for each in (num_blocks, END_BLOCKS))
    block = models.block_samples
    *whole, _ = pieces(audio[: len(audio) // block * block], block)
    assert whole, "audio must fill a block"
    blocks = islice(SessionRenderer(models, reference).render(cycle(whole)), num_blocks)
    progress = tqdm(blocks, "long session", num_blocks, unit="block", mininterval=5)
    distances, last = [], deque[Pixels](maxlen=ends)
    for frames in until(progress, deadline, least=2 * ends):
        distances.append(distance(frames, reference))
        last.append(frames[-1])
    return LongSession(distances, identity_of(np.stack(last), reference, *readers))


def identity_of(
    frames: Pixels, reference: Pixels, landmarks: Landmarks | None, identity: Identity | None
) -> float | None:
    """Return the mean distance of the embeddings of frames (f, H, W, 3) from the reference's; None without faces."""
    if landmarks is None or identity is None:
        return None
    points = landmarks.points(np.concatenate([reference[None], frames]))
    own, *others = (identity.embed(*each) for each in zip([reference, *frames], points, strict=True))
    seen = [each for each in others if each is not None]
    return float(np.linalg.norm(np.stack(seen) - own, axis=1).mean()) if own is not None and seen else None


def session_metrics(sessions: Sequence[LongSession], block_frames: int) -> dict[str, Metric]:
    """Return drift, and the identity of the person who is least like their portrait at the end."""
    found = [each.identity for each in sessions if each.identity is not None]
    note = f"of {len(found)}, mean {np.mean(found):.2f}" if found else ""
    return {
        "drift_ratio": drift_metric([each.distances for each in sessions], block_frames),
        "session_identity": Metric(max(found), note) if found else Metric(None, "no embeddings"),
    }


def drift_metric(sessions: Sequence[Sequence[float]], block_frames: int) -> Metric:
    """Return the distance of the last blocks over that of the first, mean over sessions of distances per block."""
    num_blocks = min(map(len, sessions))
    ends = min(blocks_of(END_BLOCKS, block_frames), num_blocks // 2)
    if not ends:
        return Metric(None, "too short to drift")
    ratios = [float(np.mean(each[-ends:]) / np.mean(each[:ends])) for each in sessions]
    seconds = num_blocks * block_frames / FRAME_RATE_HZ
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios) if len(ratios) <= MAX_LISTED else f"worst {max(ratios):.2f}"
    return Metric(float(np.mean(ratios)), f"{num_blocks} blocks, {seconds:.0f} s of video, of {len(ratios)}: {listed}")


def block_cost(models: Models, reference: Pixels) -> Metric:
    """Return the CPU milliseconds of one thread for 480 ms of media: audio, all levels, decoding."""
    session = SessionRenderer(models, reference)
    num_samples = (WARMUP_BLOCKS + TIMED_BLOCKS) * models.block_samples + AUDIO_RATE_HZ
    noise = np.random.default_rng(0).normal(0, 0.1, num_samples)
    given = pieces(noise.astype(np.float32), models.block_samples)
    for _ in islice(session.render(given), WARMUP_BLOCKS + TIMED_BLOCKS):
        pass
    per_media = 1000 * MEDIA_S * FRAME_RATE_HZ / models.block_frames
    stages = {stage: per_media * float(np.median(costs[-TIMED_BLOCKS:])) for stage, costs in session.costs_s.items()}
    note = ", ".join(f"{stage} {cost:.0f}" for stage, cost in stages.items())
    return Metric(sum(stages.values()), f"{note}; processor time of one thread")
