"""How well a checkpoint's people speak: `python -m training.evaluate CHECKPOINT --data runs/data` prints one table.

Held-out people say held-out sentences through the library, and are compared with what was really to be seen. With
`--speech FILE --portrait FILE` any person says anything, and the table holds what can be known without the truth. A
figure that could not be had says why. `--json FILE` has all of it, written as it becomes known.
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
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.model import Network
from avatar.media import read_audio
from avatar.types import BLOCK_FRAMES
from training.data import StoredClip, read_clips
from training.eval import inference
from training.eval.codec_bound import codec_figures
from training.eval.contact_sheets import save_sheet
from training.eval.held_out import Scores, held_out_figures, other_figure, score, speak, take_of
from training.eval.identity import Identity
from training.eval.inference import Pixels, until
from training.eval.landmarks import Landmarks
from training.eval.metrics import Figure, distance
from training.eval.robustness import DTYPES, block_cost, drift_figure, endure, sound_from, speech_figures

SPEECH = Path(__file__).parents[1] / "assets" / "speech.wav"
HOUR_BLOCKS = 7500
# Who say the recording.
SPEAKERS = 3
NEEDS_TRUTH = (
    *("lip_sync_r", "lip_sync_r_other", "best_lag_frames", "mouth_amplitude", "head_motion", "flicker"),
    *("codec_psnr", "codec_psnr_mouth", "codec_lip_sync_r", "codec_mouth_amplitude", "codec_edge_energy"),
    "codec_flicker",
)
SHEET_ROWS, SHEET_COLUMNS = 12, 10
NOT_YET = Figure(None, "not measured yet")
Tool = TypeVar("Tool")


@dataclass(frozen=True)
class Row:
    """A line of the table. decimals: as it is printed. low, high: what is acceptable at least, where that is set."""

    key: str
    label: str
    decimals: int
    target: str = ""
    low: float = -np.inf
    high: float = np.inf


TABLE = (
    Row("lip_sync_r", "lips against the truth, r", 2, ".75", low=0.6),
    Row("lip_sync_r_other", "the same with another clip's sound", 2, "below .10", high=0.15),
    Row("best_lag_frames", "best lag, frames (positive: late)", 0, "0", -1, 1),
    Row("mouth_amplitude", "mouth's amplitude by the truth's", 2, ".9 to 1.1", 0.8, 1.25),
    Row("head_motion", "head's motion by the truth's", 2),
    Row("edge_energy", "edge energy by the truth's", 2, ".9 to 1.1", 0.8, 1.25),
    Row("sharpness", "sharpness by the truth's", 2),
    Row("flicker", "second differences in time by the truth's", 2),
    Row("background_db", "still background, frame to frame, dB", 1, "no mottling", low=40),
    Row("codec_psnr", "codec, PSNR, dB", 1, "36", low=34),
    Row("codec_psnr_mouth", "codec, in a box round the lips, dB", 1, "33", low=31),
    Row("codec_lip_sync_r", "codec, lips against the truth, r", 2),
    Row("codec_mouth_amplitude", "codec, mouth's amplitude by the truth's", 2),
    Row("codec_edge_energy", "codec, edge energy by the truth's", 2),
    Row("codec_flicker", "codec, second differences by the truth's", 2),
    Row("face_found", "frames with a face", 4, ".999", low=0.99),
    Row("identity_distance", "identity, embedding to the reference", 2),
    Row("drift_ratio", "drift, last 10 blocks by first 10", 2, "1.0", high=1.1),
    Row("speech_lag_frames", "recorded speech: lag to loudness, frames", 0, "0", -1, 1),
    Row("speech_ratio", "recorded speech: r by a shifted sound's", 1, "3", low=2),
    Row("block_ms", "a block, bfloat16, ms", 0, "375", high=480),
    Row("block_ms_float32", "a block, float32, ms", 0),
)


@dataclass(frozen=True)
class Extent:
    """How much is looked at.

    clips: held out. others: of those, how many also say another's sound. people: who have long sessions, of so many
    blocks, or as many as there are in session_s, and so many at a time. limit_s: on a machine so busy that this would
    not do, fewer clips and blocks are looked at.
    """

    clips: int
    others: int
    people: int
    blocks: int
    limit_s: float | None = None
    session_s: float | None = None
    at_a_time: int = 1

    def deadline(self, share: float) -> float:
        """When so much of the time from now on is over, seconds of time.monotonic."""
        return math.inf if self.limit_s is None else time.monotonic() + share * self.limit_s

    def session_deadline(self) -> float:
        """When a session that begins now is over, as `deadline`."""
        return self.deadline(0.15) if self.session_s is None else time.monotonic() + self.session_s


FULL = Extent(clips=50, others=50, people=3, blocks=250)
# Recorded speech and what a block costs are not cut short, and have the rest of five minutes.
QUICK = Extent(clips=12, others=6, people=1, blocks=30, limit_s=180)


def quick(
    checkpoint: Path, clips: Sequence[StoredClip], denoiser: tuple[Network, NetworkConfig] | None = None
) -> dict[str, float | None]:
    """lip_sync_r, mouth_amplitude and edge_energy on these clips, for a look while training: about 5 s a clip.

    denoiser: a network and its configuration in place of the checkpoint's. A figure without faces to read is None.
    """
    models, landmarks = inference.load(checkpoint, denoiser=denoiser), available(Landmarks)
    figures = held_out_figures([score(take_of(models, clip), landmarks) for clip in clips])
    return {name: figures[name].value for name in ("lip_sync_r", "mouth_amplitude", "edge_energy")}


def available(tool: Callable[[], Tool]) -> Tool | None:
    """The tool, None if its packages are missing."""
    try:
        return tool()
    except ModuleNotFoundError:
        return None


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most so many of the items, evenly over all."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def on_held_out(
    checkpoint: Path, clips: Sequence[StoredClip], extent: Extent, sheet: Path | None
) -> Iterator[dict[str, Figure]]:
    """Every figure of the table, some at a time as they are known. clips: all that are held out.

    sheet: where to write the truth, and below it what was made, of the first clips.
    """
    models, landmarks, identity = inference.load(checkpoint), available(Landmarks), available(Identity)
    chosen: list[StoredClip] = spread(clips, extent.clips)
    scores: list[Scores] = []
    rows: list[Pixels] = []
    for clip in until(tqdm(chosen, "held-out clips", unit="clip", mininterval=5), extent.deadline(0.5)):
        take = take_of(models, clip)
        scores.append(score(take, landmarks, identity))
        if len(rows) < SHEET_ROWS:
            rows += [np.stack(spread(list(frames), SHEET_COLUMNS)) for frames in (take.truth, take.made)]
    if sheet is not None:
        save_sheet(sheet, [rearrange(torch.from_numpy(row), "n h w c -> n c h w") / 127.5 - 1 for row in rows])
    yield held_out_figures(scores)
    chosen = chosen[: len(scores)]
    others = chosen[: extent.others], scores[: extent.others]
    yield {"lip_sync_r_other": other_figure(models, *others, landmarks, extent.deadline(0.2))}
    yield codec_figures(models, chosen, landmarks, extent.deadline(0.15))
    people = [models.picture(np.array(clip.array("reference"))) for clip in spread(clips, extent.people)]
    sound = sound_from(*read_audio(SPEECH))
    speeches = [score(speak(models, person, sound), landmarks) for person in people[:SPEAKERS]]
    yield speech_figures([each.openings[0] for each in speeches if each.openings is not None], sound)
    yield cost_figures(checkpoint, people[0])
    sessions: list[list[float]] = []
    for session in long_sessions(checkpoint, people, extent):
        sessions.append(session)
        yield {"drift_ratio": drift_figure(sessions)}


def long_sessions(checkpoint: Path, people: Sequence[Pixels], extent: Extent) -> Iterator[list[float]]:
    """How far each block of each person's long session is from the person's picture."""
    sessions = [(checkpoint, person, extent) for person in people]
    if extent.at_a_time == 1:
        yield from (_long_session(*session) for session in sessions)
        return
    # Not forked: torch has threads by now.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(extent.at_a_time, context) as pool:
        yield from pool.map(_long_session, *zip(*sessions, strict=True))


def _long_session(checkpoint: Path, person: Pixels, extent: Extent) -> list[float]:
    torch.set_num_threads(1)
    sound = sound_from(*read_audio(SPEECH))
    return endure(inference.load(checkpoint), person, sound, extent.blocks, extent.session_deadline())


def on_any(checkpoint: Path, speech: Path, portrait: Path) -> dict[str, Figure]:
    """What can be known of a person who says something if nobody knows how that should look."""
    models = inference.load(checkpoint)
    reference = models.vae.read_picture(portrait.read_bytes()).numpy()
    sound = sound_from(*read_audio(speech))
    take = speak(models, reference, sound)
    scores = score(take, available(Landmarks), available(Identity))
    figures = held_out_figures([scores])
    beside = {name: figures[name] for name in ("edge_energy", "sharpness", "identity_distance")}
    blocks = [take.made[start : start + BLOCK_FRAMES] for start in range(0, len(take.made), BLOCK_FRAMES)]
    return {
        **figures,
        **{name: Figure(each.value, "against the portrait") for name, each in beside.items() if each.value is not None},
        **{name: Figure(None, "not known of any clip, only of held-out ones") for name in NEEDS_TRUTH},
        **speech_figures([scores.openings[0]] if scores.openings is not None else [], sound),
        "drift_ratio": drift_figure([[distance(frames, reference) for frames in blocks]]),
        **cost_figures(checkpoint, reference),
    }


def cost_figures(checkpoint: Path, person: Pixels) -> dict[str, Figure]:
    """What a block costs in each precision. Where the processor cannot compute in one, nobody would: float32 counts."""
    costs: dict[torch.dtype, Figure] = {}
    figures = {}
    for name, asked in DTYPES.items():
        dtype = asked if is_native(asked, torch.device("cpu")) else torch.float32
        if dtype not in costs:
            costs[dtype] = block_cost(inference.load(checkpoint, dtype), person)
        figure = costs[dtype]
        figures[name] = (
            figure if dtype == asked else replace(figure, note=f"in float32, no {asked} here; {figure.note}")
        )
    return figures


def table(figures: Mapping[str, Figure]) -> str:
    """The figures, a line each, beside what is wanted of them; `!` marks what is not acceptable."""
    lines = [f"{'':42} {'measured':>9}  {'target':12} remarks"]
    for row in TABLE:
        figure = figures[row.key]
        value = "-" if figure.value is None else f"{figure.value:.{row.decimals}f}"
        mark = " " if figure.value is None or row.low <= figure.value <= row.high else "!"
        lines.append(f"{row.label:42} {value:>9}{mark} {row.target:12} {figure.note}".rstrip())
    return "\n".join(lines)


def write_json(path: Path, figures: Mapping[str, Figure], about: Mapping[str, Any]) -> None:
    """The figures by their keys, null where there is none; what is to be said of them under `notes`."""
    values = {row.key: figures[row.key].value for row in TABLE}
    notes = {row.key: figures[row.key].note for row in TABLE if figures[row.key].note}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**values, "notes": notes, **about}, indent=2) + "\n", encoding="utf-8")


def extent_of(flags: argparse.Namespace, num_people: int) -> Extent:
    """What the flags ask for, of so many held-out people. ValueError if a number is none."""
    extent = QUICK if flags.quick else FULL
    if flags.clips is not None:
        extent = replace(extent, clips=flags.clips)
    if flags.hour:
        extent = replace(extent, people=2, blocks=HOUR_BLOCKS)
    if flags.people is not None:
        extent = replace(extent, people=num_people if flags.people == "all" else int(flags.people))
    if flags.at_a_time is not None:
        extent = replace(extent, at_a_time=flags.at_a_time)
    if flags.minutes is not None:
        rounds = -(-min(extent.people, num_people) // extent.at_a_time)
        extent = replace(extent, session_s=60 * flags.minutes / rounds)
    return extent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=(__doc__ or "").split(":")[0])
    parser.add_argument("checkpoint", type=Path, help="folder of the models")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="shards, as training.make_data makes them")
    parser.add_argument("--quick", action="store_true", help="fewer clips and shorter sessions: under five minutes")
    parser.add_argument("--clips", type=int, help=f"held-out clips (default {FULL.clips})")
    parser.add_argument("--people", help="who have long sessions: so many held-out people, or `all`")
    parser.add_argument("--hour", action="store_true", help=f"long sessions of {HOUR_BLOCKS} blocks, of two people")
    parser.add_argument("--at-a-time", type=int, help="long sessions beside each other, a core each (default 1)")
    parser.add_argument("--minutes", type=float, help="the most that long sessions take, all together")
    parser.add_argument("--speech", type=Path, help="evaluate this sound, said by --portrait, and no held-out clips")
    parser.add_argument("--portrait", type=Path, help="a PNG, JPEG or WebP picture of a person")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--sheet", type=Path, help="write truth and made frames, row by row, to this PNG")
    flags = parser.parse_args()
    if (flags.speech is None) != (flags.portrait is None):
        parser.error("--speech and --portrait go together")
    torch.set_num_threads(1)
    figures = {row.key: NOT_YET for row in TABLE}
    try:
        about, measured = asked_for(flags)
        for known in measured:
            figures |= known
            if flags.json is not None:
                write_json(flags.json, figures, {"checkpoint": str(flags.checkpoint), **about})
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(figures))


def asked_for(flags: argparse.Namespace) -> tuple[dict[str, Any], Iterable[dict[str, Figure]]]:
    """What the flags ask to be looked at, and its figures. ValueError or OSError if that is not there."""
    if flags.speech is not None:
        about = {"speech": str(flags.speech), "portrait": str(flags.portrait)}
        return about, [on_any(flags.checkpoint, flags.speech, flags.portrait)]
    clips = read_clips(flags.data, "held_out")
    extent = extent_of(flags, len(clips))
    return asdict(extent), on_held_out(flags.checkpoint, clips, extent, flags.sheet)


if __name__ == "__main__":
    main()
