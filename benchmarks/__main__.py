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

import psutil
import torch

from benchmarks import block, encoding, handoff, live, loading, tiny
from benchmarks.pipeline import crash, endurance, throughput
from benchmarks.pipeline import live as pipeline_live
from benchmarks.row import Row, row_of, table

ROOT = Path(__file__).parents[1]


def parts(flags: argparse.Namespace) -> dict[str, Callable[[], list[Row]]]:
    """What can be measured, by name, in the order in which it is."""
    return {
        "loading": lambda: loading.rows(flags.checkpoint),
        "block": lambda: block.rows(flags.checkpoint, compiled=flags.compile),
        "encoding": encoding.rows,
        "handoff": handoff.rows,
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
    flags.out.mkdir(parents=True, exist_ok=True)
    report = Report(flags.out / "bench.json", list(available), afresh=not flags.only)
    failed = []
    for name in flags.only or available:
        started = time.monotonic()
        try:
            report.put(name, available[name]())
        except (RuntimeError, TimeoutError) as error:  # of a process that was measured; the others can be, still
            failed.append(f"{name}: {error or 'not done in time'}")
        print(f"{name}, {time.monotonic() - started:.0f} s", flush=True)
    print(f"\n{table(report.rows)}\n\n{machine()}\nwrote {report.path}")
    if failed:
        raise ValueError("; ".join(failed))


class Report:
    """Rows by the name of what was measured, kept in a file from each on.

    names: in the order of the table. afresh: whether what the file has is forgotten.
    """

    def __init__(self, path: Path, names: list[str], *, afresh: bool) -> None:
        self.path = path
        kept = [] if afresh or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))["rows"]
        self._rows = {name: [row_of(each) for each in kept if each.get("name") == name] for name in names}

    @property
    def rows(self) -> list[Row]:
        return [each for rows in self._rows.values() for each in rows]

    def put(self, name: str, rows: list[Row]) -> None:
        """Keep these rows in the place of those of the same name."""
        self._rows[name] = rows
        told = [{"name": name, **each.to_dict()} for name, rows in self._rows.items() for each in rows]
        self.path.write_text(json.dumps({"machine": machine(), "rows": told}, indent=2) + "\n", encoding="utf-8")


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
