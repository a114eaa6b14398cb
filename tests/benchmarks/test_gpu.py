"""Tests of benchmarks.gpu, which is made for a CUDA device: its report, and all of it with toy widths on the CPU."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from avatar.denoiser.denoiser import Denoiser
from benchmarks import gpu
from benchmarks.one_device.denoiser import Stream, build
from benchmarks.one_device.phases import phase_times
from benchmarks.one_device.run import Run
from benchmarks.row import Row, row


def stored(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def test_every_row_is_written_before_the_next_and_a_failed_section_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = gpu.Report(tmp_path / "gpu.json", {"device": "none"})

    def broken(_: Run) -> Iterator[Row]:
        yield row("first", 2.0, "ms", bound=1.0)
        assert [each["figure"] for each in stored(report.path)] == ["first"]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    def late(_: Run) -> Iterator[Row]:
        raise AssertionError("it began")
        yield

    sections = {"broken": (broken, 0), "sound": (lambda _: iter([row("second", 1.0, "s")]), 0), "late": (late, 1e9)}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    gpu.measure(Run(torch.device("cpu"), True, time.monotonic() + 60), report, [])
    rows = [(each["section"], each["figure"]) for each in stored(report.path)]
    assert [each for each in rows if "time of" not in each[1]] == [
        ("broken", "first"),
        ("broken", "failed"),
        ("sound", "second"),
        ("late", "not measured"),
    ]
    assert stored(report.path)[0]["ratio"] == 2.0
    assert stored(report.path)[1]["note"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate"


def test_the_ceilings_and_the_goldens_are_measured_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run_on_cpu(tmp_path, monkeypatch, "--only", "ceilings", "goldens")
    assert all(each["met"] for each in rows if each["section"] == "goldens" and each["target"])
    products = {each["figure"] for each in rows if each["figure"].startswith("matrix product")}
    shapes = "64x64x64", "64x32x32", "64x32x64", "64x64x32"
    expected = {f"matrix product {shape}, {dtype}" for shape in shapes for dtype in ("bfloat16", "float8")}
    assert products == expected


def test_the_phases_of_a_step_add_up_to_it_and_leave_the_network_as_it_was() -> None:
    run = Run(torch.device("cpu"), True, time.monotonic() + 60)
    network = build(run)
    level = Denoiser(network, network.config, 1)
    stream = Stream(run, [level], (8, 16))
    latent = stream.step(0)
    found = phase_times(run, level, stream.block(1), stream.states[0])
    assert {"self-attention and its output", "feed-forward network", "audio injections"} < found.keys()
    assert sum(found.values()) == pytest.approx(2 * found["all"])
    assert min(found.values()) >= 0
    assert not any("forward" in vars(each) or "project" in vars(each) for each in network.modules())
    assert torch.equal(Stream(run, [level], (8, 16)).step(0), latent)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler warns
def test_it_runs_to_its_end_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run_on_cpu(tmp_path, monkeypatch)
    assert {each["section"] for each in rows} == set(gpu.SECTIONS)
    assert {each["section"] for each in rows if each["figure"] == "failed"} == {"float8"}, "which a CPU has not"
    assert "not measured" not in {each["figure"] for each in rows}
    recompilations = [each["value"] for each in rows if each["figure"].startswith("recompilations")]
    assert recompilations == [0]


def run_on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[dict[str, Any]]:
    """Run the program with toy widths; return its rows."""
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--cpu", "--minutes", "60", "--out", str(out), *arguments])
    gpu.main()
    return stored(out)


def test_a_machine_without_a_device_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no CUDA device; --cpu tests the program" in capsys.readouterr().err
