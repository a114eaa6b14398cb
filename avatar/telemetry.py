"""Logs, traces, and the list of every metric.

Logs are one JSON object a line. Traces and metrics are exported by OTLP over gRPC when OTEL_EXPORTER_OTLP_ENDPOINT (or
the one for traces or metrics alone) is set; metrics can be read at http://HOST:9464/metrics when OTEL_METRICS_EXPORTER
names `prometheus`. They cost next to nothing when neither is. A block is a trace: its audio stage is the root span,
every other stage is a child, and `traceparent` rides on the block; the root links to the session's span.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.trace import Link, SpanContext
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_tracer = trace.get_tracer("avatar")
_meter = metrics.get_meter("avatar")
_propagator = TraceContextTextMapPropagator()

# A block is 0.48 s of video: what takes longer at a stage is not real time. Streams last minutes.
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.48, 0.75, 1, 2.5, 5, 10, 60, 600)


def _durations(name: str, description: str) -> metrics.Histogram:
    return _meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=BUCKETS_S)


# Every metric of the suite. Labels: `service`, `stage` (audio, denoiser, vae, encode), `level`, `reason`, `kept`, and
# those of the RPC conventions; never a session's name.
BLOCK_DURATION = _durations("avatar.block.duration", "Computing one block at one stage")
BLOCK_WAIT = _durations("avatar.block.queue_wait", "Waiting of one block for its stage's device")
SESSIONS_ACTIVE = _meter.create_up_down_counter("avatar.session.active", "{session}", "Streams open at a service")
SESSIONS_CAPACITY = _meter.create_up_down_counter("avatar.session.capacity", "{session}", "Streams a worker takes")
SESSIONS_CLOSED = _meter.create_counter("avatar.session.closed", "{session}", "Streams that ended, by reason")
REBUILD_DURATION = _durations("avatar.rebuild.duration", "Opening a lost stream at another worker")
TEXT_DURATION = _durations("avatar.text.duration", "Embedding one prompt, or finding it kept")
TIME_TO_FIRST_FRAME = _durations("avatar.time_to_first_frame", "From the first sound to the first frame")
RPC_DURATION = _durations("rpc.server.call.duration", "Duration of inbound calls")

# Attributes that every LogRecord has; what else it has came as `extra`.
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: time, level, logger, message, extra fields, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update((key, value) for key, value in vars(record).items() if key not in _PLAIN)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up(service: str, log_level: str, environ: Mapping[str, str] = os.environ) -> None:
    """Configure the process: logs to standard error, and what the usual variables of OpenTelemetry ask for.

    service: its name in traces and metrics, unless OTEL_SERVICE_NAME says otherwise.
    ValueError if there is no such log level, OTLP is asked for by another protocol than gRPC, or metrics cannot be
    served where the environment says.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=log_level.upper(), handlers=[handler], force=True)
    is_sent = any(
        name.startswith("OTEL_EXPORTER_OTLP") and name.endswith("ENDPOINT") and value for name, value in environ.items()
    )
    exporters = {name.strip() for name in environ.get("OTEL_METRICS_EXPORTER", "otlp").split(",")}
    if not is_sent and "prometheus" not in exporters:
        return
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource

    is_named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if is_named else {"service.name": service})
    readers: list[MetricReader] = []
    if "prometheus" in exporters:
        readers.append(_served(environ))
    if is_sent:
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


def _served(environ: Mapping[str, str]) -> Any:
    """What collects metrics when somebody asks for `/metrics`, and the server that they ask."""
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from prometheus_client import start_http_server

    host = environ.get("OTEL_EXPORTER_PROMETHEUS_HOST", "localhost")
    port = environ.get("OTEL_EXPORTER_PROMETHEUS_PORT", "9464")
    try:
        start_http_server(int(port), host)
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"OTEL_EXPORTER_PROMETHEUS_HOST, _PORT: no server at {host}:{port}: {error}") from error
    return PrometheusMetricReader()


def tag(session_id: str) -> str:
    """What logs and traces call a session: who knows its name can stream, so they do not say it."""
    return hashlib.sha256(session_id.encode()).hexdigest()[:12]


def session_span(session_id: str) -> str:
    """Mark a session's start with a span of its own; its traceparent, empty if traces are off."""
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
    links = [Link(context)] if (context := _span_context(link)).is_valid else []
    span = _tracer.start_span(
        f"avatar.{stage}",
        context=_propagator.extract({"traceparent": parent}) if parent else None,
        links=links,
        start_time=start_ns,
        attributes={**{f"avatar.{key}": value for key, value in labels.items()}, "avatar.block.index": index},
    )
    span.end(end_ns)
    return parent or _traceparent(span)


def text_span(start_ns: int, end_ns: int, *, kept: bool) -> None:
    """Record the embedding of one prompt, a trace of its own: its session has no name yet.

    start_ns, end_ns: wall clock, nanoseconds. kept: it was found in the store.
    """
    TEXT_DURATION.record((end_ns - start_ns) / 1e9, {"kept": kept})
    _tracer.start_span("avatar.text", start_time=start_ns, attributes={"avatar.kept": kept}).end(end_ns)


def _traceparent(span: trace.Span) -> str:
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def _span_context(traceparent: str) -> SpanContext:
    return trace.get_current_span(_propagator.extract({"traceparent": traceparent})).get_span_context()
