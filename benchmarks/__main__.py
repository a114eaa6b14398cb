"""Measure this machine and print a table: `python -m benchmarks [--only NAME ...] [--compile] [--out out]`.

Also writes OUT/bench.json; with --only, what the file has of other names is kept. What is compared is measured in turns
and medians are given, so that a load that comes and goes meets all alike. `loading`, `block` and `encoding` are CPU
time of one thread, which others' work touches least; all else is the wall clock's, and wants a machine without others.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import block, encoding, live, loading, tiny
from benchmarks.pipeline import crash, endurance, throughput
from benchmarks.pipeline import live as pipeline_live
from benchmarks.row import Row, table

ROOT = Path(__file__).parents[1]


def parts(flags: argparse.Namespace) -> dict[str, Callable[[], list[Row]]]:
    """What can be measured, by name, in the order in which it is."""
    return {
        "loading": lambda: loading.rows(flags.checkpoint),
        "block": lambda: block.rows(flags.checkpoint, compiled=flags.compile),
        "encoding": encoding.rows,
        "live": lambda: live.rows(flags.checkpoint),
        "efficiency": throughput.efficiency_rows,
        "hops": throughput.hop_rows,
        "sessions": pipeline_live.session_rows,
        "continuity": pipeline_live.continuity_rows,
        "crash": crash.rows,
        "endurance": endurance.rows,
        "tiny": lambda: tiny.rows(flags.checkpoint),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "models/tiny", help="folder of the models")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder to write to")
    parser.add_argument("--compile", action="store_true", help="compiled layers too: takes minutes more")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="measure these, keep other rows")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    available = parts(flags)
    if unknown := set(flags.only) - set(available):
        raise ValueError(f"{', '.join(sorted(unknown))} cannot be measured, only {', '.join(available)}")
    path = flags.out / "bench.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if flags.only and path.is_file() else []
    made: list[dict[str, Any]] = []
    for name, measure in available.items():
        if flags.only and name not in flags.only:
            made += [each for each in kept if each.get("name") == name]
            continue
        started = time.monotonic()
        rows = measure()
        print(f"\n{name}, {time.monotonic() - started:.0f} s\n{table(rows)}", flush=True)
        made += [{"name": name, **each.to_dict()} for each in rows]
    flags.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "rows": made}, indent=2) + "\n", encoding="utf-8")
    print(f"\n{machine()}\nwrote {path}")


def machine() -> dict[str, object]:
    """What the figures were measured on. load: programs that wanted to run in the last minute, ours among them."""
    cores = [line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")]
    return {
        "processor": cores[0] if cores else platform.machine(),
        "cores": len(cores),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
