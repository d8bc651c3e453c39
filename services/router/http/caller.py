"""Who calls: the API key, the name of the request and the trace that it continues.

Owns that a request counts against its key from before its body is read until its last byte is sent.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack

from fastapi import Request
from opentelemetry.context import Context

from services.router.http.errors import invalid
from services.router.validation import check_request_id
from starmesh.rpc.api_keys import ApiKeys, Scope
from starmesh.rpc.status import StatusError
from starmesh.telemetry.setup import context_of
from starmesh.v1 import inference_pb2

REQUEST_ID_HEADER = "x-request-id"


class Caller:
    """One HTTP request's."""

    def __init__(self, request: Request, keys: ApiKeys | None, admissions: ExitStack) -> None:
        self.key_id = ""
        self.trace: Context = context_of(request.headers.get("traceparent", ""))
        self._request = request
        self._keys = keys
        self._admissions = admissions
        self._admit()

    def count(self, requests: int) -> None:
        """Count all that it asks for against the key. Raises StatusError when they are more than it may have."""
        for _ in range(requests - 1):  # the first was counted as it came
            self._admit()

    def _admit(self) -> None:
        if self._keys is not None:
            admission = self._keys.admit(self._request.headers.get("authorization"), scope=Scope.GENERATE)
            self.key_id = self._admissions.enter_context(admission).key_id

    def name(self, wanted: str | None, requests: Sequence[inference_pb2.GenerateRequest]) -> str:
        """Name the requests behind this one, by the body's ``wanted``, else by the header, else by chance. Returns
        the name. Raises RequestRefused for one that cannot be."""
        header = self._request.headers.get(REQUEST_ID_HEADER, "")
        name = wanted if wanted is not None else header or secrets.token_hex(12)
        for index, request in enumerate(requests):
            request.request_id = name if len(requests) == 1 else f"{name}.{index}"
            try:
                check_request_id(request.request_id)
            except StatusError as error:
                param = "request_id" if wanted is not None else "X-Request-Id"
                raise invalid(param, error.message.partition(": ")[2]) from None
        # For errors: those before this point have no name to find them by.
        self._request.state.request_id = name
        return name


class Door:
    """Lets callers in; a dependency of the routes that need a key."""

    def __init__(self, keys: ApiKeys | None) -> None:
        self._keys = keys

    async def __call__(self, request: Request) -> AsyncIterator[Caller]:
        """Raises StatusError for who is not let in."""
        with ExitStack() as admissions:
            yield Caller(request, self._keys, admissions)
