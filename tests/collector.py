"""An OpenTelemetry collector in this process, which records what OTLP exporters send it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import grpc.aio
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """Received data. endpoint: URL to export to. services: names. spans, units: of metrics, by name."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.services: set[str] = set()
        self.spans: list[Span] = []
        self.units: dict[str, str] = {}

    async def Export(  # noqa: N802
        self, request: ExportTraceServiceRequest | ExportMetricsServiceRequest, _: object
    ) -> ExportTraceServiceResponse | ExportMetricsServiceResponse:
        if isinstance(request, ExportMetricsServiceRequest):
            for metrics in request.resource_metrics:
                self._add_service(metrics.resource)
                self.units |= {each.name: each.unit for scope in metrics.scope_metrics for each in scope.metrics}
            return ExportMetricsServiceResponse()
        for spans in request.resource_spans:
            self._add_service(spans.resource)
            self.spans += [span for scope in spans.scope_spans for span in scope.spans]
        return ExportTraceServiceResponse()

    def _add_service(self, resource: Resource) -> None:
        self.services |= {each.value.string_value for each in resource.attributes if each.key == "service.name"}


@asynccontextmanager
async def collecting() -> AsyncGenerator[Collector, None]:
    """Run a collector while the body runs."""
    collector, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield collector
    await server.stop(None)
