"""The rows that `make bench` stores, and measurements that a machine is too slow for."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from benchmarks import live
from benchmarks.__main__ import Report, main
from benchmarks.pipeline.metrics import TooSlowError
from benchmarks.row import Row, row
from tests.client.scripted import CLOSED, frames, scripted

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


def test_a_measurement_that_fails_leaves_the_others_and_no_stale_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_slow(_: Path) -> list[Row]:
        raise TooSlowError("nothing arrived in time")

    Report(tmp_path / "bench.json", ["live"], afresh=True).put("live", [OLD])
    monkeypatch.setattr("benchmarks.live.rows", too_slow)
    monkeypatch.setattr("benchmarks.encoding.rows", lambda: [OTHER])
    monkeypatch.setattr("sys.argv", ["benchmarks", "--only", "live", "encoding", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="live: too slow to measure: nothing arrived in time"):
        main()
    assert "share" in (printed := capsys.readouterr().out)
    assert "hop" not in printed


@pytest.mark.parametrize("num_frames", [0, 2])
def test_a_live_stream_that_ends_early_is_too_slow_to_measure(
    num_frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def slow_gateway(*_: Path) -> AsyncGenerator[Any, None]:
        async with (
            scripted([*frames(*range(3, 3 + num_frames)), CLOSED]) as (target, gateway),
            grpc.aio.insecure_channel(target) as channel,
        ):
            assert gateway.calls
            yield pb_grpc.AvatarServiceStub(channel)

    monkeypatch.setattr(live, "all_services", slow_gateway)
    with pytest.raises(TooSlowError, match="the gateway ended the stream"):
        live.rows(tmp_path)
