"""`pytest tests/parity --goldens DIR` runs every golden of a supported kind in DIR, and prints a row for each."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.parity import audio, checkpoint, dit, rollout, text, tiny_decoder, vae
from tests.parity.goldens import ABOUT, Golden, Report

RUNNERS = {
    **audio.RUNNERS,
    **checkpoint.RUNNERS,
    **dit.RUNNERS,
    **rollout.RUNNERS,
    **text.RUNNERS,
    **tiny_decoder.RUNNERS,
    **vae.RUNNERS,
}
# Goldens that are part of another one.
PARTS = {"rollout_vae_weights"}
# Schedules of the reference that are not supported, and why.
UNSUPPORTED = {
    "rollout_single_online": "the sink and the motion latents are encoded anew from frames",
    "rollout_blockwise": "audio is encoded chunk by chunk, without left context",
}
GOLDEN = "golden"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder: Path = metafunc.config.getoption("--goldens")
    streamed = {name for name, runner in RUNNERS.items() if runner is dit.run_calls}
    for fixture, supported in (("golden", RUNNERS.keys()), ("streamed_golden", streamed)):
        if fixture in metafunc.fixturenames:
            names = sorted(goldens_in(folder) & supported)
            metafunc.parametrize(fixture, [Golden(folder, name) for name in names], ids=names)


def goldens_in(folder: Path) -> set[str]:
    """Return the names of the goldens in a folder: a json and a safetensors of that name, or a folder with metadata."""
    files = {path.stem for path in folder.glob("*.safetensors") if path.with_suffix(".json").is_file()}
    return files | {path.parent.name for path in folder.glob(f"*/{ABOUT}")}


@pytest.fixture
def report(golden: Golden, request: pytest.FixtureRequest) -> Iterator[Report]:
    report = Report(golden.name)
    yield report
    # A test property reaches the process that prints the table, whichever process ran the test.
    request.node.user_properties.append((GOLDEN, asdict(report)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    ended = [each for kind in terminalreporter.stats.values() for each in kind]
    ended = [each for each in ended if getattr(each, "when", None) == "teardown"]
    reports = [Report(**value) for each in ended for name, value in each.user_properties if name == GOLDEN]
    if not reports:
        return
    write = terminalreporter.write_line
    write(f"\n{'golden':24} {'compared':>8} {'worst rel. RMS':>15} {'worst error':>12}  tolerance")
    for each in sorted(reports, key=lambda each: each.name):
        verdict = f"  {len(each.failures)} FAILED" if each.failures else ""
        write(
            f"{each.name:24} {each.compared:8} {each.worst_rel_rms:15.1e} {each.worst_abs:12.1e}"
            f"  {each.tolerance}{verdict}"
        )
    names = goldens_in(config.getoption("--goldens"))
    for name in sorted(names & UNSUPPORTED.keys()):
        write(f"{name:24} not kept: {UNSUPPORTED[name]}")
    unknown = sorted(names - RUNNERS.keys() - PARTS - UNSUPPORTED.keys())
    if unknown:
        write(f"not supported: {', '.join(unknown)}")
