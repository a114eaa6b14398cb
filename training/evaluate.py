"""Evaluate a checkpoint: `python -m training.evaluate CHECKPOINT --data runs/data` prints one table of metrics.

Held-out people speak held-out sentences through the library and are compared with their true frames. With
`--speech FILE --portrait FILE` any person speaks any audio, and the table has only the metrics that were measured,
none of which needs a truth. Without these options, a metric without a value says why. `--json FILE` writes all metrics
as they become available.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from avatar.checkpoints.files import is_native
from avatar.media import read_audio
from training.data import StoredClip, read_clips
from training.eval import inference
from training.eval.codec_bound import codec_metrics
from training.eval.contact_sheets import save_sheet
from training.eval.held_out import ClipScores, held_out_metrics, mismatched_sync, render_clip, render_speech, score
from training.eval.identity import Identity
from training.eval.inference import Pixels, until
from training.eval.landmarks import Landmarks
from training.eval.metrics import Metric, distance
from training.eval.robustness import (
    DTYPES,
    block_cost,
    drift_metric,
    long_session_distances,
    speech_metrics,
    to_mono_16k,
)

SPEECH = Path(__file__).parents[1] / "assets" / "speech.wav"
HOUR_BLOCKS = 7500
# People who speak the recording.
NUM_SPEAKERS = 3
NEEDS_TRUTH = (
    *("lip_sync_r", "lip_sync_r_other", "best_lag_frames", "mouth_amplitude", "head_motion", "flicker"),
    *("codec_psnr", "codec_psnr_mouth", "codec_lip_sync_r", "codec_mouth_amplitude", "codec_edge_energy"),
    "codec_flicker",
)
PREVIEW_ROWS, PREVIEW_COLUMNS = 12, 10
NOT_MEASURED = Metric(None, "not measured yet")
Tool = TypeVar("Tool")


@dataclass(frozen=True)
class Row:
    """A line of the table. decimals: as printed. low, high: acceptable bounds."""

    key: str
    label: str
    decimals: int
    target: str = ""
    low: float = -np.inf
    high: float = np.inf


TABLE = (
    Row("lip_sync_r", "lip sync r, mouth against the true jaw", 2, ".75", low=0.6),
    Row("lip_sync_r_other", "the same with another clip's audio", 2, "below .10", high=0.15),
    Row("best_lag_frames", "best lag, frames (positive: late)", 0, "0", -1, 1),
    Row("mouth_amplitude", "mouth amplitude / truth", 2, ".9 to 1.1", 0.8, 1.25),
    Row("head_motion", "head motion / truth", 2),
    Row("edge_energy", "edge energy / truth", 2, ".9 to 1.1", 0.8, 1.25),
    Row("sharpness", "sharpness / truth", 2),
    Row("flicker", "second differences in time / truth", 2),
    Row("background_db", "still background, frame to frame, dB", 1, "no mottling", low=40),
    Row("codec_psnr", "codec, PSNR, dB", 1, "36", low=34),
    Row("codec_psnr_mouth", "codec, PSNR around the lips, dB", 1, "33", low=31),
    Row("codec_lip_sync_r", "codec, lip sync r", 2),
    Row("codec_mouth_amplitude", "codec, mouth amplitude / truth", 2),
    Row("codec_edge_energy", "codec, edge energy / truth", 2),
    Row("codec_flicker", "codec, second differences / truth", 2),
    Row("face_found", "frames with a face", 4, ".999", low=0.99),
    Row("identity_distance", "identity, embedding to the reference", 2),
    Row("drift_ratio", "drift, last 10 blocks / first 10", 2, "1.0", high=1.1),
    Row("speech_lag_frames", "recorded speech: lag to loudness, frames", 0, "0", -1, 1),
    Row("speech_ratio", "recorded speech: r / shifted audio's", 1, "3", low=2),
    Row("block_ms", "480 ms of media, bfloat16, ms", 0, "375", high=480),
    Row("block_ms_float32", "480 ms of media, float32, ms", 0),
    Row("levels", "denoising levels", 0),
)


@dataclass(frozen=True)
class Extent:
    """Size of an evaluation.

    clips: held-out clips. others: of those, clips that are also rendered with another clip's audio. people, blocks:
    number and length of long sessions. session_s: time limit of a long session. at_a_time: long sessions in parallel.
    limit_s: time limit of the clips; on a busy machine fewer of them are evaluated. levels: how many to run of
    those that the checkpoint was trained for; None: all.
    """

    clips: int
    others: int
    people: int
    blocks: int
    limit_s: float | None = None
    session_s: float | None = None
    at_a_time: int = 1
    levels: int | None = None

    def deadline(self, share: float) -> float:
        """Return the time at which a share of limit_s is over, seconds of time.monotonic."""
        return math.inf if self.limit_s is None else time.monotonic() + share * self.limit_s

    def session_deadline(self) -> float:
        """Return the deadline of a long session that starts now."""
        return self.deadline(0.15) if self.session_s is None else time.monotonic() + self.session_s


FULL = Extent(clips=50, others=50, people=3, blocks=250)
# Recorded speech and the cost of a block are not cut short; they take the rest of five minutes.
QUICK = Extent(clips=12, others=6, people=1, blocks=30, limit_s=180)


def available(tool: Callable[[], Tool]) -> Tool | None:
    """Return the tool, or None if its packages are missing."""
    try:
        return tool()
    except ModuleNotFoundError:
        return None


def evenly_spaced(items: Sequence[Any], count: int) -> list[Any]:
    """Select at most `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def evaluate_held_out(
    checkpoint: Path, clips: Sequence[StoredClip], extent: Extent, sheet: Path | None
) -> Iterator[dict[str, Metric]]:
    """Yield the metrics of the table as they become available. clips: the whole held-out set.

    sheet: PNG for true and rendered frames of the first clips.
    """
    models = inference.load(checkpoint, levels=extent.levels)
    landmarks, identity = available(Landmarks), available(Identity)
    yield levels_metric(models)
    chosen: list[StoredClip] = evenly_spaced(clips, extent.clips)
    scores: list[ClipScores] = []
    rows: list[Pixels] = []
    for clip in until(tqdm(chosen, "held-out clips", unit="clip", mininterval=5), extent.deadline(0.5)):
        rendered = render_clip(models, clip)
        scores.append(score(rendered, landmarks, identity))
        if len(rows) < PREVIEW_ROWS:
            rows += [
                np.stack(evenly_spaced(list(frames), PREVIEW_COLUMNS)) for frames in (rendered.truth, rendered.rendered)
            ]
    if sheet is not None:
        save_sheet(sheet, [rearrange(torch.from_numpy(row), "n h w c -> n c h w") / 127.5 - 1 for row in rows])
    yield held_out_metrics(scores)
    chosen = chosen[: len(scores)]
    others = chosen[: extent.others], scores[: extent.others]
    yield {"lip_sync_r_other": mismatched_sync(models, *others, landmarks, extent.deadline(0.2))}
    yield codec_metrics(models, chosen, landmarks, extent.deadline(0.15))
    people = [models.picture(np.array(clip.array("reference"))) for clip in evenly_spaced(clips, extent.people)]
    audio = to_mono_16k(*read_audio(SPEECH))
    speeches = [score(render_speech(models, person, audio), landmarks) for person in people[:NUM_SPEAKERS]]
    yield speech_metrics([each.openings[0] for each in speeches if each.openings is not None], audio)
    yield cost_metrics(checkpoint, people[0], extent.levels)
    sessions: list[list[float]] = []
    for session in long_sessions(checkpoint, people, extent):
        sessions.append(session)
        yield {"drift_ratio": drift_metric(sessions, models.block_frames)}


def long_sessions(checkpoint: Path, people: Sequence[Pixels], extent: Extent) -> Iterator[list[float]]:
    """Yield the distances from the reference of the blocks of each person's long session."""
    sessions = [(checkpoint, person, extent) for person in people]
    if extent.at_a_time == 1:
        yield from (_long_session(*session) for session in sessions)
        return
    # Not forked from this process, which has threads of torch. The server loads torch once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.evaluate"])
    with ProcessPoolExecutor(extent.at_a_time, context) as pool:
        yield from pool.map(_long_session, *zip(*sessions, strict=True))


def _long_session(checkpoint: Path, person: Pixels, extent: Extent) -> list[float]:
    torch.set_num_threads(1)
    audio = to_mono_16k(*read_audio(SPEECH))
    models = inference.load(checkpoint, levels=extent.levels)
    return long_session_distances(models, person, audio, extent.blocks, extent.session_deadline())


def levels_metric(models: inference.Models) -> dict[str, Metric]:
    """Return the number of levels that run, and which of the trained ones they are."""
    return {"levels": Metric(models.config.num_levels, models.config.levels_text)}


def evaluate_any(checkpoint: Path, speech: Path, portrait: Path, levels: int | None = None) -> dict[str, Metric]:
    """Return the metrics that need no truth, of a person who speaks any audio. levels: as in `Extent`."""
    models = inference.load(checkpoint, levels=levels)
    reference = models.vae.read_picture(portrait.read_bytes()).rgb.numpy()
    audio = to_mono_16k(*read_audio(speech))
    rendered = render_speech(models, reference, audio)
    scores = score(rendered, available(Landmarks), available(Identity))
    metrics = held_out_metrics([scores])
    against_portrait = {name: metrics[name] for name in ("edge_energy", "sharpness", "identity_distance")}
    frames = rendered.rendered
    num_frames = models.block_frames
    blocks = [frames[start : start + num_frames] for start in range(0, len(frames), num_frames)]
    return {
        **metrics,
        **{
            name: Metric(each.value, "against the portrait")
            for name, each in against_portrait.items()
            if each.value is not None
        },
        **{name: Metric(None, "needs a held-out clip") for name in NEEDS_TRUTH},
        **speech_metrics([scores.openings[0]] if scores.openings is not None else [], audio),
        "drift_ratio": drift_metric([[distance(block, reference) for block in blocks]], num_frames),
        **cost_metrics(checkpoint, reference, levels),
        **levels_metric(models),
    }


def cost_metrics(checkpoint: Path, person: Pixels, levels: int | None = None) -> dict[str, Metric]:
    """Return the cost of media in each precision. float32 replaces one that the processor has no instructions for."""
    costs: dict[torch.dtype, Metric] = {}
    metrics = {}
    for name, asked in DTYPES.items():
        dtype = asked if is_native(asked, torch.device("cpu")) else torch.float32
        if dtype not in costs:
            costs[dtype] = block_cost(inference.load(checkpoint, dtype, levels), person)
        cost = costs[dtype]
        metrics[name] = cost if dtype == asked else replace(cost, note=f"in float32, no {asked} here; {cost.note}")
    return metrics


def table(metrics: Mapping[str, Metric]) -> str:
    """Format the metrics that are given, one per line, with their targets; `!` marks values out of bounds."""
    lines = [f"{'':42} {'measured':>9}  {'target':12} remarks"]
    for row in TABLE:
        if (metric := metrics.get(row.key)) is None:
            continue
        value = "-" if metric.value is None else f"{metric.value:.{row.decimals}f}"
        mark = " " if metric.value is None or row.low <= metric.value <= row.high else "!"
        lines.append(f"{row.label:42} {value:>9}{mark} {row.target:12} {metric.note}".rstrip())
    return "\n".join(lines)


def write_json(path: Path, metrics: Mapping[str, Metric], about: Mapping[str, Any]) -> None:
    """Write the metrics by key, null without a value, and the remarks under `notes`."""
    values = {row.key: metrics[row.key].value for row in TABLE}
    notes = {row.key: metrics[row.key].note for row in TABLE if metrics[row.key].note}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**values, "notes": notes, **about}, indent=2) + "\n", encoding="utf-8")


def extent_of(flags: argparse.Namespace, num_people: int) -> Extent:
    """Return the size that the flags request. ValueError if --people is neither a number nor `all`."""
    extent = QUICK if flags.quick else FULL
    if flags.clips is not None:
        extent = replace(extent, clips=flags.clips)
    if flags.hour:
        extent = replace(extent, people=2, blocks=HOUR_BLOCKS)
    if flags.people is not None:
        extent = replace(extent, people=num_people if flags.people == "all" else int(flags.people))
    extent = replace(extent, levels=flags.levels)
    if flags.at_a_time is not None:
        extent = replace(extent, at_a_time=flags.at_a_time)
    if flags.minutes is not None:
        rounds = -(-min(extent.people, num_people) // extent.at_a_time)
        extent = replace(extent, session_s=60 * flags.minutes / rounds)
    return extent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=(__doc__ or "").split(":")[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="shards that training.make_data wrote")
    parser.add_argument("--quick", action="store_true", help="fewer clips and shorter sessions: under five minutes")
    parser.add_argument("--clips", type=int, help=f"held-out clips (default {FULL.clips})")
    parser.add_argument("--people", help="number of held-out people with long sessions, or `all`")
    parser.add_argument("--hour", action="store_true", help=f"long sessions of {HOUR_BLOCKS} blocks, of two people")
    parser.add_argument("--at-a-time", type=int, help="long sessions in parallel, a core each (default 1)")
    parser.add_argument("--minutes", type=float, help="time limit of all long sessions together")
    parser.add_argument("--levels", type=int, help="fewer levels than the checkpoint was trained for")
    parser.add_argument("--speech", type=Path, help="audio for --portrait to speak, in place of held-out clips")
    parser.add_argument("--portrait", type=Path, help="a PNG, JPEG or WebP picture of a person")
    parser.add_argument("--json", type=Path, help="also write the metrics to this file")
    parser.add_argument("--sheet", type=Path, help="write true and rendered frames, row by row, to this PNG")
    flags = parser.parse_args()
    if (flags.speech is None) != (flags.portrait is None):
        parser.error("--speech and --portrait go together")
    torch.set_num_threads(1)
    metrics = {row.key: NOT_MEASURED for row in TABLE}
    try:
        about, measured = evaluate(flags)
        for new in measured:
            metrics |= new
            if flags.json is not None:
                write_json(flags.json, metrics, {"checkpoint": str(flags.checkpoint), **about})
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if flags.speech is not None:
        metrics = {key: metric for key, metric in metrics.items() if metric.value is not None}
    print(table(metrics))


def evaluate(flags: argparse.Namespace) -> tuple[dict[str, Any], Iterable[dict[str, Metric]]]:
    """Evaluate as the flags request: return the parameters, and the metrics. ValueError or OSError if files are bad."""
    if flags.speech is not None:
        about = {"speech": str(flags.speech), "portrait": str(flags.portrait)}
        return about, [evaluate_any(flags.checkpoint, flags.speech, flags.portrait, flags.levels)]
    clips = read_clips(flags.data, "held_out")
    extent = extent_of(flags, len(clips))
    return asdict(extent), evaluate_held_out(flags.checkpoint, clips, extent, flags.sheet)


if __name__ == "__main__":
    main()
