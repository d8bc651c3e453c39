"""An OTLP receiver for where Jaeger cannot be had: prints each span as a line of JSON. Runs in starmesh's own image."""

import json
import sys
from collections.abc import Iterable
from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2

REQUEST_ID = "starmesh.request_id"
SERVICE = "service.name"


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes what the exporters of services send."""

    def Export(  # noqa: N802 - as the service calls it
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            service = _value(resource.resource.attributes, SERVICE)
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                request_id = _value(span.attributes, REQUEST_ID)
                line = {"trace": span.trace_id.hex(), "service": service, "name": span.name, "request": request_id}
                sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        return trace_service_pb2.ExportTraceServiceResponse()


def _value(attributes: Iterable[common_pb2.KeyValue], key: str) -> str:
    return next((item.value.string_value for item in attributes if item.key == key), "")


if __name__ == "__main__":
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Receiver(), server)  # type: ignore[no-untyped-call]
    server.add_insecure_port("0.0.0.0:4317")
    server.start()
    server.wait_for_termination()
