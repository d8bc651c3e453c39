"""An answer in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.router.http.choices import Choices
from services.router.http.errors import from_status
from services.router.http.formats import Format, Whole
from starmesh.rpc.status import StatusError
from starmesh.types import FinishReason

COALESCE_S: Final = 1.0
"""Seconds between two looks at an answer on its way: the end is told of at once, and nobody reads what comes before."""


class WholeAnswer(Response):
    """Runs the choices and sends them when all have ended. A client that goes away meanwhile ends them."""

    def __init__(
        self, choices: Choices, format_: Format, *, param_of: Callable[[str], str], headers: dict[str, str]
    ) -> None:
        super().__init__(headers=headers)
        self._choices = choices
        self._format = format_
        self._param_of = param_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises RequestRefused when one of them fails."""
        texts: list[list[str]] = [[] for _ in range(len(self._choices))]
        reasons = [FinishReason.STOP] * len(texts)
        try:
            async with self._choices.attended(receive) as choices:
                while choices.unfinished and not choices.gone:
                    await choices.wait()
                    for index, piece in () if choices.gone else choices.take():
                        texts[index].append(piece.text)
                        if piece.finish_reason is not None:
                            reasons[index] = piece.finish_reason
                if choices.gone:
                    return
                wholes = [Whole("".join(parts), reason) for parts, reason in zip(texts, reasons, strict=True)]
                body = self._format.whole(wholes, choices.usage)
        except StatusError as error:
            raise from_status(error, self._param_of) from None
        headers = {"x-request-id": self.headers["x-request-id"]}
        await Response(body.model_dump_json(), media_type="application/json", headers=headers)(scope, receive, send)
