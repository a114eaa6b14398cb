"""Our numbers equal the reference's."""

import torch

from tests.parity.conftest import RUNNERS
from tests.parity.dit import run_calls
from tests.parity.goldens import Golden, Report


def test_matches_golden(golden: Golden, report: Report) -> None:
    RUNNERS[golden.name](golden, report)
    assert report.compared, f"{golden.name}: nothing was compared"
    assert not report.failures, "\n".join(report.failures[:20])


def test_half_precision_stays_near_the_golden(streamed_golden: Golden) -> None:
    report = Report(streamed_golden.name)
    run_calls(streamed_golden, report, torch.bfloat16)
    assert report.worst_rel_rms > 1e-4, "that was not half precision"
    assert not report.failures, "\n".join(report.failures[:20])
