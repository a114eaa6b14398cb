"""Tests of avatar.telemetry."""

import asyncio
import json
import logging
import os
import re
import secrets
import sys
from typing import Any

import grpc.aio
import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext

from avatar import telemetry
from avatar.telemetry import block_span, log_formatter, session_span, set_up, tag, text_span
from services.local.processes import free_ports
from tests.collector import collecting

# Those that PROGRAM records.
SPANS = ["avatar.session", "avatar.audio"]
METRICS = ["avatar.block.duration"]
SECOND_NS = 1_000_000_000
WAIT_S = 30.0


def formatted(message: str, *args: object, exc_info: Any = None, **extra: object) -> dict[str, Any]:
    """Return a record's line in the log."""
    logger = logging.getLogger("avatar.tests")
    record = logger.makeRecord(logger.name, logging.WARNING, "file.py", 1, message, args, exc_info, extra=extra)
    record.created, record.msecs = 86400.25, 250.0
    text = log_formatter().format(record)
    assert "\n" not in text
    line: dict[str, Any] = json.loads(text)
    return line


def test_a_log_line_is_an_object_with_time_level_logger_and_message() -> None:
    assert formatted("it is %s", "late") == {
        "time": "1970-01-02T00:00:00.250Z",
        "level": "WARNING",
        "logger": "avatar.tests",
        "message": "it is late",
    }


def test_extra_fields_are_keys_of_the_line() -> None:
    line = formatted("stream ended", session="a", duration_s=1.5, stages=["audio", "vae"], code=grpc.StatusCode.OK)
    assert line["session"] == "a"
    assert line["duration_s"] == 1.5
    assert line["stages"] == ["audio", "vae"]
    assert line["code"] == "StatusCode.OK", "JSON does not support it"


def test_a_traceback_is_a_key_of_the_line() -> None:
    try:
        raise KeyError("nobody\nhere")
    except KeyError:
        line = formatted("failed", exc_info=sys.exc_info())
    assert line["message"] == "failed"
    assert line["traceback"].startswith("Traceback (most recent call last):\n")
    assert line["traceback"].endswith("KeyError: 'nobody\\nhere'")


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    return span


def ids(context: SpanContext | None) -> tuple[str, str]:
    """Return the ids of the trace and of the span, as a traceparent writes them."""
    assert context is not None
    return trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)


def ids_of(traceparent: str) -> tuple[str, ...]:
    version, *names, flags = traceparent.split("-")
    assert version == "00"
    assert int(flags, 16) & 1, "sampled"
    return tuple(names)


def test_a_block_of_the_first_stage_starts_a_trace(spans: InMemorySpanExporter) -> None:
    traceparent = block_span("audio", 7, 3 * SECOND_NS, 4 * SECOND_NS)
    span = only(spans)
    assert span.name == "avatar.audio"
    assert span.parent is None
    assert dict(span.attributes or {}) == {"avatar.stage": "audio", "avatar.block.index": 7}
    assert (span.start_time, span.end_time) == (3 * SECOND_NS, 4 * SECOND_NS)
    assert ids_of(traceparent) == ids(span.context)
    assert not span.links


def test_later_stages_are_children_of_the_first_and_pass_its_context_on(spans: InMemorySpanExporter) -> None:
    parent = block_span("audio", 7, 0, 0)
    first = only(spans)
    spans.clear()
    assert block_span("denoiser", 7, 0, 0, level=2, parent=parent) == parent
    span = only(spans)
    assert span.name == "avatar.denoiser"
    assert dict(span.attributes or {}) == {"avatar.stage": "denoiser", "avatar.level": 2, "avatar.block.index": 7}
    assert ids(span.parent) == ids(first.context) == ids_of(parent)


def test_a_block_links_to_its_session(spans: InMemorySpanExporter) -> None:
    session = session_span("abc")
    opened = only(spans)
    assert opened.name == "avatar.session"
    assert dict(opened.attributes or {}) == {"avatar.session": telemetry.tag("abc")}
    assert ids_of(session) == ids(opened.context)
    spans.clear()
    block_span("audio", 0, 0, 0, link=session)
    span = only(spans)
    assert [ids(link.context) for link in span.links] == [ids(opened.context)]
    assert ids(span.context)[0] != ids(opened.context)[0], "a trace of a whole session would last hours"


@pytest.mark.parametrize("text", ["nonsense", "00-0-0-00", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_an_invalid_trace_context_is_ignored(spans: InMemorySpanExporter, text: str) -> None:
    block_span("audio", 0, 0, 0, parent=text, link=text)
    span = only(spans)
    assert span.parent is None
    assert not span.links


def recorded(reader: InMemoryMetricReader) -> dict[str, Any]:
    """Return all of our metrics by name; libraries of other tests measure, too."""
    data = reader.get_metrics_data()
    assert data is not None
    return {
        metric.name: metric
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        if scope.scope.name == "avatar"
        for metric in scope.metrics
    }


def test_every_metric_has_a_prefixed_name_and_a_unit(measured: InMemoryMetricReader) -> None:
    instruments = [each for each in vars(telemetry).values() if isinstance(each, metrics.Instrument)]
    for each in instruments:
        if isinstance(each, metrics.Histogram):
            each.record(0)
        elif hasattr(each, "set"):
            each.set(0)  # a gauge, whose class is not public
        else:
            assert isinstance(each, metrics.Counter | metrics.UpDownCounter)
            each.add(0)
    found = recorded(measured)
    assert len(found) == len(instruments)
    for name, metric in found.items():
        assert re.fullmatch(r"(avatar|rpc)(\.[a-z_]+)+", name)
        assert re.fullmatch(r"s|By|1|\{[a-z]+\}", metric.unit), f"{name} has the unit {metric.unit!r}"
        assert metric.description


def test_a_blocks_durations_are_recorded_by_stage_and_level(measured: InMemoryMetricReader) -> None:
    block_span("denoiser", 0, 0, SECOND_NS // 4, 0.5, level=63)
    found = recorded(measured)
    for name, value in (("duration", 0.25), ("queue_wait", 0.5)):
        points = found[f"avatar.block.{name}"].data.data_points
        (point,) = (point for point in points if point.attributes.get("level") == 63)
        assert dict(point.attributes) == {"stage": "denoiser", "level": 63}
        assert (point.count, point.sum) == (1, value)


def test_a_block_without_a_device_queue_records_no_wait(measured: InMemoryMetricReader) -> None:
    block_span("encode", 0, 0, 0, level=62)
    points = recorded(measured)["avatar.block.queue_wait"].data.data_points
    assert not [point for point in points if point.attributes.get("level") == 62]


def test_embedding_a_prompt_is_recorded_apart_from_reading_it(
    measured: InMemoryMetricReader, spans: InMemorySpanExporter
) -> None:
    def counts() -> dict[Any, int]:
        points = recorded(measured)["avatar.text.duration"].data.data_points
        return {point.attributes.get("kept"): point.count for point in points}

    text_span(0, 1, kept=False)
    text_span(0, 1, kept=True)
    before = counts()
    spans.clear()
    text_span(3 * SECOND_NS, 4 * SECOND_NS, kept=False)
    assert counts() == {**before, False: before[False] + 1}
    span = only(spans)
    assert (span.name, span.start_time, span.end_time) == ("avatar.text", 3 * SECOND_NS, 4 * SECOND_NS)
    assert dict(span.attributes or {}) == {"avatar.kept": False}


async def run(program: str, **environment: str) -> tuple[str, list[dict[str, Any]]]:
    """Run a program; return its output and the lines that it logs."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        env={**plain, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, log = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == 0, log.decode()
    return out.decode(), [json.loads(line) for line in log.splitlines()]


PROGRAM = """
import logging, sys
from avatar import telemetry
telemetry.set_up("avatar-test", "info")
logging.getLogger("avatar.tests").debug("hidden")
logging.getLogger("avatar.tests").info("shown", extra={"port": 7000})
session = telemetry.session_span("abc")
print(repr(telemetry.block_span("audio", 0, 0, 0, link=session)))
print("opentelemetry.sdk" in sys.modules)
"""


@pytest.mark.parametrize("environ", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}])
async def test_nothing_is_exported_without_an_endpoint(environ: dict[str, str]) -> None:
    out, log = await run(PROGRAM, **environ)
    assert out.split() == ["''", "False"]
    assert [(line["message"], line["port"], line["level"]) for line in log] == [("shown", 7000, "INFO")]


@pytest.mark.parametrize(
    ("switches", "service", "spans", "metrics"),
    [
        ({}, "avatar-test", SPANS, METRICS),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_SERVICE_NAME": "denoiser-eu"}, "denoiser-eu", [], METRICS),
        (
            {"OTEL_METRICS_EXPORTER": "none", "OTEL_RESOURCE_ATTRIBUTES": "service.name=denoiser-eu"},
            *("denoiser-eu", SPANS, []),
        ),
    ],
)
async def test_spans_and_metrics_are_exported_to_the_endpoint(
    switches: dict[str, str], service: str, spans: list[str], metrics: list[str]
) -> None:
    async with collecting() as collector:
        await run(PROGRAM, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint, **switches)
    assert collector.services == {service}
    assert [span.name for span in collector.spans] == spans
    assert list(collector.units) == metrics


async def test_metrics_are_served_over_http() -> None:
    (port,) = free_ports(1)
    program = f"""
import urllib.request
from avatar import telemetry
telemetry.set_up("avatar-test", "info")
telemetry.block_span("denoiser", 0, 0, 10**9 // 4, level=2)
with urllib.request.urlopen("http://127.0.0.1:{port}/metrics") as answer:
    print(answer.read().decode())
"""
    out, _ = await run(program, OTEL_METRICS_EXPORTER="prometheus", OTEL_EXPORTER_PROMETHEUS_PORT=str(port))
    lines = [line for line in out.splitlines() if line.startswith("avatar_block_duration_seconds_bucket")]
    counted = {line.partition('le="')[2].partition('"')[0]: line.rpartition(" ")[2] for line in lines}
    assert (counted["0.2"], counted["0.32"], counted["0.48"]) == ("0.0", "1.0", "1.0")
    assert all('level="2"' in line and 'stage="denoiser"' in line for line in lines)
    assert "target_info{" in out
    assert 'service_name="avatar-test"' in out


@pytest.mark.parametrize(
    ("log_level", "environ", "words"),
    [
        ("LOUD", {}, "LOUD"),
        (
            "info",
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/protobuf', expected 'grpc'",
        ),
        (
            "info",
            {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": "99999"},
            "OTEL_EXPORTER_PROMETHEUS_HOST, _PORT: no server at localhost:99999",
        ),
    ],
)
def test_an_unusable_setting_is_named(log_level: str, environ: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        set_up("avatar-test", log_level, environ)


def test_a_tag_identifies_a_session_without_revealing_its_id() -> None:
    name = "pZ3kq9Yb7dQ1xR5t"
    assert tag(name) == tag(name) != tag(name + "x")
    assert re.fullmatch("[0-9a-f]{12}", tag(name))
    assert name not in tag(name)


@pytest.mark.parametrize("mark", ["", "0123456789abcdef"])
def test_a_text_keeps_no_session_id_and_everything_else(mark: str) -> None:
    for _ in range(200):
        session_id = mark + secrets.token_urlsafe(24)
        around = 'File "/usr/lib/python3.11/site.py", line 3, in test_a_name_of_many_words_in_lower_case_letters\n'
        text = f"{around}KeyError: '{session_id}' avatar:session:{{{session_id}}}"
        shown = f"{around}KeyError: '{tag(session_id)}' avatar:session:{{{tag(session_id)}}}"
        assert telemetry.without_session_ids(text) == shown
