"""``starmesh generate``: streams one answer to the terminal."""

from __future__ import annotations

import sys
import time

import grpc
import grpc.aio

from starmesh.cli.options import Asking
from starmesh.cli.router import CALL_TIMEOUT_S, RouterClient
from starmesh.cli.run import CliError
from starmesh.rpc.status import from_rpc_error
from starmesh.v1 import inference_pb2, sequence_pb2

_ENDS = {
    sequence_pb2.FINISH_REASON_STOP: "complete",
    sequence_pb2.FINISH_REASON_LENGTH: "cut by its length limit",
    sequence_pb2.FINISH_REASON_CANCELLED: "cancelled",
}
# What a model writes must not steer the terminal: no control characters but line feeds and tabs.
_HARMLESS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


async def generate(router: RouterClient, prompt: str, asking: Asking, *, timeout_s: float, quiet: bool) -> None:
    """Stream the answer to stdout and, unless ``quiet``, a line about it to stderr.

    Ending early, by Ctrl-C or a closed pipe, cancels the request.
    """
    chat = False
    if asking.chat is None:
        model = await router.inference.GetModel(inference_pb2.GetModelRequest(), timeout=CALL_TIMEOUT_S)
        chat = model.has_chat_template
    started_s = time.monotonic()
    first_token_s: float | None = None
    last = inference_pb2.GenerateResponse()
    on_terminal = sys.stdout.isatty()
    call = router.inference.Generate(asking.request(prompt, chat=chat), timeout=timeout_s)
    try:
        async for last in call:
            if first_token_s is None and last.token_ids:
                first_token_s = time.monotonic()
            sys.stdout.write(last.text.translate(_HARMLESS) if on_terminal else last.text)
            sys.stdout.flush()
    except grpc.aio.AioRpcError as error:
        if first_token_s is None:
            raise
        if not on_terminal:
            print(file=sys.stderr)
        if error.code() is grpc.StatusCode.UNAVAILABLE and from_rpc_error(error).retry_delay_s is None:
            raise CliError("the connection to the router broke in the middle of the answer; ask again") from None
        raise
    finally:
        call.cancel()
        if on_terminal:
            print(flush=True)
    if not quiet:
        # Elsewhere than on a terminal stdout gets the answer alone, which seldom ends a line.
        separator = "" if on_terminal else "\n"
        print(separator + _summary(last, started_s=started_s, first_token_s=first_token_s), file=sys.stderr)


def _summary(last: inference_pb2.GenerateResponse, *, started_s: float, first_token_s: float | None) -> str:
    usage = last.usage
    now_s = time.monotonic()
    parts = [f"{usage.output_tokens} tokens", _ENDS.get(last.finish_reason, "unfinished")]
    if first_token_s is not None:
        parts.append(f"first after {first_token_s - started_s:.2f} s")
        if usage.output_tokens > 1 and now_s > first_token_s:
            parts.append(f"then {(usage.output_tokens - 1) / (now_s - first_token_s):.1f} tokens/s")
    if usage.cached_tokens:
        parts.append(f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached")
    if usage.recoveries:
        parts.append(f"survived {usage.recoveries} instance failure{'s' if usage.recoveries > 1 else ''}")
    return f"[{', '.join(parts)}]"
