"""Measure this machine and print a table: `python -m benchmarks [--only NAME ...] [--compile] [--out out]`.

Also writes OUT/bench.json; with --only, the file's other rows are kept. Variants that are compared take turns, and
values are medians, so that a varying load affects all of them alike. `loading`, `block` and `encoding` measure CPU time
of one thread, which other load affects least; everything else is wall time and needs an otherwise idle machine.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc.aio
import psutil
import torch

from benchmarks import block, encoding, handoff, live, loading, tiny, voice
from benchmarks.fleet import discovery, gateway, opening, refusals, resume, simulation
from benchmarks.pipeline import crash, endurance, reaction, throughput
from benchmarks.pipeline import live as pipeline_live
from benchmarks.row import Row, row_from_dict, table

ROOT = Path(__file__).parents[1]


def parts(flags: argparse.Namespace) -> dict[str, Callable[[], list[Row]]]:
    """Return the measurements by name, in order."""
    return {
        "loading": lambda: loading.rows(flags.checkpoint),
        "block": lambda: block.rows(flags.checkpoint, compiled=flags.compile),
        "encoding": encoding.rows,
        "handoff": handoff.rows,
        "live": lambda: live.rows(flags.checkpoint),
        "reaction": reaction.standin_rows,
        "voice": voice.rows,
        "reaction-default": lambda: reaction.default_rows(flags.checkpoint),
        "efficiency": throughput.efficiency_rows,
        "hops": throughput.hop_rows,
        "sessions": pipeline_live.session_rows,
        "continuity": pipeline_live.continuity_rows,
        "crash": crash.rows,
        "endurance": endurance.rows,
        "fleet": gateway.rows,
        "opening": opening.rows,
        "resume": resume.rows,
        "discovery": discovery.rows,
        "refusals": refusals.rows,
        "simulation": simulation.rows,
        "tiny": lambda: tiny.rows(flags.checkpoint),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "models/tiny", help="folder of the models")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder to write to")
    parser.add_argument("--compile", action="store_true", help="measure compiled layers too: takes minutes more")
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
        # Of a measured process; continue with the other measurements.
        except (RuntimeError, TimeoutError, grpc.aio.AioRpcError) as error:
            report.put(name, [])
            failed.append(f"{name}: {reason_of(error)}")
        print(f"{name}, {time.monotonic() - started:.0f} s", flush=True)
    print(f"\n{table(report.rows)}\n\n{machine()}\nwrote {report.path}")
    if failed:
        raise ValueError("; ".join(failed))


def reason_of(error: RuntimeError | TimeoutError | grpc.aio.AioRpcError) -> str:
    """Return the reason of a failed measurement."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or "too slow to measure: timed out"


class Report:
    """Rows by the name of their measurement, written to a file after each one.

    names: in the order of the table. afresh: whether to discard the file's rows.
    """

    def __init__(self, path: Path, names: list[str], *, afresh: bool) -> None:
        self.path = path
        stored = [] if afresh or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))["rows"]
        self._rows = {name: [row_from_dict(each) for each in stored if each.get("name") == name] for name in names}

    @property
    def rows(self) -> list[Row]:
        return [each for rows in self._rows.values() for each in rows]

    def put(self, name: str, rows: list[Row]) -> None:
        """Replace the rows of one measurement."""
        self._rows[name] = rows
        stored = [{"name": name, **each.to_dict()} for name, rows in self._rows.items() for each in rows]
        self.path.write_text(json.dumps({"machine": machine(), "rows": stored}, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, object]:
    """Describe this machine. load: average number of runnable programs in the last minute, including this one."""
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
