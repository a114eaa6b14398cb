"""The rows that `make bench` stores."""

import json
from pathlib import Path

from benchmarks.__main__ import Report
from benchmarks.row import row

OLD = row("hop", 3.0, "ms", at_most=2.0, bound=0.0, beside={"gloo": 1.5}, note="busy")
NEW = row("hop", 1.0, "ms", at_most=2.0, bound=0.0, beside={"gloo": 1.5})
OTHER = row("share", 0.999, "", at_least=0.99)


def test_a_repeated_measurement_replaces_its_rows_and_keeps_the_others(tmp_path: Path) -> None:
    first = Report(tmp_path / "bench.json", ["share", "hops"], afresh=True)
    first.put("hops", [OLD])
    first.put("share", [OTHER])
    again = Report(tmp_path / "bench.json", ["share", "hops"], afresh=False)
    assert again.rows == [OTHER, OLD]
    again.put("hops", [NEW])
    assert Report(tmp_path / "bench.json", ["share", "hops"], afresh=False).rows == [OTHER, NEW]


def test_a_full_run_discards_the_previous_one(tmp_path: Path) -> None:
    Report(tmp_path / "bench.json", ["hops"], afresh=True).put("hops", [OLD])
    assert Report(tmp_path / "bench.json", ["hops"], afresh=True).rows == []


def test_the_file_has_target_result_and_factor_over_peers(tmp_path: Path) -> None:
    Report(tmp_path / "bench.json", ["hops"], afresh=True).put("hops", [OLD])
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert stored["machine"]["cores"] >= 1
    assert stored["rows"] == [
        {
            "name": "hops",
            "figure": "hop",
            "value": 3.0,
            "unit": "ms",
            "target": 2.0,
            "is_least": False,
            "bound": 0.0,
            "beside": {"gloo": 1.5},
            "note": "busy",
            "met": False,
            "ahead": {"gloo": 0.5},
        }
    ]
