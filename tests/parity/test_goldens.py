"""Our numbers are the reference's."""

from tests.parity.conftest import RUNNERS
from tests.parity.goldens import Golden, Report


def test_matches_golden(golden: Golden, report: Report) -> None:
    RUNNERS[golden.name](golden, report)
    assert report.compared, f"{golden.name}: nothing was compared"
    assert not report.failures, "\n".join(report.failures[:20])
