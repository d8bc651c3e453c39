"""Runs a command's coroutine and turns what goes wrong into one readable line and an exit code.

1: it failed. 2: it was asked wrongly (typer's own). 130: Ctrl-C.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

if TYPE_CHECKING:
    import grpc.aio

Result = TypeVar("Result")
# Of gRPC's words for it.
_CERTIFICATE_REFUSED = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification Check failed")


class CliError(Exception):
    """A failure whose message says what to do next."""


def run(command: Coroutine[Any, Any, Result], *, address: str = "") -> Result:
    """Run ``command`` to its end. ``address`` is the router's, for the message when it does not answer.

    Raises typer.Exit with the exit code of a failure, after its message went to stderr.
    """
    import grpc.aio
    import uvloop

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(command)
    except grpc.aio.AioRpcError as error:
        fail(explain(error, address=address))
    except CliError as error:
        fail(str(error))
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # The reader of our output has gone (head, less): nobody is there to tell. Python's flush at exit must
        # not meet the broken pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


def cancel_on_signals() -> None:
    """Let SIGINT and SIGTERM cancel the current task, as often as they come: the second cuts a slow stop short."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("signals are handled for a task")
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)


def fail(message: str) -> NoReturn:
    """Print ``message`` and end with exit code 1."""
    print(f"starmesh: {message}", file=sys.stderr)
    raise typer.Exit(1)


def explain(error: grpc.aio.AioRpcError, *, address: str) -> str:
    """One line for a failed call: what is wrong and what to do next."""
    import grpc

    from starmesh.rpc.status import from_rpc_error

    status = from_rpc_error(error)
    retry_delay_s = status.retry_delay_s
    if retry_delay_s is not None:
        message = status.message.removesuffix(" later").removesuffix("; try again")
        return f"{message}; try again in {max(retry_delay_s, 0.1):.1f} s"
    match status.code:
        case grpc.StatusCode.UNAVAILABLE if any(said in status.message for said in _CERTIFICATE_REFUSED):
            return (
                f"the certificate of {address} is not accepted: no CA of --tls-ca signed it, it is for another host, "
                "or it has expired"
            )
        case grpc.StatusCode.UNAVAILABLE if "Socket closed" in status.message:
            return f"{address} hangs up; if it speaks TLS, give --tls-ca, else look whether it is a router"
        case grpc.StatusCode.UNAVAILABLE:
            return f"no router answers at {address}; start a cluster with `starmesh up`, or name another with --address"
        case grpc.StatusCode.UNAUTHENTICATED:
            return f"{address} lets nobody in without a valid API key ({status.message}); give --api-key-file"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return "the time was over before the answer; give more with --timeout"
        case grpc.StatusCode.INVALID_ARGUMENT:
            return f"the request is not valid: {status.message}"
        case grpc.StatusCode.UNIMPLEMENTED:
            return f"what answers at {address} is no starmesh router; name another with --address"
        case grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN:
            return f"the router failed: {status.message}"
        case _:
            return status.message
