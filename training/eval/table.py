"""The table of an evaluation: its rows, their targets, and its file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.eval.metrics import Metric

# Metrics that need a held-out clip.
NEEDS_TRUTH = (
    *("lip_sync_r", "lip_sync_r_other", "overlap_r_change", "best_lag_frames", "mouth_amplitude", "inner_lips"),
    *("closure_recall", "mouth_silent", "mouth_listening", "blinks", "head_motion", "border_motion"),
    *("head_smoothness", "head_rotation", "motion_followed", "listening_r", "listening_r_other", "response"),
    *("response_latency", "flicker", "identity_margin", "seed_spread"),
    *("head_diversity", "codec_psnr", "codec_psnr_mouth", "codec_lip_sync_r", "codec_mouth_amplitude"),
    *("codec_edge_energy", "codec_sharpness", "codec_flicker"),
)


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
    Row("lip_sync_r", "lip sync r, mouth against the true jaw", 2, ".82", low=0.75),
    Row("lip_sync_r_other", "the same with another clip's audio", 2, "below .10", high=0.15),
    Row("overlap_r_change", "lip sync r, change while the other speaks", 2, "0", -0.04, 0.04),
    Row("best_lag_frames", "best lag, frames (positive: late)", 0, "0", 0, 0),
    Row("mouth_amplitude", "mouth amplitude / truth", 2, ".9 to 1.1", 0.85, 1.2),
    Row("inner_lips", "inner lips' amplitude / truth", 2, ".9 to 1.1", 0.8, 1.2),
    Row("closure_recall", "closures at p, b, m that close", 2, ".9", low=0.8),
    Row("mouth_silent", "lips' motion in silence / in speech", 2, ".05", high=0.1),
    Row("mouth_listening", "lips' motion in listening / in speech", 2, ".05", high=0.1),
    Row("blinks", "blinks / truth", 2, "1", 0.5, 1.5),
    Row("head_motion", "head motion / truth", 2, ".85 to 1.15", 0.7, 1.3),
    Row("border_motion", "head motion at block borders / inside", 2, "1.15", high=1.3),
    Row("head_smoothness", "autocorrelation of the head at .5 s", 2),
    Row("head_rotation", "head rotation / truth", 2, ".85 to 1.15", 0.7, 1.3),
    Row("motion_followed", "lids and head against what is given, r", 2),
    Row("head_diversity", "head, deviation over seeds / in time", 2),
    Row("listening_r", "nods and brows while listening, r", 2, ".45", low=0.3),
    Row("listening_r_other", "the same with another clip's audio", 2, "below .10", high=0.15),
    Row("response", "nods after the other's phrases / truth", 2, "1"),
    Row("response_latency", "their peak after a phrase's end, s", 2, ".3 to 1", 0.3, 1.1),
    Row("edge_energy", "edge energy / truth", 2, ".9 to 1.1", 0.85, 1.2),
    Row("sharpness", "sharpness / truth", 2),
    Row("flicker", "second differences in time / truth", 2, "1.15", high=1.3),
    Row("background_db", "still background, frame to frame, dB", 1, "no mottling", low=40),
    Row("codec_psnr", "codec, PSNR, dB", 1, "35", low=34),
    Row("codec_psnr_mouth", "codec, PSNR around the lips, dB", 1, "32.5", low=31.3),
    Row("codec_lip_sync_r", "codec, lip sync r", 2),
    Row("codec_mouth_amplitude", "codec, mouth amplitude / truth", 2),
    Row("codec_edge_energy", "codec, edge energy / truth", 2),
    Row("codec_sharpness", "codec, sharpness / truth", 2, ".85", low=0.7),
    Row("codec_flicker", "codec, second differences / truth", 2),
    Row("face_found", "frames with a face", 4, ".999", low=0.99),
    Row("identity_distance", "identity, embedding to the portrait", 2),
    Row("identity_worst", "identity, the worst person", 2, ".35", high=0.45),
    Row("identity_margin", "identity, nearer than others, least", 2, "above 0", low=0),
    Row("session_identity", "identity after a long session, worst", 2, ".35", high=0.45),
    Row("seed_spread", "lip sync r, range over seeds", 2),
    Row("drift_ratio", "drift, last 10 blocks / first 10", 2, "1.0", high=1.1),
    Row("speech_lag_frames", "recorded speech: lag to loudness, frames", 0, "0", -1, 1),
    Row("speech_ratio", "recorded speech: r / shifted audio's", 1, "3", low=2.5),
    Row("block_ms", "480 ms of media, bfloat16, ms", 0, "260", high=330),
    Row("block_ms_float32", "480 ms of media, float32, ms", 0, "480", high=600),
    Row("levels", "denoising levels", 0),
)


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
