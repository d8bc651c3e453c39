"""Which call of the router's gRPC services needs an API key, and of which scope.

Owns that table; what a key is, and what it allows, is ``starmesh.rpc.api_keys``. A service that is not in the table is
refused, so that none is open by being forgotten.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from services.router.metrics import RouterMetrics
from starmesh.rpc.api_keys import ApiKeys, Scope
from starmesh.rpc.guard import hold, refuse
from starmesh.rpc.status import StatusError
from starmesh.v1 import cluster_pb2, inference_pb2

_HEALTH: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_INFERENCE: Final = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
_CLUSTER: Final = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name
_SCOPES: Final[dict[str, Scope | None]] = {
    _INFERENCE: Scope.GENERATE,
    _CLUSTER: Scope.OPERATE,
    reflection.SERVICE_NAME: None,  # any key
}
# Generate and GenerateMany count each request for as long as it runs, which may be longer than the call. A client that
# has all its requests running can still resume or cancel one. Asking for the model before each request, as `starmesh
# generate` does, must not halve what a key allows.
_UNCOUNTED: Final = frozenset(
    (_INFERENCE, method) for method in ("Generate", "GenerateMany", "Resume", "Cancel", "GetModel")
)


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Lets calls in that come with the key they need; each counts against its limits until it ends, a stream too."""

    def __init__(self, keys: ApiKeys, metrics: RouterMetrics) -> None:
        self._keys = keys
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # no such method
        service, _, method = handler_call_details.method.removeprefix("/").partition("/")
        if service == _HEALTH:
            return handler
        sent = authorization(handler_call_details.invocation_metadata)
        try:
            if service not in _SCOPES:
                raise StatusError(grpc.StatusCode.PERMISSION_DENIED, f"{service} is not for clients")
            scope = _SCOPES[service]
            self._keys.check(sent, scope=scope)
        except StatusError as error:
            self._metrics.refused_call(error.code.name)
            return refuse(error)
        if scope is None or (service, method) in _UNCOUNTED:
            return handler
        return hold(handler, lambda _: self._admit(sent, scope))

    def _admit(self, sent: str | None, scope: Scope) -> AbstractContextManager[object]:
        with self._metrics.refused_calls_counted():
            return self._keys.admit(sent, scope=scope)


class Caller:
    """Who makes a call that has been let in, for handlers that tell callers apart or count for themselves."""

    def __init__(self, keys: ApiKeys | None, metadata: Any, metrics: RouterMetrics) -> None:
        """Without ``keys`` all callers are one, and nothing is counted."""
        self._keys = keys
        self._metrics = metrics
        self._sent = authorization(metadata)

    @property
    def key_id(self) -> str:
        """The id of the caller's key, empty without keys. Raises StatusError when it has been revoked meanwhile."""
        if self._keys is None:
            return ""
        with self._metrics.refused_calls_counted():
            return self._keys.check(self._sent, scope=Scope.GENERATE)

    def admit(self) -> AbstractContextManager[object]:
        """Count a request until the context ends. Raises StatusError beyond the limits of the key."""
        if self._keys is None:
            return nullcontext()
        with self._metrics.refused_calls_counted():
            return self._keys.admit(self._sent, scope=Scope.GENERATE)


def authorization(metadata: Any) -> str | None:
    """What a call's metadata says of its key."""
    for name, value in metadata or ():
        if name == "authorization":
            return value if isinstance(value, str) else None
    return None
