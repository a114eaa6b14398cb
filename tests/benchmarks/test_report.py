"""What `make bench` keeps."""

import json
from pathlib import Path

from benchmarks.__main__ import Report
from benchmarks.row import row

OLD = row("hop", 3.0, "ms", at_most=2.0, bound=0.0, beside={"gloo": 1.5}, note="busy")
NEW = row("hop", 1.0, "ms", at_most=2.0, bound=0.0, beside={"gloo": 1.5})
OTHER = row("share", 0.999, "", at_least=0.99)


def test_a_figure_that_is_measured_again_takes_its_place_and_leaves_the_others(tmp_path: Path) -> None:
    first = Report(tmp_path / "bench.json", ["share", "hops"], afresh=True)
    first.put("hops", [OLD])
    first.put("share", [OTHER])
    again = Report(tmp_path / "bench.json", ["share", "hops"], afresh=False)
    assert again.rows == [OTHER, OLD]
    again.put("hops", [NEW])
    assert Report(tmp_path / "bench.json", ["share", "hops"], afresh=False).rows == [OTHER, NEW]


def test_a_whole_run_forgets_the_one_before(tmp_path: Path) -> None:
    Report(tmp_path / "bench.json", ["hops"], afresh=True).put("hops", [OLD])
    assert Report(tmp_path / "bench.json", ["hops"], afresh=True).rows == []


def test_the_file_says_what_was_asked_whether_it_is_met_and_how_far_ahead_we_are(tmp_path: Path) -> None:
    Report(tmp_path / "bench.json", ["hops"], afresh=True).put("hops", [OLD])
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept["machine"]["cores"] >= 1
    assert kept["rows"] == [
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
