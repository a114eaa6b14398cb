"""Measure this machine and print a table: `python -m benchmarks [--compile] [--out out]`. Also writes OUT/bench.json.

What is compared is measured in turns, and medians are given, so that a load that comes and goes meets all alike. One
thread; times are CPU time, which others' work touches least.
"""

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import block, encoding, handoff, live, loading, sharing
from benchmarks.row import Row

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "models/tiny", help="folder of the models")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder to write to")
    parser.add_argument("--compile", action="store_true", help="compiled layers too: takes minutes more")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        *loading.rows(flags.checkpoint),
        *block.rows(flags.checkpoint, compiled=flags.compile),
        *sharing.rows(flags.checkpoint),
        *encoding.rows(),
        *handoff.rows(),
        *live.rows(flags.checkpoint),
    ]
    print(table(rows))
    flags.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    (flags.out / "bench.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {flags.out / 'bench.json'}")


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    cores = [line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")]
    return {
        "processor": cores[0] if cores else platform.machine(),
        "cores": len(cores),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def table(rows: list[Row]) -> str:
    """The rows as people read them."""
    width = max(len(row.figure) for row in rows)
    lines = [f"{'figure':{width}}  {'value':>10} {'':8}{'target':>10}  met"]
    for row in rows:
        target = "" if row.target is None else f"{row.target:.4g}"
        met = {None: "", True: "yes", False: "no"}[row.met]
        lines.append(f"{row.figure:{width}}  {row.value:>10.4g} {row.unit:8}{target:>10}  {met}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
