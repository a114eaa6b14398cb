"""Measure the public 14B checkpoint's models on one device: `python -m benchmarks.gpu [--out out/gpu.json]`.

Weights are random. A bare machine is enough: torch, einops, numpy and safetensors; sections whose packages are missing
say so. No checkpoint, no network and no other process is needed. A row has its ceiling, where there is one, from what
the same run has measured, and is written to OUT before the next one starts. The slowest sections, of torch.compile,
come last: a run that is cut short has everything else. It takes ten minutes. `--cpu` runs all of it with toy widths.

Expected on an H100 at 704x384, by counts: a step of at most 300 ms eager, 230 compiled, 185 in float8; the device idle
for at most 2 of 100; a block decoded in at most 200 ms.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.backends import cudnn

from benchmarks.one_device import coders, denoiser, rates
from benchmarks.one_device.run import Run
from benchmarks.row import Row, row, table

MINUTES = 10.0


class Report:
    """The rows of a run, written to a file after each one."""

    def __init__(self, path: Path, about: dict[str, object]) -> None:
        self.path, self._about = path, about
        self._rows: list[tuple[str, Row]] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, section: str, each: Row) -> None:
        """Print a row, and write it with all others."""
        self._rows.append((section, each))
        ratio = f", {each.value / each.bound:.2f} of {each.bound:.4g}" if each.bound else ""
        print(f"{section:10} {each.figure:58} {each.value:10.4g} {each.unit}{ratio} {each.note}", flush=True)
        stored = [
            {"section": name, **each.to_dict(), "ratio": each.value / each.bound if each.bound else None}
            for name, each in self._rows
        ]
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({**self._about, "rows": stored}, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path)

    def table(self) -> str:
        return table([each for _, each in self._rows])


# Sections in their order, and the seconds that each needs at most: it does not begin where fewer are left.
SECTIONS: dict[str, tuple[Callable[[Run], Iterator[Row]], float]] = {
    "ceilings": (rates.ceilings, 0),
    "goldens": (denoiser.goldens, 0),
    "weights": (denoiser.weights, 0),
    "eager": (denoiser.eager, 0),
    "memory": (denoiser.memory, 15),
    "queue": (denoiser.queue, 30),
    "decoder": (coders.decoder, 30),
    "coders": (coders.coders, 30),
    "sizes": (denoiser.sizes, 15),
    "compiled": (denoiser.compiled, 60),
    "float8": (denoiser.float8, 60),
    "compiled decoder": (coders.compiled_decoder, 60),
}


def machine(device: torch.device) -> dict[str, object]:
    """Describe the device and the versions that decide its speed."""
    about: dict[str, object] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": "CPU, toy widths" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),  # type: ignore[no-untyped-call]
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"capability": f"{properties.major}.{properties.minor}", "memory_gb": properties.total_memory / 1e9}
    return about


def measure(run: Run, report: Report, only: list[str]) -> None:
    """Run the sections. One that fails leaves a row with its error, and the next one runs."""
    for name, (section, needed_s) in SECTIONS.items():
        if only and name not in only:
            continue
        left_s = run.deadline_s - time.monotonic()
        if left_s < needed_s:
            report.add(name, row("not measured", 0, "", note=f"{left_s:.0f} s are left, it needs {needed_s:g}"))
            continue
        started_s = time.monotonic()
        try:
            with torch.no_grad():
                for each in section(run):
                    report.add(name, each)
        # Whatever a device, a driver or a missing package does: the other rows are still wanted.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            report.add(name, row("failed", 0, "", note=reason))
        run.free()
        report.add(name, row("time of this section", time.monotonic() - started_s, "s"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"), help="file to write (default out/gpu.json)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time in all (default 10)")
    parser.add_argument("--device", default="cuda", help="CUDA device (default cuda)")
    parser.add_argument("--cpu", action="store_true", help="toy widths on the CPU, to test the program")
    parser.add_argument("--only", nargs="+", default=[], choices=SECTIONS, help="only these sections")
    flags = parser.parse_args()
    device = torch.device("cpu" if flags.cpu else flags.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --cpu tests the program with toy widths")
    # Read at the first allocation, as services set it: states of different sizes come and go.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.manual_seed(0)
    run = Run(device, flags.cpu, time.monotonic() + 60 * flags.minutes)
    if run.is_toy:
        run = replace(run, sizes=((16, 16), (8, 8), (8, 16)))
    report = Report(flags.out, machine(device))
    measure(run, report, flags.only)
    print(f"\n{report.table()}\n\nwrote {report.path}")


if __name__ == "__main__":
    main()
