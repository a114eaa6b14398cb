"""What loading a checkpoint costs, each part in a fresh process: `python -m benchmarks.loading PART CHECKPOINT`."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from avatar.checkpoints.layouts import open_part
from benchmarks.row import Row, row

ROUNDS = 3
SAMPLE_S = 0.001
PARTS = ("audio", "denoiser", "vae")


def rows(checkpoint: Path) -> list[Row]:
    """Seconds of CPU time and the peak of the process's own memory, imports left out, of each part in float32."""
    runs: dict[str, list[dict[str, float]]] = {part: [] for part in PARTS}
    for _ in range(ROUNDS):
        for part in PARTS:
            program = [sys.executable, "-m", "benchmarks.loading", part, str(checkpoint)]
            runs[part].append(json.loads(subprocess.run(program, check=True, capture_output=True).stdout))
    return [
        made
        for part in PARTS
        for made in (
            row(f"loading, {part}", median(run["seconds"] for run in runs[part]), "s"),
            row(f"loading, {part}: weights", median(run["weights"] for run in runs[part]), "MB"),
            row(f"loading, {part}: peak of memory", median(run["peak"] for run in runs[part]), "MB"),
        )
    ]


def measure(part: str, checkpoint: Path) -> dict[str, float]:
    """Load one part: seconds of CPU time, megabytes of its weights, and by how many the process grew at most."""
    load = loader(part)
    peak = before = own_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_S):
            peak = max(peak, own_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    started = time.process_time()
    module = load(open_part(checkpoint, part))
    seconds = time.process_time() - started
    done.set()
    watching.join()
    weights = sum(weight.nbytes for weight in module.state_dict().values())
    return {"seconds": seconds, "weights": weights / 1e6, "peak": (max(peak, own_bytes()) - before) / 1e6}


def loader(name: str) -> Any:
    """From a part to its module, with all imports behind it."""
    if name == "audio":
        import transformers.models.whisper.modeling_whisper  # noqa: F401 (imported when an encoder is made)

        from avatar.audio import model as audio_model

        return lambda part: audio_model.load(part).encoder
    if name == "denoiser":
        from avatar.denoiser import model as denoiser_model

        return lambda part: denoiser_model.load(part)[0]
    from avatar.vae import vae as vae_model

    return lambda part: vae_model.load(part).codec


def own_bytes() -> int:
    """Memory of this process that is not mapped from files (Linux: RssAnon)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
