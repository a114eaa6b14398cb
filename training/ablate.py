"""What each rule of the rollout is worth: `python -m training.ablate models/tiny --data runs/data`.

Every row is the same held-out clips and long sessions under another rule, over the library's own code. Rows that the
JSON file has from before, of the same network and extent, are not made again. Stage 1 alone is a row if `--stage1`
names its denoiser folder.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from avatar.checkpoints.layouts import open_part
from avatar.checkpoints.part import Part
from avatar.denoiser import model as denoiser_model
from avatar.denoiser.cache import KeysValues, KVCache
from avatar.denoiser.config import NetworkConfig
from avatar.denoiser.denoiser import Denoiser
from avatar.denoiser.model import Network
from avatar.media import read_audio
from avatar.render import DenoisingLoop
from avatar.types import Block, Conditions, Session
from training.data import StoredClip, read_clips
from training.eval import inference
from training.eval.held_out import held_out_figures, score, take_of
from training.eval.inference import Models
from training.eval.landmarks import Landmarks
from training.eval.robustness import drift_figure, endure, sound_from
from training.evaluate import SPEECH, available, spread

FIGURES = (
    *("lip_sync_r", "mouth_amplitude", "head_motion", "edge_energy", "flicker"),
    *("drift_ratio", "block_passes"),
)
# Almost 0, which a level's sigma cannot be.
CLEAN = 1e-4


class WithoutSink(KVCache):
    """A cache whose blocks see neither picture nor motion, only each other."""

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> KeysValues:
        keys, values = super().extend(layer, k, v)
        return keys[:, self._sink_tokens :], values[:, self._sink_tokens :]


class NoSink(DenoisingLoop):
    """Conditions are not attended to; a network whose pose input carries the picture still has it there."""

    def __init__(self, network: Network, config: NetworkConfig, session: Session, conditions: Conditions) -> None:
        super().__init__(network, config, session, conditions)
        height, width = session.motion.shape[2:]
        for history in self.histories:
            history.cache = WithoutSink(config, height, width, dtype=network.dtype, device=network.device)


class NoPicture(NoSink):
    """Nor has it the picture: from the second block on the last frame that was drawn is in its place."""

    def step(self, block: Block) -> Block:
        drawn = super().step(block)
        assert drawn.latent is not None
        self.conditions = self.conditions.with_sink(drawn.latent[:, -1:])
        return drawn


class CleanCache(DenoisingLoop):
    """All levels share one cache, and a finished block goes through the network once more to be kept there clean.

    Source: Self-Forcing (arXiv 2506.08009); one pass more per block.
    """

    def __init__(self, network: Network, config: NetworkConfig, session: Session, conditions: Conditions) -> None:
        super().__init__(network, config, session, conditions)
        last = replace(config, schedule=(*config.schedule[:-1], CLEAN, 0.0))
        self._keeping = Denoiser(network, last, last.num_levels - 1)
        self._kept = self._keeping.open(session)
        for history in self.histories:
            history.cache = self._kept.cache

    def step(self, block: Block) -> Block:
        drawn = super().step(block)
        self._keeping.step(drawn, self._kept)
        return drawn


@dataclass(frozen=True)
class Variant:
    """A rule to try. schedule: sigmas in place of the checkpoint's. noise: its scale in place of the checkpoint's.
    update: block at which the sink is replaced.
    """

    about: str
    schedule: tuple[float, ...] | None = None
    noise: float | None = None
    update: int | None = None
    drawing: type[DenoisingLoop] = DenoisingLoop

    def of(self, models: Models) -> Models:
        config = models.config
        config = replace(
            config,
            schedule=self.schedule or config.schedule,
            noise_scale=config.noise_scale if self.noise is None else self.noise,
            sink_update_block=self.update or config.sink_update_block,
        )
        return replace(models, config=config, drawing=self.drawing)


def variants(schedule: tuple[float, ...]) -> dict[str, Variant]:
    """All rows for a checkpoint of this schedule; fewer levels are some of its own, the first among them."""
    *sigmas, end = schedule
    return {
        "as it ships": Variant("four levels, noisy cache of the same level, sink kept"),
        "3 levels": Variant("without the second", (*sigmas[:1], *sigmas[2:], end)),
        "2 levels": Variant("the first and the third", (*sigmas[:3:2], end)),
        "all noise": Variant("blocks start from noise of deviation 1, as in training", noise=1.0),
        "no noise": Variant("blocks start from zeros", noise=0.0),
        "clean cache": Variant("finished blocks are kept clean, one pass more", drawing=CleanCache),
        "sink update": Variant("block 0's first latent is the sink from block 4 on", update=4),
        "no sink": Variant("no block attends to the picture", drawing=NoSink),
        "no picture": Variant("nor is it given: the last drawn frame is in its place", drawing=NoPicture),
    }


@dataclass(frozen=True)
class Extent:
    """How many clips, and people in sessions of how many blocks, make a row."""

    clips: int
    people: int
    blocks: int


def row(models: Models, clips: Sequence[StoredClip], extent: Extent) -> dict[str, float | None]:
    """The figures of a rule."""
    landmarks = available(Landmarks)
    chosen = tqdm(spread(clips, extent.clips), "held-out clips", unit="clip", mininterval=10, leave=False)
    figures = held_out_figures([score(take_of(models, clip), landmarks) for clip in chosen])
    sound = sound_from(*read_audio(SPEECH))
    people = [models.picture(np.array(clip.array("reference"))) for clip in clips[: extent.people]]
    figures["drift_ratio"] = drift_figure([endure(models, person, sound, extent.blocks) for person in people])
    passes = models.config.num_levels + (models.drawing is CleanCache)
    return {name: figures[name].value for name in FIGURES if name in figures} | {"block_passes": passes}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows, as Markdown."""
    lines = ["| rule | r | amplitude | head | edges | flicker | drift | passes | about |", "|" + " --- |" * 9]
    for name, figures in rows.items():
        values = ["-" if figures[key] is None else f"{figures[key]:.2f}" for key in FIGURES[:-1]]
        lines.append(f"| {name} | {' | '.join(values)} | {figures['block_passes']} | {figures['about']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.ablate", description=(__doc__ or "").split(":")[0])
    parser.add_argument("checkpoint", type=Path, help="folder of the models")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="shards, as training.make_data makes them")
    parser.add_argument(
        "--stage1", type=Path, help="denoiser folder of the network before stage 2, for a row of its own"
    )
    parser.add_argument("--clips", type=int, default=8, help="held-out clips of a row (default 8)")
    parser.add_argument("--people", type=int, default=1, help="who speak the long sessions of a row (default 1)")
    parser.add_argument("--blocks", type=int, default=60, help="length of a session (default 60, 29 s)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="make these rows alone")
    parser.add_argument("--json", type=Path, default=Path("out/ablation.json"), help="where rows are kept")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    try:
        print(table(made(flags)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def made(flags: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All rows that were asked for or are there already; the file is written after each."""
    models, clips = inference.load(flags.checkpoint), read_clips(flags.data, "held_out")
    extent = Extent(flags.clips, flags.people, flags.blocks)
    digest = open_part(flags.checkpoint, "denoiser").digest()
    tried: dict[str, tuple[str, Models, str]] = {
        name: (digest, each.of(models), each.about) for name, each in variants(models.config.schedule).items()
    }
    if flags.stage1:
        part = Part.read(flags.stage1)
        network, config = denoiser_model.load(part)
        tried["stage 1 alone"] = (part.digest(), replace(models, network=network, config=config), str(flags.stage1))
    if unknown := sorted({*(flags.only or ())} - {*tried}):
        raise ValueError(f"no such row: {', '.join(unknown)}; there are {', '.join(tried)}")
    kept: dict[str, dict[str, Any]] = json.loads(flags.json.read_text()) if flags.json.exists() else {}
    for name in tqdm([*(flags.only or tried)], "rows", unit="row"):
        network_digest, variant, about = tried[name]
        key = f"{network_digest} {extent}"
        if kept.get(name, {}).get("of") != key:
            kept[name] = {**row(variant, clips, extent), "about": about, "of": key}
            flags.json.parent.mkdir(parents=True, exist_ok=True)
            flags.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return {name: kept[name] for name in tried if name in kept}


if __name__ == "__main__":
    main()
