"""Logs, traces, and the list of every metric.

Logs are one JSON object a line. Traces and metrics are exported by OTLP over gRPC if OTEL_EXPORTER_OTLP_ENDPOINT (or
the variable for traces or metrics alone) is set; metrics are served at http://HOST:9464/metrics if
OTEL_METRICS_EXPORTER names `prometheus`. With neither, both cost next to nothing. A block is a trace: its audio stage
is the root span, every other stage is a child, and `traceparent` travels with the block; the root links to the
session's span.
"""

import hashlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.trace import Link
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pythonjsonlogger.json import JsonFormatter

_tracer = trace.get_tracer("avatar")
_meter = metrics.get_meter("avatar")
_propagator = TraceContextTextMapPropagator()

# A block is 0.16, 0.32 or 0.48 s of video: a stage that takes longer is slower than real time. Streams last minutes.
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.16, 0.2, 0.32, 0.48, 0.75, 1, 1.5, 2.5, 5, 10, 20, 30, 60, 600)


def _durations(name: str, description: str) -> metrics.Histogram:
    return _meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=BUCKETS_S)


# Every metric of the suite. Labels: `service`, `stage` (audio, denoiser, vae, encode), `level`, `reason`, `kept`,
# `target` (an address in the settings), and those of the RPC conventions; never a session's id. Whoever counts by
# `reason` or `stage` starts each of its series at 0: Prometheus sees no rate in a series that starts at 1.
BLOCK_DURATION = _durations("avatar.block.duration", "Computing one block at one stage")
BLOCK_VIDEO = _meter.create_gauge("avatar.block.video", "s", "Duration of the video of one block, from the decoder")
BLOCK_WAIT = _durations("avatar.block.queue_wait", "Waiting time of one block for its stage's device")
SESSIONS_ACTIVE = _meter.create_up_down_counter("avatar.session.active", "{session}", "Streams open at a service")
SESSIONS_CAPACITY = _meter.create_up_down_counter("avatar.session.capacity", "{session}", "Streams a worker takes")
SESSIONS_CLOSED = _meter.create_counter("avatar.session.closed", "{session}", "Streams that ended, by reason")
CALLS_FAILED = _meter.create_counter("avatar.call.failed", "{call}", "Calls that ended with an error, by reason")
STREAMS_REBUILT = _meter.create_counter("avatar.stream.rebuilt", "{stream}", "Lost streams that were opened again")
REBUILD_DURATION = _durations("avatar.rebuild.duration", "Opening a lost stream again")
WORKERS = _meter.create_gauge(
    "avatar.worker.answering", "{worker}", "Workers that answer at an address of the settings"
)
TEXT_DURATION = _durations("avatar.text.duration", "Embedding one prompt, or reading it from the store")
TEXT_UNSPOKEN = _meter.create_counter(
    "avatar.text.unspoken", "{turn}", "Turns whose text was not spoken to its end, and refused text, by reason"
)
VOICE_LATENCY = _durations("avatar.voice.latency", "From a sentence to its first sound")
TIME_TO_FIRST_FRAME = _durations("avatar.time_to_first_frame", "From the first audio to the first frame")
RPC_DURATION = _durations("rpc.server.call.duration", "Duration of inbound calls")


def log_formatter() -> logging.Formatter:
    """Return the formatter of log lines: a JSON object each.

    Its keys are time (UTC), level, logger, message, the record's extra fields, and traceback if there is one. A value
    that JSON does not support is written as text.
    """
    names = {"asctime": "time", "levelname": "level", "name": "logger", "message": "message"}
    formatter = JsonFormatter(list(names), rename_fields={**names, "exc_info": "traceback"}, json_default=str)
    formatter.converter = time.gmtime
    formatter.default_time_format, formatter.default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"
    return formatter


def set_up(service: str, log_level: str, environ: Mapping[str, str] = os.environ) -> None:
    """Configure the process: logs to standard error, and the exporters that OpenTelemetry's variables ask for.

    service: its name in traces and metrics, unless OTEL_SERVICE_NAME gives another.
    ValueError if the log level does not exist, if OTEL_EXPORTER_OTLP_PROTOCOL is not gRPC, or if metrics cannot be
    served at the given host and port.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(log_formatter())
    logging.basicConfig(level=log_level.upper(), handlers=[handler], force=True)
    is_exported = any(
        name.startswith("OTEL_EXPORTER_OTLP") and name.endswith("ENDPOINT") and value for name, value in environ.items()
    )
    exporters = {name.strip() for name in environ.get("OTEL_METRICS_EXPORTER", "otlp").split(",")}
    if not is_exported and "prometheus" not in exporters:
        return
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource

    is_named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if is_named else {"service.name": service})
    readers: list[MetricReader] = []
    if "prometheus" in exporters:
        readers.append(_serve_metrics(environ))
    if is_exported:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        protocol = environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        if protocol != "grpc":
            raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}, expected 'grpc'")
        if environ.get("OTEL_TRACES_EXPORTER") != "none":
            tracing = TracerProvider(resource=resource)
            tracing.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
            trace.set_tracer_provider(tracing)
        if "otlp" in exporters:
            readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
    if readers:
        metrics.set_meter_provider(MeterProvider(resource=resource, metric_readers=readers))


def shut_down(within_s: float) -> None:
    """Export the spans and metrics that wait, and stop exporting. What takes longer than `within_s` seconds is lost."""

    def export() -> None:
        for provider in (trace.get_tracer_provider(), metrics.get_meter_provider()):
            if hasattr(provider, "shutdown"):
                provider.shutdown()

    exporting = threading.Thread(target=export, daemon=True)
    exporting.start()
    exporting.join(within_s)


def _serve_metrics(environ: Mapping[str, str]) -> Any:
    """Start the HTTP server of `/metrics`; return the reader that collects metrics on each request."""
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from prometheus_client import start_http_server

    host = environ.get("OTEL_EXPORTER_PROMETHEUS_HOST", "localhost")
    port = environ.get("OTEL_EXPORTER_PROMETHEUS_PORT", "9464")
    try:
        start_http_server(int(port), host)
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"OTEL_EXPORTER_PROMETHEUS_HOST, _PORT: no server at {host}:{port}: {error}") from error
    return PrometheusMetricReader()


# 192 random bits in URL-safe base64, behind a tenant's mark of 16 digits if there is one. Names in code have neither
# capitals nor digits at this length.
_SESSION_ID = re.compile(r"(?<![\w-])(?=[\w-]*[A-Z0-9])[\w-]{32}(?:[\w-]{16})?(?![\w-])", re.ASCII)


def tag(session_id: str) -> str:
    """Return a session's name in logs and traces: a hash, since anyone who has its id can stream."""
    return hashlib.sha256(session_id.encode()).hexdigest()[:12]


def without_session_ids(text: str) -> str:
    """Return a text, such as a traceback, with a tag in place of everything that may be a session's id."""
    return _SESSION_ID.sub(lambda found: tag(found[0]), text)


def session_span(session_id: str) -> str:
    """Record a session's start as a span of its own; return its traceparent, empty if traces are off."""
    span = _tracer.start_span("avatar.session", attributes={"avatar.session": tag(session_id)})
    span.end()
    return _traceparent(span)


def block_span(
    stage: str,
    index: int,
    start_ns: int,
    end_ns: int,
    waited_s: float | None = None,
    *,
    level: int | None = None,
    parent: str = "",
    link: str = "",
) -> str:
    """Record one stage's step of one block as a span and metrics; return its traceparent, empty if traces are off.

    start_ns, end_ns: wall clock, nanoseconds. waited_s: seconds in the device's queue; None if there is no queue.
    parent, link: traceparents of the block and of the session.
    """
    labels: dict[str, str | int] = {"stage": stage} if level is None else {"stage": stage, "level": level}
    BLOCK_DURATION.record((end_ns - start_ns) / 1e9, labels)
    if waited_s is not None:
        BLOCK_WAIT.record(waited_s, labels)
    session = trace.get_current_span(_propagator.extract({"traceparent": link})).get_span_context()
    span = _tracer.start_span(
        f"avatar.{stage}",
        context=_propagator.extract({"traceparent": parent}) if parent else None,
        links=[Link(session)] if session.is_valid else [],
        start_time=start_ns,
        attributes={**{f"avatar.{key}": value for key, value in labels.items()}, "avatar.block.index": index},
    )
    span.end(end_ns)
    return parent or _traceparent(span)


def text_span(start_ns: int, end_ns: int, *, kept: bool) -> None:
    """Record the embedding of one prompt as a trace of its own, since its session has no id yet.

    start_ns, end_ns: wall clock, nanoseconds. kept: it came from the store.
    """
    TEXT_DURATION.record((end_ns - start_ns) / 1e9, {"kept": kept})
    _tracer.start_span("avatar.text", start_time=start_ns, attributes={"avatar.kept": kept}).end(end_ns)


def _traceparent(span: trace.Span) -> str:
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")
