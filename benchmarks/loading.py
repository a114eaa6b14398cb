"""The cost of loading a checkpoint, each part in a fresh process: `python -m benchmarks.loading PART CHECKPOINT`."""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from avatar.checkpoints.layouts import open_part
from benchmarks.memory import anonymous_bytes, peak_bytes
from benchmarks.row import Row, row

ROUNDS = 3
PARTS = ("audio", "denoiser", "vae")


def rows(checkpoint: Path) -> list[Row]:
    """Measure CPU time and peak anonymous memory of loading each part in float32, without imports."""
    runs: dict[str, list[dict[str, float]]] = {part: [] for part in PARTS}
    for _ in range(ROUNDS):
        for part in PARTS:
            program = [sys.executable, "-m", "benchmarks.loading", part, str(checkpoint)]
            runs[part].append(json.loads(subprocess.run(program, check=True, capture_output=True).stdout))
    return [
        each
        for part in PARTS
        for each in (
            row(f"loading, {part}", median(run["seconds"] for run in runs[part]), "s"),
            row(f"loading, {part}: weights", median(run["weights"] for run in runs[part]), "MB"),
            row(f"loading, {part}: peak of memory", median(run["peak"] for run in runs[part]), "MB"),
        )
    ]


def measure(part: str, checkpoint: Path) -> dict[str, float]:
    """Load one part; return CPU seconds, megabytes of its weights, and the peak growth of the process in megabytes."""
    load = loader(part)
    before = anonymous_bytes()
    with peak_bytes() as peak:
        started = time.process_time()
        module = load(open_part(checkpoint, part))
        seconds = time.process_time() - started
    weights = sum(weight.nbytes for weight in module.state_dict().values())
    return {"seconds": seconds, "weights": weights / 1e6, "peak": (peak[0] - before) / 1e6}


def loader(name: str) -> Any:
    """Return a function that loads a part's module, after all its imports."""
    if name == "audio":
        import transformers.models.whisper.modeling_whisper  # noqa: F401 (otherwise imported with the first encoder)

        from avatar.audio import model as audio_model

        return lambda part: audio_model.load(part).encoder
    if name == "denoiser":
        from avatar.denoiser import model as denoiser_model

        return denoiser_model.load
    from avatar.vae import vae as vae_model

    return lambda part: vae_model.load(part).codec


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
