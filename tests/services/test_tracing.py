"""Tests of the suite's telemetry: one trace a block over all stages, and metrics without sessions."""

import logging
from collections import Counter, defaultdict

import pytest
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from avatar import telemetry
from avatar.client import connect
from avatar.errors import REASONS
from avatar.v1 import avatar_service_pb2 as pb
from tests.conftest import speech
from tests.product import (
    CLOSE,
    END_TURN,
    INTERRUPT,
    answer,
    connected,
    finish,
    frame,
    new_session,
    open_stream,
    pieces,
    send,
    speak,
)

STAGES = [("audio", None), ("denoiser", 0), ("denoiser", 1), ("denoiser", 2), ("vae", None), ("encode", None)]
LABELS = {
    "stage",
    "level",
    "reason",
    "kept",
    "service",
    "target",
    "rpc.system.name",
    "rpc.method",
    "rpc.response.status_code",
}


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    number: int = span.context.span_id
    return number


def linked(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


def traces(spans: InMemorySpanExporter) -> dict[int, list[ReadableSpan]]:
    """Return the spans of blocks by trace, in the order in which they started."""
    found = defaultdict(list)
    for span in sorted(spans.get_finished_spans(), key=lambda span: span.start_time or 0):
        if span.name != "avatar.session":
            assert span.context is not None
            found[span.context.trace_id].append(span)
    return found


async def test_a_block_is_one_trace_over_all_stages(gateway: str, picture: bytes, spans: InMemorySpanExporter) -> None:
    async with connected(gateway) as stub:
        session = await new_session(stub, picture)
        streamed = await speak(stub, session.id, speech(1.5))
    (opened,) = (span for span in spans.get_finished_spans() if span.name == "avatar.session")
    assert (opened.attributes or {})["avatar.session"] == telemetry.tag(session.id)
    blocks = traces(spans)
    assert len(blocks) == streamed.closed.num_blocks == 4
    indexes = []
    for first, *later in blocks.values():
        attributes = [dict(span.attributes or {}) for span in (first, *later)]
        assert [(each["avatar.stage"], each.get("avatar.level")) for each in attributes] == STAGES
        assert first.parent is None
        assert linked(first) == [span_id(opened)]
        assert [span.parent and span.parent.span_id for span in later] == [span_id(first)] * len(later)
        (index,) = {each["avatar.block.index"] for each in attributes}
        indexes.append(index)
    assert set(indexes) == {0, 1, 2, 3}


async def test_sessions_have_traces_of_their_own(gateway: str, picture: bytes, spans: InMemorySpanExporter) -> None:
    async with connected(gateway) as stub:
        for _ in range(2):
            await speak(stub, (await new_session(stub, picture)).id, speech(0.5))
    opened = [span_id(span) for span in spans.get_finished_spans() if span.name == "avatar.session"]
    assert len(opened) == 2
    assert {each for first, *_ in traces(spans).values() for each in linked(first)} == set(opened)


async def test_no_metric_knows_a_session(gateway: str, picture: bytes, measured: InMemoryMetricReader) -> None:
    async with connected(gateway) as stub:
        session = await new_session(stub, picture)
        await speak(stub, session.id, speech(0.5))
    data = measured.get_metrics_data()
    assert data is not None
    points = {
        metric.name: [dict(point.attributes or {}) for point in metric.data.data_points]
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name.startswith(("avatar.", "rpc."))  # libraries of other tests measure, too
    }
    for name in (
        "avatar.block.duration",
        "avatar.session.active",
        "avatar.session.closed",
        "avatar.time_to_first_frame",
        "rpc.server.call.duration",
    ):
        assert name in points
    for labels in (labels for each in points.values() for labels in each):
        assert set(labels) <= LABELS
        assert session.id not in map(str, labels.values())


async def test_healthy_streams_log_no_warning(
    gateway: str, picture: bytes, measured: InMemoryMetricReader, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(gateway) as stub:
        await speak(stub, (await new_session(stub, picture)).id, speech(0.5))
        call, _ = await open_stream(stub, (await new_session(stub, picture)).id, mode=pb.OpenAvatar.MODE_LIVE)
        await frame(call)  # an idle block comes before the first audio
        await send(call, [*pieces(speech(1.0)), END_TURN, END_TURN])
        while not (await answer(call)).event.HasField("playback_started"):
            pass
        await finish(call, [INTERRUPT, *pieces(speech(0.3)), CLOSE])
    assert measured.get_metrics_data() is not None
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def counts(reader: InMemoryMetricReader, name: str, *labels: str) -> Counter[str]:
    """Return how often a metric was recorded so far, by the values of labels."""
    data = reader.get_metrics_data()
    assert data is not None
    found: Counter[str] = Counter()
    for metric in (each for at in data.resource_metrics for scope in at.scope_metrics for each in scope.metrics):
        if metric.name == name:
            for point in metric.data.data_points:
                assert isinstance(point, HistogramDataPoint | NumberDataPoint)
                count = point.count if isinstance(point, HistogramDataPoint) else point.value
                found[" ".join(str((point.attributes or {}).get(label, "")) for label in labels)] += int(count)
    return found


async def test_a_healthy_stream_is_no_failed_or_cancelled_call(
    measured: InMemoryMetricReader, gateway: str, picture: bytes
) -> None:
    calls = ("rpc.server.call.duration", "rpc.response.status_code", "rpc.method")
    calls_before, closed_before = counts(measured, *calls), counts(measured, "avatar.session.closed", "reason")
    failed = counts(measured, "avatar.call.failed", "reason")
    async with connect(gateway) as avatar:
        session = await avatar.create(picture)
        async with session.stream(audio=speech(0.5)) as stream:
            assert [frame async for frame in stream.frames()]
    new = counts(measured, *calls) - calls_before
    assert [call for call in new if not call.startswith("OK ")] == []
    assert counts(measured, "avatar.session.closed", "reason") - closed_before == {"CLOSED": 1}
    assert counts(measured, "avatar.call.failed", "reason") == failed


async def test_counters_are_there_before_anything_is_counted(measured: InMemoryMetricReader, gateway: str) -> None:
    assert gateway
    for name in ("avatar.call.failed", "avatar.session.closed"):
        assert set(counts(measured, name, "reason")) >= set(REASONS)
    assert set(counts(measured, "avatar.stream.rebuilt", "stage")) >= {"audio", "denoiser", "vae"}
