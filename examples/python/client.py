"""Streams one answer of a starmesh cluster to the terminal, with gRPC and stubs generated from the protos alone.

What it shows, and its flags: ../README.md. Programs in Python have it easier with ``starmesh.client``.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from starmesh.v1 import inference_pb2, inference_pb2_grpc, sequence_pb2

RESUMES = 8  # tries to go on after the last message that came
CALL_TIMEOUT_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0

NEXT_STEPS = {
    grpc.StatusCode.UNAUTHENTICATED: "give a valid key with --api-key",
    grpc.StatusCode.PERMISSION_DENIED: "use a key that may do this",
    grpc.StatusCode.DEADLINE_EXCEEDED: "what was printed stays valid; allow more time with --deadline",
    grpc.StatusCode.UNAVAILABLE: "see whether a router listens there, and whether it wants TLS (--ca)",
}


def read_arguments():
    parser = argparse.ArgumentParser(description="Streams one answer of a starmesh cluster; flags: ../README.md")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--request-id", default="")
    parser.add_argument("--deadline", type=float, default=300.0)
    parser.add_argument("--resume-window", type=float, default=10.0)
    parser.add_argument("--cancel-after", type=int, default=0)
    parser.add_argument("--ca", type=read_file)
    parser.add_argument("--api-key", default=os.environ.get("STARMESH_API_KEY", ""))
    parser.add_argument("address")
    parser.add_argument("prompt")
    return parser.parse_args()


def read_file(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}: {error.strerror}") from None


def connect(address, ca):
    options = [
        # Notices within half a minute that a silent network has lost the router, and looks for it within a second.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]
    if ca is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca), options)


def find_detail(error, message_type):
    """The detail of that type in an error's google.rpc details; None if it is not there."""
    status = rpc_status.from_call(error)
    for packed in status.details if status is not None else ():
        detail = message_type()
        if packed.Unpack(detail):
            return detail
    return None


def next_step(error):
    """What a person does about an error, in one line."""
    if bad := find_detail(error, error_details_pb2.BadRequest):
        return "; ".join(f"change {violation.field}: {violation.description}" for violation in bad.field_violations)
    if retry := find_detail(error, error_details_pb2.RetryInfo):
        return f"ask again after {retry.retry_delay.ToMilliseconds() / 1000:g} s"
    return NEXT_STEPS.get(error.code(), "see the message")


def answer(router, arguments):
    """Stream the answer, through broken connections."""
    metadata = (("authorization", f"Bearer {arguments.api_key}"),) if arguments.api_key else ()
    window = Duration()
    window.FromMilliseconds(round(arguments.resume_window * 1000))
    ends_at = time.monotonic() + arguments.deadline
    request_id, tokens, resumes, tries, cancelled = arguments.request_id, 0, 0, 0, False
    message = inference_pb2.ChatMessage(role="user", content=arguments.prompt)
    request = inference_pb2.GenerateRequest(
        request_id=request_id, chat=inference_pb2.Chat(messages=[message]), resume_window=window
    )
    request.sampling.max_output_tokens = arguments.tokens
    call = router.Generate(request, timeout=arguments.deadline, metadata=metadata)
    while True:
        try:
            for response in call:
                tries = 0
                request_id, tokens = response.request_id, response.offset + len(response.token_ids)
                sys.stdout.write(response.text)
                sys.stdout.flush()
                if response.finish_reason:
                    reason = sequence_pb2.FinishReason.Name(response.finish_reason)
                    usage = response.usage
                    tell(
                        f"[{reason.removeprefix('FINISH_REASON_')}: {usage.prompt_tokens} prompt tokens, "
                        f"{usage.output_tokens} output tokens, {usage.recoveries} recoveries, "
                        f"{usage.migrations} migrations, {resumes} resumes]"
                    )
                elif arguments.cancel_after and tokens >= arguments.cancel_after and not cancelled:
                    cancelled = True
                    if arguments.resume_window:
                        cancel_request(router, request_id, metadata)
                    else:
                        call.cancel()  # enough where no stream of the request can follow
            return
        except grpc.RpcError as error:
            if cancelled and error.code() is grpc.StatusCode.CANCELLED:
                tell(f"[cancelled by ending the call: {tokens} output tokens]")
                return
            # The router keeps the request for the resume window: go on behind the last token that came.
            told_to_wait = find_detail(error, error_details_pb2.RetryInfo) is not None
            broken = error.code() is grpc.StatusCode.UNAVAILABLE and not told_to_wait
            if not (broken and arguments.resume_window and tokens and tries < RESUMES):
                raise
            time.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**tries))
            tries, resumes = tries + 1, resumes + 1
            resume = inference_pb2.ResumeRequest(request_id=request_id, offset=tokens)
            call = router.Resume(resume, timeout=max(0.0, ends_at - time.monotonic()), metadata=metadata)


def cancel_request(router, request_id, metadata):
    try:
        router.Cancel(inference_pb2.CancelRequest(request_id=request_id), timeout=CALL_TIMEOUT_S, metadata=metadata)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:  # otherwise it has just ended
            raise


def tell(line):
    sys.stderr.write(f"\n{line}\n")


def main():
    arguments = read_arguments()
    with connect(arguments.address, arguments.ca) as channel:
        try:
            answer(inference_pb2_grpc.InferenceServiceStub(channel), arguments)
        except grpc.RpcError as error:
            tell(f"error: {error.code().name}: {error.details()}\nnext: {next_step(error)}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
