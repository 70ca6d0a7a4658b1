"""OpenTelemetry traces, when `OTEL_EXPORTER_OTLP_ENDPOINT` names where they go."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from controlplane.rpc.call import Call

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


class Traces:
    """One span per RPC, a child of the caller's `traceparent`; nothing, and at no cost, without an endpoint."""

    def __init__(self) -> None:
        self._provider = _provider() if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") else None

    @property
    def on(self) -> bool:
        """Whether there is an endpoint."""
        return self._provider is not None

    @contextmanager
    def span(self, call: Call) -> Iterator[None]:
        """Make the body one span."""
        from opentelemetry import trace  # noqa: PLC0415 - 15 MB that only an installation with traces pays
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        if self._provider is None:
            yield
            return
        with self._provider.get_tracer("controlplane").start_as_current_span(
            call.rpc.path.removeprefix("/"),
            context=TraceContextTextMapPropagator().extract(call.metadata),
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.method": call.rpc.name, "htx.request_id": call.request_id},
        ):
            yield

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def _provider() -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    provider = TracerProvider(resource=Resource.create({"service.name": "htx-controlplane"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
