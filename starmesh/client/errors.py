"""What a caller sees of a failure: one exception type, made of a call's status."""

from __future__ import annotations

from typing import Self

import grpc

from starmesh.rpc.status import StatusError


class ClientError(Exception):
    """A request failed for good: it is not worth retrying, or it has been retried enough."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        retry_delay_s: float | None = None,
        fields: tuple[str, ...] = (),
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        """Says what to do."""
        self.retry_delay_s = retry_delay_s
        """Seconds after which the router would be asked again; None where asking again will not help."""
        self.fields = fields
        """The fields of the request that are to blame, as inference.proto names them."""

    @classmethod
    def of(cls, status: StatusError) -> Self:
        """The same as an exception of this package."""
        return cls(status.code, status.message, retry_delay_s=status.retry_delay_s, fields=tuple(status.fields))
