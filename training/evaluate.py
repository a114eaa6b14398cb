"""Evaluate a checkpoint: `python -m training.evaluate CHECKPOINT --data runs/data` prints one table of metrics.

Held-out people speak held-out sentences through the library and are compared with their true frames. Held-out clips
guide choices; those of `--test` are for the last evaluation of weights that ship. With
`--speech FILE --portrait FILE` any person speaks any audio, and the table has only the metrics that were measured,
none of which needs a truth. Without these options, a metric without a value says why. `--json FILE` writes all metrics
as they become available.
"""

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from training.eval.held_out import ClipScores, held_out_metrics, render_clip, render_speech, score
from training.eval.inference import Pixels, until
from training.eval.metrics import Metric, distance
from training.eval.readers.eyes import EyeReader
from training.eval.readers.identity import Identity
from training.eval.readers.landmarks import Landmarks
from training.eval.robustness import (
    DTYPES,
    LongSession,
    block_cost,
    drift_metric,
    long_session,
    session_metrics,
    speech_metrics,
    to_mono_16k,
)
from training.eval.table import NEEDS_TRUTH, TABLE, table, write_json
from training.eval.variations import with_other_audio, with_seeds, without_the_other

SPEECH = Path(__file__).parents[1] / "assets" / "speech.wav"
HOUR_BLOCKS = 7500
# People who speak the recording.
NUM_SPEAKERS = 3
PREVIEW_ROWS, PREVIEW_COLUMNS = 12, 10
NOT_MEASURED = Metric(None, "not measured yet")
Tool = TypeVar("Tool")


@dataclass(frozen=True)
class Extent:
    """Size of an evaluation.

    clips: held-out clips. others: of those, clips that are also rendered with another clip's audio. people, blocks:
    number of long sessions, and their length in blocks of 480 ms. session_s: time limit of a long session. at_a_time:
    long sessions in parallel. limit_s: time limit of the clips; on a busy machine fewer of them are evaluated. levels:
    how many to run of those that the checkpoint was trained for; None: all. seeds: with which clips are rendered.
    eye_reader: its file.
    """

    clips: int
    others: int
    people: int
    blocks: int
    limit_s: float | None = None
    session_s: float | None = None
    at_a_time: int = 1
    levels: int | None = None
    seeds: int = 1
    eye_reader: Path | None = None

    def deadline(self, share: float) -> float:
        """Return the time at which a share of limit_s is over, seconds of time.monotonic."""
        return math.inf if self.limit_s is None else time.monotonic() + share * self.limit_s

    def session_deadline(self) -> float:
        """Return the deadline of a long session that starts now."""
        return self.deadline(0.15) if self.session_s is None else time.monotonic() + self.session_s


FULL = Extent(clips=50, others=50, people=3, blocks=250, seeds=3)
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
    eyes = EyeReader.load(extent.eye_reader) if extent.eye_reader else None
    yield levels_metric(models)
    chosen: list[StoredClip] = evenly_spaced(clips, extent.clips)
    scores: list[ClipScores] = []
    rows: list[Pixels] = []
    for clip in until(tqdm(chosen, "held-out clips", unit="clip", mininterval=5), extent.deadline(0.5)):
        rendered = render_clip(models, clip)
        scores.append(score(rendered, landmarks, identity, eyes))
        if len(rows) < PREVIEW_ROWS:
            rows += [
                np.stack(evenly_spaced(list(frames), PREVIEW_COLUMNS)) for frames in (rendered.truth, rendered.rendered)
            ]
    if sheet is not None:
        save_sheet(sheet, [rearrange(torch.from_numpy(row), "n h w c -> n c h w") / 127.5 - 1 for row in rows])
    yield held_out_metrics(scores)
    chosen = chosen[: len(scores)]
    others = chosen[: extent.others], scores[: extent.others]
    yield with_other_audio(models, *others, landmarks, eyes, extent.deadline(0.2))
    yield {"overlap_r_change": without_the_other(models, *others, landmarks)}
    yield with_seeds(models, *others, landmarks, extent.seeds, extent.deadline(0.2))
    yield codec_metrics(models, chosen, landmarks, extent.deadline(0.15))
    people = [models.picture(np.array(clip.array("reference"))) for clip in evenly_spaced(clips, extent.people)]
    audio = to_mono_16k(*read_audio(SPEECH))
    speeches = [score(render_speech(models, person, audio), landmarks) for person in people[:NUM_SPEAKERS]]
    yield speech_metrics([each.openings[0] for each in speeches if each.openings is not None], audio)
    yield cost_metrics(checkpoint, people[0], extent.levels)
    sessions: list[LongSession] = []
    for session in long_sessions(checkpoint, people, extent):
        sessions.append(session)
        yield session_metrics(sessions, models.block_frames)


def long_sessions(checkpoint: Path, people: Sequence[Pixels], extent: Extent) -> Iterator[LongSession]:
    """Yield the measurements of each person's long session."""
    sessions = [(checkpoint, person, extent) for person in people]
    if extent.at_a_time == 1:
        yield from (_long_session(*session) for session in sessions)
        return
    # Not forked from this process, which has threads of torch. The server loads torch once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.evaluate"])
    with ProcessPoolExecutor(extent.at_a_time, context) as pool:
        yield from pool.map(_long_session, *zip(*sessions, strict=True))


def _long_session(checkpoint: Path, person: Pixels, extent: Extent) -> LongSession:
    torch.set_num_threads(1)
    audio = to_mono_16k(*read_audio(SPEECH))
    models = inference.load(checkpoint, levels=extent.levels)
    readers = available(Landmarks), available(Identity)
    return long_session(models, person, audio, extent.blocks, extent.session_deadline(), readers)


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


def extent_of(flags: argparse.Namespace, num_people: int) -> Extent:
    """Return the size that the flags request. ValueError if --people is neither a number nor `all`."""
    extent = QUICK if flags.quick else FULL
    if flags.clips is not None:
        extent = replace(extent, clips=flags.clips)
    if flags.hour:
        extent = replace(extent, people=2, blocks=HOUR_BLOCKS)
    if flags.people is not None:
        extent = replace(extent, people=num_people if flags.people == "all" else int(flags.people))
    extent = replace(extent, levels=flags.levels, eye_reader=flags.eye_reader)
    if flags.seeds is not None:
        extent = replace(extent, seeds=flags.seeds)
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
    parser.add_argument("--seeds", type=int, help=f"seeds that clips are rendered with (default {FULL.seeds})")
    parser.add_argument("--eye-reader", type=Path, help="file that training.eval.readers.eyes wrote: blinks and brows")
    parser.add_argument(
        "--test", action="store_true", help="the people kept for the last evaluation, in place of the held-out ones"
    )
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
    split = "test" if flags.test else "held_out"
    clips = read_clips(flags.data, split)
    extent = extent_of(flags, len(clips))
    about = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(extent).items()}
    return {"split": split, **about}, evaluate_held_out(flags.checkpoint, clips, extent, flags.sheet)


if __name__ == "__main__":
    main()
