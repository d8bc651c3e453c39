"""Answers only services of the mesh: those whose certificate is for its name.

TLS has checked by then that a CA signed it that the mesh trusts; that CA may have signed certificates for others too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import grpc
import grpc.aio

from starmesh.rpc.guard import Context, hold
from starmesh.rpc.status import StatusError

_NAMES = "x509_subject_alternative_name"


class MemberInterceptor(grpc.aio.ServerInterceptor):
    """For servers that require a client certificate."""

    def __init__(self, server_name: str) -> None:
        self._server_name = server_name

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        return None if handler is None else hold(handler, self._check)

    def _check(self, context: Context) -> AbstractContextManager[object]:
        if self._server_name.encode() not in context.auth_context().get(_NAMES, ()):
            raise StatusError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"the client's certificate is not for {self._server_name}; issue one with that name",
            )
        return nullcontext()
