"""Ablate the rules of inference: `python -m training.ablate models/tiny --data runs/data`.

Each row evaluates the same held-out clips and long sessions under another rule, over the library's own code. Rows that
the JSON file already has, for the same network and extent, are not repeated. `--stage1` adds a row for the network
before stage 2.
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
from training.eval.held_out import held_out_metrics, render_clip, score
from training.eval.inference import Models
from training.eval.readers.landmarks import Landmarks
from training.eval.robustness import drift_metric, long_session, to_mono_16k
from training.evaluate import SPEECH, available, evenly_spaced
from training.pretrain import SECOND_SIGMAS

METRICS = (
    *("lip_sync_r", "mouth_amplitude", "head_motion", "border_motion", "edge_energy", "flicker"),
    *("drift_ratio", "block_passes"),
)
# Of the row `correlated noise`.
CORRELATION = 0.93
# Nearly 0, because the sigma of a level must be positive.
CLEAN_SIGMA = 1e-4


class WithoutSink(KVCache):
    """A cache whose blocks attend only to each other, not to the sink and motion."""

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> KeysValues:
        keys, values = super().extend(layer, k, v)
        return keys[:, self._sink_tokens :], values[:, self._sink_tokens :]


class NoSink(DenoisingLoop):
    """No block attends to the conditions; a network whose pose input carries the picture still has it there."""

    def __init__(self, network: Network, config: NetworkConfig, session: Session, conditions: Conditions) -> None:
        super().__init__(network, config, session, conditions)
        height, width = session.motion.shape[2:]
        for state in self.states:
            state.cache = WithoutSink(config, height, width, dtype=network.dtype, device=network.device)


class NoPicture(NoSink):
    """The pose input has no picture either: from the second block on it is the last generated latent."""

    def step(self, block: Block) -> Block:
        result = super().step(block)
        assert result.latent is not None
        self.conditions = self.conditions.with_sink(result.latent[:, -1:])
        return result


class CleanCache(DenoisingLoop):
    """All levels share one cache, which a further pass over each finished block fills with clean keys and values.

    Source: Self-Forcing (arXiv 2506.08009).
    """

    def __init__(self, network: Network, config: NetworkConfig, session: Session, conditions: Conditions) -> None:
        super().__init__(network, config, session, conditions)
        last = replace(config, schedule=(*config.schedule[:-1], CLEAN_SIGMA, 0.0))
        self._clean_pass = Denoiser(network, last, last.num_levels - 1)
        self._clean_state = self._clean_pass.open(session)
        for state in self.states:
            state.cache = self._clean_state.cache

    def step(self, block: Block) -> Block:
        result = super().step(block)
        self._clean_pass.step(result, self._clean_state)
        return result


class LastHistory(DenoisingLoop):
    """All levels share the last one's cache: it writes over what earlier levels wrote of a block."""

    def __init__(self, network: Network, config: NetworkConfig, session: Session, conditions: Conditions) -> None:
        super().__init__(network, config, session, conditions)
        for state in self.states:
            state.cache = self.states[-1].cache


@dataclass(frozen=True)
class Variant:
    """A rule to evaluate.

    schedule, noise_scale, noise_correlation: in place of the checkpoint's. sink_update_block: block at which the sink
    is replaced.
    """

    about: str
    schedule: tuple[float, ...] | None = None
    noise_scale: float | None = None
    noise_correlation: float | None = None
    sink_update_block: int | None = None
    denoising_loop: type[DenoisingLoop] = DenoisingLoop

    def apply(self, models: Models) -> Models:
        config = models.config
        config = replace(
            config,
            schedule=self.schedule or config.schedule,
            noise_scale=config.noise_scale if self.noise_scale is None else self.noise_scale,
            noise_correlation=(config.noise_correlation if self.noise_correlation is None else self.noise_correlation),
            sink_update_block=self.sink_update_block or config.sink_update_block,
        )
        return replace(models, config=config, denoising_loop=self.denoising_loop)


def variants(schedule: tuple[float, ...]) -> dict[str, Variant]:
    """Return all rows for a checkpoint with this schedule.

    Rows of levels use a subset of its sigmas; for two levels, other second ones, to choose between before distillation.
    """
    *sigmas, end = schedule
    levels: dict[str, Variant] = {}
    if len(sigmas) > 2:
        levels["3 levels"] = Variant("without the second", (*sigmas[:1], *sigmas[2:], end))
        levels["2 levels"] = Variant("the first and the third", (*sigmas[:3:2], end))
    elif len(sigmas) == 2:
        others = [sigma for sigma in SECOND_SIGMAS if sigma != sigmas[1]]
        levels |= {f"sigma {sigma:g}": Variant("of the second level", (sigmas[0], sigma, end)) for sigma in others}
    return {
        "as it ships": Variant("noisy cache per level, fixed sink"),
        **levels,
        "all noise": Variant("blocks start from noise of standard deviation 1, as in training", noise_scale=1.0),
        "no noise": Variant("blocks start from zeros", noise_scale=0.0),
        "correlated noise": Variant(
            f"all noise, correlated {CORRELATION:g} from latent to latent",
            noise_scale=1.0,
            noise_correlation=CORRELATION,
        ),
        "last level's history": Variant("all levels share the last one's cache", denoising_loop=LastHistory),
        "clean cache": Variant("one clean cache, one more pass per block", denoising_loop=CleanCache),
        "sink update": Variant("block 0's first latent is the sink from block 4 on", sink_update_block=4),
        "no sink": Variant("no block attends to the picture", denoising_loop=NoSink),
        "no picture": Variant("as above, and the pose input is the last generated latent", denoising_loop=NoPicture),
    }


@dataclass(frozen=True)
class Extent:
    """Size of a row: held-out clips, and people with sessions of so many blocks of 480 ms."""

    clips: int
    people: int
    blocks: int


def row(models: Models, clips: Sequence[StoredClip], extent: Extent) -> dict[str, float | None]:
    """Evaluate one rule."""
    landmarks = available(Landmarks)
    chosen = tqdm(evenly_spaced(clips, extent.clips), "held-out clips", unit="clip", mininterval=10, leave=False)
    metrics = held_out_metrics([score(render_clip(models, clip), landmarks) for clip in chosen])
    audio = to_mono_16k(*read_audio(SPEECH))
    people = [models.picture(np.array(clip.array("reference"))) for clip in clips[: extent.people]]
    metrics["drift_ratio"] = drift_metric(
        [long_session(models, person, audio, extent.blocks).distances for person in people], models.block_frames
    )
    passes = models.config.num_levels + (models.denoising_loop is CleanCache)
    return {name: metrics[name].value for name in METRICS if name in metrics} | {"block_passes": passes}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the rows as Markdown."""
    titles = ("rule", "r", "amplitude", "head", "borders", "edges", "flicker", "drift", "passes", "about")
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for name, values in rows.items():
        cells = ["-" if values.get(key) is None else f"{values[key]:.2f}" for key in METRICS[:-1]]
        lines.append(f"| {name} | {' | '.join(cells)} | {values['block_passes']} | {values['about']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.ablate", description=(__doc__ or "").split(":")[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="shards that training.make_data wrote")
    parser.add_argument("--stage1", type=Path, help="denoiser folder of the network before stage 2, for one more row")
    parser.add_argument("--clips", type=int, default=8, help="held-out clips per row (default 8)")
    parser.add_argument("--people", type=int, default=1, help="people with long sessions per row (default 1)")
    parser.add_argument("--blocks", type=int, default=60, help="length of a long session, 480 ms each (default 60)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="evaluate only these rows")
    parser.add_argument("--json", type=Path, default=Path("out/ablation.json"), help="file that keeps the rows")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    try:
        print(table(evaluate_rows(flags)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def evaluate_rows(flags: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the requested rows and those already in the file, which is written after each row."""
    models, clips = inference.load(flags.checkpoint), read_clips(flags.data, "held_out")
    extent = Extent(flags.clips, flags.people, flags.blocks)
    digest = open_part(flags.checkpoint, "denoiser").digest()
    rules: dict[str, tuple[str, Models, str]] = {
        name: (digest, each.apply(models), each.about) for name, each in variants(models.config.schedule).items()
    }
    if flags.stage1:
        part = Part.read(flags.stage1)
        network = denoiser_model.load(part)
        alone = replace(models, network=network, config=network.config)
        rules["stage 1 alone"] = (part.digest(), alone, str(flags.stage1))
    if unknown := sorted({*(flags.only or ())} - {*rules}):
        raise ValueError(f"no such row: {', '.join(unknown)}; there are {', '.join(rules)}")
    kept: dict[str, dict[str, Any]] = json.loads(flags.json.read_text()) if flags.json.exists() else {}
    for name in tqdm([*(flags.only or rules)], "rows", unit="row"):
        network_digest, variant, about = rules[name]
        key = f"{network_digest} {extent}"
        if kept.get(name, {}).get("of") != key:
            kept[name] = {**row(variant, clips, extent), "about": about, "of": key}
            flags.json.parent.mkdir(parents=True, exist_ok=True)
            flags.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return {name: kept[name] for name in rules if name in kept}


if __name__ == "__main__":
    main()
